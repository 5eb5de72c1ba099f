"""A training run, top to bottom: of pretraining, and of whatever else brings data and says what of the model trains."""

import contextlib
import json
import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from transformers import PreTrainedModel

from tnl import config
from tnl.errors import EXIT_PREEMPTED, ConfigError, NonFiniteError, UserError
from tnl.files import write_atomically
from tnl.model.kinds import model_class
from tnl.training.announcement import announce
from tnl.training.base_checkpoint import BaseCheckpoint, open_base
from tnl.training.blocks import check_compile
from tnl.training.checkpoint import RunState, choose_checkpoint, load_checkpoint, named_step, save_checkpoint
from tnl.training.commit import CheckpointStore
from tnl.training.engine import ELSEWHERE, Ranks, build_engine, build_model, deepspeed_config, init_ranks
from tnl.training.faults import fault_point
from tnl.training.hardware import peak_flops
from tnl.training.layer_norms import state_norms
from tnl.training.lock import RunLock
from tnl.training.mesh import Mesh, build_mesh
from tnl.training.metrics import MetricsWriter, finite_or_none
from tnl.training.out_of_memory import out_of_memory_advice
from tnl.training.profiling import StepProfiler
from tnl.training.run_data import RunData, open_data
from tnl.training.run_folder import (
    BASE,
    CHECKPOINTS,
    CONFIG,
    TOKENIZER,
    base_record,
    check_run_folder,
    move_aside,
    network_config,
)
from tnl.training.run_identity import check_same_run, identity
from tnl.training.same_start import check_same_data, check_same_start, check_shared, gathered_starts
from tnl.training.schedule import learning_rate
from tnl.training.settings import PretrainSettings, RunSettings
from tnl.training.status import record_failure, record_start, write_status
from tnl.training.stop import STOP_FILE, StopRequest
from tnl.training.suite_evaluation import SuiteEvaluation, open_suite, scores_or_problem
from tnl.training.throughput import Throughput
from tnl.training.timing import StepTimer, peak_memory
from tnl.training.train_step import StepResult, TrainStep
from tnl.training.transfer import to_device


@dataclass(frozen=True)
class Task:
    """What one kind of training brings to the loop.

    Attributes:
        open_data: opens the data; its third argument is the folder of the checkpoint that the run begins from, or of
            the run's own tokenizer, None where there is neither.
        adapt: changes the model before the engine is built, on all ranks alike.
        trains_all: whether every parameter trains; then a checkpoint holds the whole model.
    """

    open_data: Callable[[RunSettings, Mesh, Path | None], RunData]
    adapt: Callable[[PreTrainedModel, torch.device], None] = lambda model, device: None
    trains_all: bool = True


def pretrain(
    settings: PretrainSettings,
    *,
    resume: str = "auto",
    fresh: bool = False,
    console: Console | None = None,
    start: Path | None = None,
) -> str:
    """Pretrain, from random weights or a checkpoint; see `train`."""
    return train(settings, Task(open_data), resume=resume, fresh=fresh, console=console, start=start)


