"""`tnl evaluate --suite` and `--tasks`: a model on benchmarks, beside published scores."""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from tnl import config as configuration
from tnl.errors import ConfigError, DataError, UserError, did_you_mean
from tnl.evaluation.harness_package import check_harness
from tnl.evaluation.rank_division import RankDivision
from tnl.evaluation.sample_cache import SampleCache
from tnl.evaluation.suite_settings import SuiteSettings

if TYPE_CHECKING:
    from tnl.evaluation.harness_model import HarnessModel
    from tnl.evaluation.score_tables import ScoreReport
    from tnl.evaluation.suite_run import Wanted

PROMPTS, SAMPLES = "prompts", "samples"
# Options that the scores depend on.
SHOWN = ("suite", "tasks", "limit", "batch_tokens", "max_length", "num_fewshot", "allow_empty")


@dataclass(frozen=True)
class SuiteOptions:
    """What `tnl evaluate` was asked for.

    Attributes:
        suite: name below configs/evaluate, or a YAML file; None: ``tasks`` alone.
        tasks: names; with a suite, those of its tasks that are measured.
        data_dir: local folder of data, see `tnl.evaluation.task_data.TaskData`.
        limit: documents of each task.
        output: folder for the report, the prompts, and the results by sample that a later start reads back.
        batch_tokens, max_length: see `tnl.evaluation.harness_model.HarnessModel`.
        num_fewshot: examples before each question, in place of those that the suite or the task says.
        allow_empty: count an empty text as an answer; else a task with one has no score, unless its suite says so.
        bench: files of `tnl bench train` and `tnl bench generate`.
    """

    suite: str | None
    tasks: tuple[str, ...]
    output: Path
    data_dir: Path | None = None
    limit: int | None = None
    confirm_unsafe: bool = False
    batch_tokens: int = 2**14
    max_length: int | None = None
    num_fewshot: int | None = None
    allow_empty: bool = False
    bench: tuple[Path, ...] = ()


def evaluate_suite(
    name: str,
    options: SuiteOptions,
    *,
    resolve: Callable[[str], str] = str,
    report: Callable[[str], None] = print,
) -> "ScoreReport":
    """Measure, print the report, and write it to ``options.output``.

    Args:
        name: of the model, as the user gave it.
        resolve: a model folder or hub name for it; called by one process at a time.

    Raises:
        ConfigError: no such suite, task or metric, unsafe tasks, or a model that cannot be loaded or has no fitting
            tokenizer.
        DataError: data are missing or wrong, or answers empty, of one task at least; the others are measured and
            reported before.
        CannotWriteError: the output folder cannot be written.
    """
    check_harness()
    from tnl.evaluation.score_tables import to_text
    from tnl.evaluation.speed_tables import speed_tables
    from tnl.evaluation.suite_report import PAGE, about_model, assemble, write_report
    from tnl.evaluation.suite_run import measure, plan
    from tnl.evaluation.task_data import TaskData
    from tnl.evaluation.task_library import TaskLibrary

    suite = None if options.suite is None else load_suite(options.suite)
    wanted = wanted_tasks(suite, options)
    speed = speed_tables(list(options.bench))
    library = TaskLibrary(TaskData(options.data_dir), confirm_unsafe=options.confirm_unsafe)
    tasks = plan(library, wanted, confirm_unsafe=options.confirm_unsafe)
    if not tasks.tasks:
        raise DataError("nothing to measure:\n" + "\n".join(f"  {reason}" for reason in tasks.missing.values()))
    with _ranks() as rank:
        say = report if rank == 0 else lambda text: None
        cache = SampleCache(options.output / SAMPLES)
        model = _model(_resolved(name, resolve, rank), options, cache)
        say(f"{name}: {len(tasks.tasks)} tasks; results by sample in {options.output / SAMPLES}")
        measured = measure(
            model,
            tasks,
            limit=options.limit,
            confirm_unsafe=options.confirm_unsafe,
            prompts=options.output / PROMPTS if rank == 0 else None,
        )
        cache.close()
        settings = {key: value for key, value in asdict(options).items() if key in SHOWN and value not in (None, ())}
        if not options.allow_empty:
            del settings["allow_empty"]
        found = assemble(about_model(name, model), suite, settings, library.data, tasks, measured, speed)
        failure = None
        if rank == 0:
            try:
                write_report(found, options.output)
                say(to_text(found))
                say(f"report: {options.output / PAGE}")
            except UserError as error:
                failure = error
        # All end together: where one ends with an error, torchrun kills the one that still writes.
        RankDivision().gather({}, failure)
    if measured.missing:
        raise DataError(
            f"{len(measured.missing)} of {len(wanted)} tasks were not measured, or not whole:\n"
            + "\n".join(f"  {reason}" for reason in measured.missing.values())
        )
    return found


