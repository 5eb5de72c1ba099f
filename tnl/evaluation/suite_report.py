"""An evaluation's report: its tables, what they depend on, and the files that hold it."""

import importlib.metadata
import json
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import tnl
from tnl.errors import CannotWriteError
from tnl.evaluation.harness_model import HarnessModel
from tnl.evaluation.score_page import to_html
from tnl.evaluation.score_tables import ScoreReport, Table, to_json, to_markdown
from tnl.evaluation.suite_run import SEEDS, Measured, Plan
from tnl.evaluation.suite_settings import SuiteSettings
from tnl.evaluation.suite_tables import losses_table, scores_table, suite_table
from tnl.evaluation.task_data import TaskData, digest_of
from tnl.files import write_atomically
from tnl.model.fingerprint import contents_digest

SCORES, MARKDOWN, PAGE = "scores.json", "report.md", "index.html"
SHARED = ("requests", "truncations")
PACKAGES = ("lm_eval", "transformers", "torch", "datasets", "tokenizers", "numpy", "rouge_score")


@dataclass(frozen=True)
class About:
    """The model of a report, and what happened to its requests."""

    label: str
    name: str
    parameters: int
    dtype: str
    weights_sha256: str
    counts: dict[str, int]
    processes: int

    @property
    def size(self) -> str:
        """The number of parameters as a table shows it."""
        return f"{self.parameters / 1e9:.2f}B" if self.parameters >= 1e8 else f"{self.parameters / 1e6:.2f}M"


def about_model(name: str, model: HarnessModel) -> About:
    """What the report says of the model, after the evaluation."""
    return About(
        label=Path(name).absolute().name,
        name=name,
        parameters=model.model.num_parameters(),
        dtype=str(model.model.dtype).removeprefix("torch."),
        weights_sha256=contents_digest(model.model),
        counts=_counts(model),
        processes=dist.get_world_size() if dist.is_initialized() else 1,
    )


def _counts(model: HarnessModel) -> dict[str, int]:
    """What happened on all ranks together."""
    own = asdict(model.counts)
    if not dist.is_initialized():
        return own
    parts = [own] * dist.get_world_size()
    dist.all_gather_object(parts, own)
    # Every rank is given all requests, and cuts them.
    return {name: own[name] if name in SHARED else sum(part[name] for part in parts) for name in own}


def assemble(
    about: About,
    suite: SuiteSettings | None,
    settings: dict[str, Any],
    data: TaskData,
    tasks: Plan,
    measured: Measured,
    speed: Sequence[Table],
) -> ScoreReport:
    """The report.

    Args:
        settings: options of the command that the scores depend on.
        speed: tables of benchmarks that join it.
    """
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU ({platform.machine()})"
    versions = _versions()
    facts = {
        "model": f"{about.name}, {about.parameters:,} parameters, {about.dtype}",
        "weights": f"SHA-256 {about.weights_sha256}",
        "device": f"{device}, {about.processes} process{'es' if about.processes > 1 else ''}",
        "versions": ", ".join(f"{name} {version}" for name, version in versions.items()),
        "seeds": ", ".join(f"{name} {seed}" for name, seed in SEEDS.items()),
        "settings": _listed(settings),
        "requests": ", ".join(f"{name.replace('_', ' ')} {count:,}" for name, count in about.counts.items()),
    }
    counted = [
        f"{task} {len(found.documents):,} of {found.total:,}"
        for task, found in measured.empty.items()
        if task in tasks.allow_empty
    ]
    if counted:
        facts["empty answers counted as wrong"] = ", ".join(counted)
    record = {
        "model": asdict(about),
        "settings": settings,
        "versions": versions,
        "seeds": SEEDS,
        "device": device,
        "data": {task: {"sources": found, "digest": digest_of(found)} for task, found in data.sources.items()},
        "scores": {name: [asdict(score) for score in found] for name, found in measured.scores.items()},
        "details": [asdict(score) for score in measured.details],
        "empty_answers": {
            task: asdict(found) | {"allowed": task in tasks.allow_empty} for task, found in measured.empty.items()
        },
        "losses": [asdict(loss) | {"bits": loss.bits, "perplexity": loss.perplexity} for loss in measured.losses],
    }
    limited = f", the first {settings['limit']} documents of each task" if "limit" in settings else ""
    source = f"tnl evaluate, lm-eval {versions['lm_eval']}{limited}"
    tables = []
    sizes = {name: len(selection.leaves) for name, selection in tasks.selections.items()}
    if suite is not None:
        tables.append(suite_table(suite, (about.label, about.size), source, measured.scores, sizes))
    else:
        wanted = [score for found in measured.scores.values() for score in found]
        tables.append(scores_table("Scores", wanted, source, sizes=sizes))
    if measured.losses:
        tables.append(losses_table(measured.losses, source))
    tables += [*speed, scores_table("All metrics of all tasks", measured.details, source, is_detail=True)]
    title = f"{about.label}: {suite.title if suite else ', '.join(tasks.selections)}"
    return ScoreReport(title, tuple(facts.items()), tuple(tables), measured.missing, record)


def _versions() -> dict[str, str]:
    found = {"tnl": tnl.__version__, "python": platform.python_version()}
    return found | {name: importlib.metadata.version(name) for name in PACKAGES}


def _listed(values: dict[str, Any]) -> str:
    shown = {name: " ".join(value) if isinstance(value, tuple) else value for name, value in values.items()}
    return ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in shown.items())


def write_report(found: ScoreReport, folder: Path) -> None:
    """Write `SCORES`, `MARKDOWN` and `PAGE` to ``folder``, which exists.

    Raises:
        CannotWriteError: the disk refused.
    """
    contents = {
        SCORES: json.dumps(to_json(found), indent=1, allow_nan=False) + "\n",
        MARKDOWN: to_markdown(found),
        PAGE: to_html(found),
    }
    for name, content in contents.items():
        try:
            write_atomically(folder / name, content)
        except OSError as error:
            raise CannotWriteError(f"{folder / name}: {error.strerror}; free some space or give --output") from None