def train(
    settings: RunSettings,
    task: Task,
    *,
    resume: str = "auto",
    fresh: bool = False,
    console: Console | None = None,
    start: Path | None = None,
) -> str:
    """Train until the last step, or until asked to stop.

    Args:
        resume: ``auto`` goes on from the newest valid checkpoint of the run folder, a step number from that one.
        fresh: begin anew; an existing run folder is moved aside.
        console: where rank 0 reports; default the standard output.
        start: the file that stands for what a launcher started; see `tnl.training.start`.

    Returns:
        ``finished`` or ``preempted`` (stopped on request, checkpoint saved: the same command goes on).

    Raises:
        UserError: see `tnl.errors`; each class has its exit code. On every rank of the run.
    """
    if fresh and resume != "auto":
        raise ConfigError("--fresh: begins anew, and --resume goes on; give only one of them")
    ranks = init_ranks()
    check_same_start(settings, ranks)
    starts = gathered_starts(start, ranks)
    # What can be refused is refused before the run folder is touched.
    _check_settings(settings, ranks)
    _check_base_elsewhere(settings)
    mesh = build_mesh(settings.train, ranks)
    resumes = not fresh and bool(CheckpointStore(settings.output / CHECKPOINTS).steps())
    record, base = base_record(settings.output) if resumes else {}, None
    # A checkpoint of ours that holds the whole model stands for the base.
    if settings.init_from is not None and not (task.trains_all and settings.init_from == record.get("init_from")):
        base = open_base(settings, ranks, record)
        record = base.record()
    tokenizer = settings.output / TOKENIZER if resumes else None if base is None else base.folder
    with ranks.together():
        data = task.open_data(settings, mesh, tokenizer)
        settings = data.resolved(settings)
        suite = open_suite(settings)
    check_same_data(data.fingerprint, ranks)
    with contextlib.ExitStack() as stack:
        problem = None
        if ranks.is_main:
            try:
                if resume != "auto":
                    named_step(CheckpointStore(settings.output / CHECKPOINTS), resume)
                if fresh:
                    move_aside(settings.output)
                check_run_folder(settings, data.loader.fingerprint)
                stack.callback(RunLock(settings.output).close)
                check_run_folder(settings, data.loader.fingerprint)
                # Of an earlier run that ended before it saw it.
                (settings.output / STOP_FILE).unlink(missing_ok=True)
                record_start(settings.output, settings.train.steps, starts)
            except UserError as error:
                problem = error
        ranks.raise_together(problem)
        try:
            check_shared(settings.output, ranks)
            with out_of_memory_advice(settings, ranks.rank, ranks.world_size):
                run = _Run(settings, task, data, suite, base, record, ranks, mesh, console or Console(), stack)
                return run.train(resume)
        except BaseException as error:
            if str(error) != ELSEWHERE:
                record_failure(settings.output, error)
            raise


def _check_settings(settings: RunSettings, ranks: Ranks) -> None:
    """Refuse on all ranks together what some rank's machine or the number of ranks does not allow."""
    with ranks.together():
        deepspeed_config(settings, ranks.world_size)
        check_compile(settings.train, ranks.device)


def _check_base_elsewhere(settings: RunSettings) -> None:
    """Refuse a run that would begin from itself: a fresh start moves the folder away."""
    if settings.init_from is None:
        return
    base, output = Path(settings.init_from).resolve(), settings.output.resolve()
    if base == output or output in base.parents:
        raise ConfigError(
            f"output: {settings.output}: init_from {settings.init_from} lies in it; choose another folder"
        )