def load_suite(name: str) -> SuiteSettings:
    """A suite by the name of a shipped one, or a YAML file.

    Raises:
        ConfigError: there is none, or it is no suite.
    """
    if name.endswith((".yaml", ".yml")):
        return configuration.load(SuiteSettings, name)
    known = configuration.shipped_names("evaluate")
    if name not in known:
        raise ConfigError(f"--suite: no suite {name!r}, {did_you_mean(name, known)}")
    return configuration.load(SuiteSettings, f"evaluate/{name}")


def expand_suites(names: Sequence[str]) -> list[str]:
    """The tasks of suites, and other names as they are."""
    known, found = configuration.shipped_names("evaluate"), []
    for name in names:
        found += [task.task for task in load_suite(name).tasks] if name in known else [name]
    return list(dict.fromkeys(found))


def wanted_tasks(suite: SuiteSettings | None, options: SuiteOptions) -> "list[Wanted]":
    """The tasks to measure.

    Raises:
        ConfigError: neither a suite nor tasks, or tasks that are not of the suite.
    """
    from tnl.evaluation.suite_run import Wanted

    shots = options.num_fewshot
    if suite is None:
        return [Wanted(name, shots, allow_empty=options.allow_empty) for name in dict.fromkeys(options.tasks)]
    metrics: dict[str, list[str]] = {}
    for task in suite.tasks:
        metrics.setdefault(task.task, []).append(task.metric)
    may_be_empty = {task.task for task in suite.tasks if task.allow_empty or options.allow_empty}
    for name in options.tasks:
        if name not in metrics:
            raise ConfigError(f"--tasks: {options.suite} has no task {name!r}, {did_you_mean(name, metrics)}")
    given = {task.task: task.num_fewshot if shots is None else shots for task in suite.tasks}
    return [
        Wanted(name, given[name], tuple(found), name in may_be_empty)
        for name, found in metrics.items()
        if not options.tasks or name in options.tasks
    ]


@contextmanager
def _ranks() -> Iterator[int]:
    """Join the processes that torchrun started, or be the only one: the rank of this one."""
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield 0
        return
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    try:
        yield dist.get_rank()
    finally:
        dist.destroy_process_group()


def _resolved(name: str, resolve: Callable[[str], str], rank: int) -> str:
    """What ``resolve`` makes of a name: of a run folder a new export, which one process writes and all of them read."""
    if rank > 0:
        dist.barrier()
        return resolve(name)
    found = resolve(name)
    if dist.is_initialized():
        dist.barrier()
    return found


def _model(name: str, options: SuiteOptions, cache: SampleCache) -> "HarnessModel":
    from tnl.evaluation.harness_model import HarnessModel
    from tnl.generation.load import load_model

    model, tokenizer = load_model(name, dtype=None if torch.cuda.is_available() else torch.float32)
    return HarnessModel(
        model,
        tokenizer,
        batch_tokens=options.batch_tokens,
        max_length=options.max_length,
        cache=cache,
    )
