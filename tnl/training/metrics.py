"""What a run reports: metrics.jsonl always, a progress bar or plain lines, Weights & Biases when asked."""

import contextlib
import json
import math
import os
import time
import uuid
from collections import deque
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from tnl.errors import CannotWriteError, ConfigError
from tnl.files import write_atomically
from tnl.training.settings import LoggingSettings

FILE = "metrics.jsonl"
SAMPLES = "samples.jsonl"
WANDB_ID = "wandb_id"


def finite_or_none(value: float) -> float | None:
    """JSON has no NaN: a value that is not finite is written as null."""
    return value if math.isfinite(value) else None


def trim(path: Path, last_step: int) -> None:
    """Drop the lines after ``last_step``, and a line torn by a kill: a resumed run writes those steps again."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        try:
            if json.loads(line)["step"] <= last_step:
                kept.append(line + "\n")
        except (ValueError, KeyError, TypeError):  # the last line, cut short
            continue
    write_atomically(path, "".join(kept))


class MetricsWriter:
    """Writes one JSON object a line, and shows the run to the person who started it. Only rank 0 makes one.

    Args:
        folder: run folder.
        settings: the `logging` section.
        total_steps: length of the run.
        first_step: steps that are done already.
        config: effective configuration, for Weights & Biases.
        console: where to print.
    """

    def __init__(
        self,
        folder: Path,
        settings: LoggingSettings,
        total_steps: int,
        first_step: int,
        config: dict,
        console: Console,
    ):
        trim(folder / FILE, first_step)
        trim(folder / SAMPLES, first_step)
        self._samples = folder / SAMPLES
        self._file = open(folder / FILE, "a", encoding="utf-8")  # noqa: SIM115 - closed by close()
        self._settings, self._total, self._console = settings, total_steps, console
        self._recent: deque[float] = deque(maxlen=50)
        self._progress = None
        if console.is_terminal:
            self._progress = Progress(
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TextColumn("{task.fields[text]}"),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                console=console,
            )
            self._task = self._progress.add_task("", total=total_steps, completed=first_step, text="")
            self._progress.start()
        self._wandb = _start_wandb(folder, settings, config) if settings.wandb != "disabled" else None

    def train(self, row: dict) -> None:
        """Record an optimizer step."""
        self._write({"kind": "train", "time": time.time(), **row})
        step = row["step"]
        self._recent.append(row["step_time_s"])
        text = _describe(row)
        if self._progress:
            self._progress.update(self._task, completed=step, text=text)
        elif step % self._settings.print_every == 0 or step == self._total:
            left = (self._total - step) * sum(self._recent) / len(self._recent)
            self._console.print(
                f"step {step}/{self._total}  {text}  {_duration(left)} left", highlight=False, soft_wrap=True
            )

    def evaluation(self, row: dict) -> None:
        """Record a held-out evaluation."""
        self._write({"kind": "evaluation", "time": time.time(), **row})
        per_byte = "" if row["bits_per_byte"] is None else f", {row['bits_per_byte']:.4f} bits/byte"
        self.message(
            f"step {row['step']}: held-out loss {row['loss']:.4f} nats, {row['bits_per_token']:.4f} "
            f"bits/token{per_byte}"
        )

    def scores(self, row: dict, problem: str | None) -> None:
        """Record scores of benchmarks, by name; or say why there are none."""
        if problem is not None:
            self.message(f"step {row['step']}: no scores: {problem}")
            return
        self._write({"kind": "scores", "time": time.time(), **row})
        names = [name for name in row if name not in ("step", "tokens") and not name.endswith(" stderr")]
        self.message(f"step {row['step']}: " + ", ".join(f"{name} {row[name]:.4g}" for name in names))

    def layers(self, row: dict) -> None:
        """Record norms of the blocks."""
        self._write({"kind": "layers", "time": time.time(), **row})

    def samples(self, step: int, samples: list[dict]) -> None:
        """Record and show what the model wrote: ``prompt`` and ``text`` of each."""
        if not samples:
            return
        try:
            with open(self._samples, "a", encoding="utf-8") as file:
                file.writelines(json.dumps({"step": step, **sample}) + "\n" for sample in samples)
        except OSError as error:
            raise CannotWriteError(f"{self._samples}: {error.strerror}; free some space and start again") from None
        for sample in samples:
            self.message(f"step {step}: {sample['prompt']!r} -> {sample['text']!r}")

    def message(self, text: str) -> None:
        """Print a line without disturbing the bar."""
        self._console.print(text, highlight=False, soft_wrap=True, markup=False)

    def _write(self, row: dict) -> None:
        try:
            self._file.write(json.dumps(row, allow_nan=False) + "\n")
            self._file.flush()
        except OSError as error:
            raise CannotWriteError(f"{self._file.name}: {error.strerror}; free some space and start again") from None
        if self._wandb:
            kind = row["kind"]
            self._wandb.log({f"{kind}/{k}": v for k, v in row.items() if k not in ("kind", "time")}, step=row["step"])

    def close(self) -> None:
        """End the bar, the file and the Weights & Biases run."""
        if self._progress:
            self._progress.stop()
        if self._wandb:
            self._wandb.finish()
        with contextlib.suppress(OSError):  # reported when the row was written
            self._file.close()


def _describe(row: dict) -> str:
    loss = "non-finite, step left out" if row["skipped"] else f"{row['loss']:.4f} nats {row['loss_bits']:.4f} bits"
    norm = "-" if row["grad_norm"] is None else f"{row['grad_norm']:.2f}"
    mfu = "" if row["mfu"] is None else f"  MFU {row['mfu']:.1%}"
    return (
        f"loss {loss}  norm {norm}  lr {row['lr']:.2e}  {row['tokens_per_s']:,.0f} tok/s  "
        f"{row['tgs']:,.0f} tok/s/device{mfu}"
    )


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"


def _start_wandb(folder: Path, settings: LoggingSettings, config: dict):
    import wandb

    # No machine metadata and no code: the command line and the environment may hold secrets.
    options = wandb.Settings(x_disable_meta=True, save_code=False, disable_git=True, console="off", silent=True)
    os.environ.setdefault("WANDB_DIR", str(folder))
    identity = folder / WANDB_ID  # one run there for all starts of the run here
    if not identity.exists():
        write_atomically(identity, uuid.uuid4().hex[:16])
    try:
        return wandb.init(
            project=settings.wandb_project,
            name=folder.name,
            id=identity.read_text(encoding="utf-8").strip(),
            resume="allow",
            dir=str(folder),
            mode=settings.wandb,
            config=config,
            settings=options,
        )
    except wandb.errors.Error as error:
        text = " ".join(str(error).split())
        raise ConfigError(
            f"logging.wandb: Weights & Biases did not start ({text}); log in with WANDB_API_KEY, or set offline"
        ) from None