class _Run:
    """A run whose folder is ours: from the choice of a checkpoint to the last step.

    Args:
        suite: benchmarks to measure beside the held-out loss.
        base: the checkpoint that it begins from, where its weights are needed.
        record: what the run folder keeps of it; empty where there was none.
        stack: closes what the run opens.
    """

    def __init__(
        self,
        settings: RunSettings,
        task: Task,
        data: RunData,
        suite: SuiteEvaluation | None,
        base: BaseCheckpoint | None,
        record: dict,
        ranks: Ranks,
        mesh: Mesh,
        console: Console,
        stack: contextlib.ExitStack,
    ):
        self.settings, self.task, self.data, self.ranks, self.mesh = settings, task, data, ranks, mesh
        self.suite, self.base, self.record, self.console, self.stack = suite, base, record, console, stack
        self.identity = identity(settings, data, record.get("fingerprint"))
        self.store = CheckpointStore(settings.output / CHECKPOINTS)
        self.state = RunState()
        self.heldout_loss: float | None = None  # as last measured
        self.metrics: MetricsWriter | None = None  # rank 0 has one
        self.stop = StopRequest(settings.output)
        stack.callback(self.stop.close)

    def train(self, resume: str) -> str:
        """Make the steps that are missing; returns ``finished`` or ``preempted``."""
        chosen = choose_checkpoint(self.store, resume, self.ranks, self._warn)
        if chosen == self.settings.train.steps:
            if self.ranks.is_main:
                self._say(f"{self.settings.output}: all {chosen} steps are done, nothing to train")
                self.state.step = chosen
                self._record("finished", exit_code=0)
            return "finished"
        if chosen is not None:
            # First, because DeepSpeed reads files of another layout without such a message.
            with self.ranks.together():
                check_same_run(self.store.manifest(chosen), self.identity, self.store.path(chosen))
        torch.manual_seed(self.settings.seed)
        network = network_config(self.settings, self.record)
        read = None if self.base is None else self.base.read
        model = build_model(lambda: model_class(network)(network), self.settings, self.ranks, self.mesh.tensor, read)
        self.task.adapt(model, self.ranks.device)
        # Before ZeRO-3 divides the adapters, too.
        trained = sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters() if p.requires_grad)
        self.engine = build_engine(self.settings, model, self.ranks, self.mesh.tensor)
        # Dropout and noise are not the same on ranks that read other data; a checkpoint brings its own states.
        torch.manual_seed(self.settings.seed + self.mesh.data_rank)
        if chosen is not None:
            self.state = load_checkpoint(self.engine, self.store, chosen, self.ranks, is_whole=self.task.trains_all)
        self._write_folder(chosen)
        peak, source = peak_flops(self.ranks.device, self.settings.logging.peak_tflops)
        tokens_per_step = self.data.tokens_per_step(self.settings)
        self.throughput = Throughput(self.settings.train, network, self.ranks.world_size, peak, tokens_per_step)
        if self.ranks.is_main:
            announce(
                self.settings,
                network,
                self.ranks,
                self.mesh,
                first_step=self.state.step,
                peak=peak,
                peak_source=source,
                say=self._say,
            )
            self._say_more(trained)
            self._start_metrics()
            self._record("running")
        return self._steps()

    def _say_more(self, trained: int) -> None:
        if self.base is not None:
            added = f", {self.base.new_rows} new token ids" if self.base.new_rows else ""
            self._say(f"begins from {self.base.folder} ({self.base.fingerprint[:12]}){added}")
        if not self.task.trains_all:
            self._say(f"{trained:,} parameters train, the others stay as they are")
        for line in self.data.describe():
            self._say(line)

    def _steps(self) -> str:
        settings, train, state = self.settings, self.settings.train, self.state
        self.engine.train()
        timer = StepTimer(self.ranks.device)
        step = TrainStep(self.engine, train, self.ranks, self.mesh, self.stop, timer)
        profiler = StepProfiler(settings.output, settings.logging.profile_steps, self.ranks.rank)
        norms_every = settings.logging.layer_norms_every
        if state.step == 0 and settings.evaluation.at_start:
            self._evaluate()
        batches = self.data.loader.steps(state.step, train.steps)
        while state.step < train.steps:
            profiler.begin(state.step + 1)
            timer.begin()
            micro_batches = next(batches)
            fault_point("step", step=state.step)
            lr = learning_rate(settings.schedule, settings.optimizer.lr, state.step, train.steps)
            with_norms = norms_every > 0 and (state.step + 1) % norms_every == 0
            result = step.run(micro_batches, step=state.step, lr=lr, with_norms=with_norms)
            times = timer.split()
            state.count(self.throughput.tokens_per_step, applied=self.engine.was_step_applied())
            if self.metrics:
                self._report(result, lr, times)
            if with_norms:
                self._report_norms(result, micro_batches)
            trace = profiler.end(state.step)
            if self.metrics and trace:
                self.metrics.message(f"step {state.step}: wrote {trace}")
            if state.consecutive_skipped > train.max_skipped_steps:
                raise NonFiniteError(
                    f"{settings.output}: loss or gradients were not finite in {state.consecutive_skipped} steps in a "
                    "row; begin a new run in another output folder with a lower optimizer.lr or a longer "
                    "schedule.warmup_steps"
                )
            last, is_best = state.step == train.steps, False
            if last or (settings.evaluation.every and state.step % settings.evaluation.every == 0):
                is_best = self._evaluate()
            if last or is_best or result.is_stopping or state.step % settings.checkpoint.every == 0:
                self._save()
            if result.is_stopping and not last:
                if self.metrics:
                    self.stop.consume()
                    reason = self.stop.reason or "another rank"
                    self.metrics.message(f"stopped on request ({reason}); the same command goes on")
                    self._record("preempted", exit_code=EXIT_PREEMPTED)
                return "preempted"
        if self.metrics:
            if None not in (state.first_loss, self.heldout_loss):
                self._say_gain()
            self.stop.consume()
            self._record("finished", exit_code=0)
        return "finished"

    def _say_gain(self) -> None:
        state = self.state
        text = f"held-out loss: {state.first_loss:.4f} nats before training, {self.heldout_loss:.4f} after it"
        if state.best_step not in (None, state.step):
            text += f"; lowest {state.best_loss:.4f} after step {state.best_step}, whose checkpoint is kept"
        self.metrics.message(text)

    def _report(self, result: StepResult, lr: float, times: dict[str, float]) -> None:
        state = self.state
        self.metrics.train(
            {
                "step": state.step,
                "tokens": state.tokens,
                "loss": finite_or_none(result.loss),
                "loss_bits": finite_or_none(result.loss / math.log(2)),
                "grad_norm": finite_or_none(float(self.engine.get_global_grad_norm())),
                "lr": lr,
                **self.throughput.row(times["step_time_s"]),
                "skipped": state.consecutive_skipped > 0,
                **times,
                "peak_memory_bytes": peak_memory(self.ranks.device),
            }
        )

    def _report_norms(self, result: StepResult, micro_batches: list[dict]) -> None:
        """On all ranks: a state is that of the model as a whole, behind rank 0's first window read as one text."""
        train, norms = self.settings.train, {"grad_norms": result.norms}
        if self.settings.model.kind == "tnl":
            text = micro_batches[0]["input_ids"][:1, : train.segment_length or train.sequence_length]
            norms["state_norms"] = state_norms(self.engine, to_device(text, self.ranks.device), self.mesh.tensor)
        if self.metrics:
            finite = {name: [finite_or_none(norm) for norm in found] for name, found in norms.items()}
            self.metrics.layers({"step": self.state.step, **finite})

    def _evaluate(self) -> bool:
        """Returns whether the held-out loss is the lowest so far, and its checkpoint wanted."""
        state, is_best = self.state, False
        found = self.data.evaluate(self.engine, self.settings, self.ranks, self.mesh)
        if found is not None:
            loss = self.heldout_loss = found["loss"]
            if state.step == 0:
                state.first_loss = finite_or_none(loss)
            else:
                is_best = self.settings.evaluation.keep_best and state.is_best(loss)
            if self.metrics:
                self.metrics.evaluation({"step": state.step, "tokens": state.tokens, **found})
        if self.suite is not None:
            scores, problem = scores_or_problem(self.suite, self.engine)
            if self.metrics:
                self.metrics.scores({"step": state.step, "tokens": state.tokens, **scores}, problem)
        samples = self.data.samples(self.engine, self.settings, self.ranks)
        if self.metrics:
            self.metrics.samples(state.step, samples)
        return is_best

    def _save(self) -> None:
        path = save_checkpoint(
            self.engine,
            self.store,
            self.state,
            self.ranks,
            self.identity,
            self.settings.checkpoint.keep,
            self._warn,
            is_whole=self.task.trains_all,
        )
        if self.metrics:
            self.metrics.message(f"step {self.state.step}: saved {path}")
            self._record("running")

    def _write_folder(self, chosen: int | None) -> None:
        """Write what a run folder holds from its start; newer checkpoints than the chosen one are set aside."""
        problem = None
        if self.ranks.is_main:
            try:
                _write_run_folder(self.settings, self.data, self.record, is_new=chosen is None)
                for newer in self.store.set_aside_after(chosen) if chosen is not None else []:
                    self._warn(f"{newer}: not used any more, remove it when you like")
            except (UserError, OSError) as error:
                is_ours = isinstance(error, UserError)
                problem = error if is_ours else self.store.cannot_write(self.settings.output, error)
        self.ranks.raise_together(problem)

    def _start_metrics(self) -> None:
        settings = self.settings
        tree = settings.model_dump(mode="json")
        self.metrics = MetricsWriter(
            settings.output, settings.logging, settings.train.steps, self.state.step, tree, self.console
        )
        self.stack.callback(self.metrics.close)

    def _record(self, state: str, **more) -> None:
        write_status(self.settings.output, state, self.state.step, self.settings.train.steps, **more)

    def _say(self, text: str) -> None:
        self.console.print(text, highlight=False, soft_wrap=True)

    def _warn(self, text: str) -> None:
        self.console.print(f"warning: {text}", style="yellow", highlight=False, soft_wrap=True)


def _write_run_folder(settings: RunSettings, data: RunData, record: dict, *, is_new: bool) -> None:
    """The effective configuration, the tokenizer that exports of this run will carry, and what the run began from."""
    folder = settings.output
    if is_new:
        shutil.rmtree(folder / TOKENIZER, ignore_errors=True)
        (folder / TOKENIZER).mkdir()
        data.write_tokenizer(folder / TOKENIZER)
    (folder / BASE).unlink(missing_ok=True)
    if record:
        write_atomically(folder / BASE, json.dumps(record, indent=1) + "\n")
    write_atomically(folder / CONFIG, config.dump(settings))
