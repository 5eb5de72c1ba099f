"""The tasks of lm-eval and those that this package brings, by name: found, checked, and built from local data."""

import logging
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, partial
from itertools import islice
from pathlib import Path

from lm_eval import tasks as harness_tasks
from lm_eval.api.task import Task
from lm_eval.tasks import TaskManager

from tnl.errors import ConfigError, DataError, UserError, did_you_mean
from tnl.evaluation.hub_programs import hub_programs
from tnl.evaluation.quick_tasks import QUICK_TASKS
from tnl.evaluation.scrolls_tasks import SCROLLS_TASKS
from tnl.evaluation.task_data import MissingDataError, TaskData
from tnl.evaluation.text_tasks import TEXT_TASKS

FOLDER = Path(harness_tasks.__file__).parent
# Under these names the index of lm-eval keeps what is no group; see `lm_eval.tasks._index.Kind`.
TAG, GROUP = "TAG", "GROUP"
# lm-eval's own run code of the hub to compute their metric.
REPLACED = {f"scrolls_{name.replace('_', '')}": f"scrolls_{name}" for name in SCROLLS_TASKS}
SHOWN_DOCUMENTS = 8  # by which the data of a task are judged
OWN_TASKS: dict[str, Callable[[], dict]] = {**QUICK_TASKS, **TEXT_TASKS}
OWN_TASKS |= {f"scrolls_{name}": make for name, make in SCROLLS_TASKS.items()}


@dataclass(frozen=True)
class Leaf:
    """A single task, and what a group that it stands in changes of its configuration."""

    name: str
    changes: dict = field(default_factory=dict, compare=False)


@dataclass(frozen=True)
class Selection:
    """What a name stands for.

    Attributes:
        leaves: single tasks.
        is_group: whether the name is that of several.
        weights: whether the mean of a metric over the leaves counts each by its size; of metrics of a group.
    """

    name: str
    leaves: tuple[Leaf, ...]
    is_group: bool
    weights: dict[str, bool]


class TaskLibrary:
    """Finds tasks by name without reading the fourteen thousand files of lm-eval, which takes a quarter of a minute."""

    def __init__(self, data: TaskData, *, confirm_unsafe: bool = False):
        """
        Args:
            confirm_unsafe: build tasks whose metric is a program of the hub.
        """
        self.data, self._confirm_unsafe = data, confirm_unsafe
        self._own = TaskManager(include_defaults=False)
        self._managers: list[TaskManager] = []

    def select(self, name: str) -> Selection:
        """The single tasks that a name stands for.

        Raises:
            ConfigError: there is no such task.
        """
        name = REPLACED.get(name, name)
        if name == "scrolls":
            return Selection(name, tuple(Leaf(f"scrolls_{part}") for part in SCROLLS_TASKS), True, {})
        if name in OWN_TASKS:
            return Selection(name, (Leaf(name),), False, {})
        entry = self._entry(name)
        leaves = tuple(dict.fromkeys(self._leaves(name, {})))
        metrics = (entry.cfg or {}).get("aggregate_metric_list") or []
        metrics = [metrics] if isinstance(metrics, dict) else metrics
        weights = {metric["metric"]: metric.get("weight_by_size", True) for metric in metrics}
        return Selection(name, leaves, entry.kind.name in (TAG, GROUP), weights)

    def is_unsafe(self, leaf: Leaf) -> bool:
        """Whether a task runs what the model writes."""
        if leaf.name in OWN_TASKS:
            return False
        return bool(self._settings(leaf).get("unsafe_code", False))

    def data_set(self, leaf: Leaf) -> tuple[str | None, str | None]:
        """Path and configuration of a task's data set; None where the task makes or names its data otherwise."""
        settings = self._settings(leaf)
        return settings.get("dataset_path"), settings.get("dataset_name")

    def load_options(self, leaf: Leaf) -> dict:
        """What a task gives to `datasets.load_dataset` beside the name of its data set; never leave to run code."""
        options = self._settings(leaf).get("dataset_kwargs") or {}
        return {name: value for name, value in options.items() if name != "trust_remote_code"}

    def _settings(self, leaf: Leaf) -> dict:
        settings = OWN_TASKS[leaf.name]() if leaf.name in OWN_TASKS else self._entry(leaf.name).cfg or {}
        return settings | leaf.changes

    def build(self, leaf: Leaf, num_fewshot: int | None) -> Task:
        """A task with its data.

        Args:
            num_fewshot: examples before each question; None leaves it to the task.

        Raises:
            MissingDataError: its data are not here.
            DataError: the data are not in the task's schema, or have too few examples.
        """
        with self.data.served(leaf.name), quiet_harness():
            try:
                with hub_programs(allowed=self._confirm_unsafe):
                    manager = self._own if leaf.name in OWN_TASKS else self._manager(leaf.name)
                    (task,) = manager.load([self._spec(leaf)])["tasks"].values()
                    shots = num_fewshot if num_fewshot is not None else task.get_config("num_fewshot") or 0
                    if task.OUTPUT_TYPE == "loglikelihood_rolling":  # a text alone, whatever is asked
                        shots = 0
                    num_examples = len(list(task.fewshot_docs() or [])) if shots else 0
                    # lm-eval draws one more where it compares these two, to leave out the question itself.
                    needed = shots + (task.fewshot_cfg.split == task.config.test_split) if shots else 0
                    _check_answers(task)
            except MissingDataError:
                raise
            except UserError as error:
                text = str(error)
                raise DataError(text if leaf.name in text else f"{leaf.name}: {text}") from None
            # One of the tasks ends the process where a program is not installed.
            except (ImportError, SystemExit) as error:
                raise DataError(
                    f"{leaf.name}: cannot be built ({error}); install what it needs, or leave it out"
                ) from None
            # Whatever the functions of a task meet in rows that are not what they expect.
            except Exception as error:
                reason, settings = _reason(error), self._settings(leaf)
                split = settings.get("test_split") or settings.get("validation_split")
                if split in self.data.absent.get(leaf.name, ()):
                    reason += f"; there is no split {split}"
                raise DataError(
                    f"{leaf.name}: cannot be built ({reason}); its data must have the splits and fields of "
                    f"{' '.join(filter(None, self.data_set(leaf))) or 'the task'}"
                ) from None
        if needed > num_examples:
            absent = ", ".join(dict.fromkeys(self.data.absent.get(leaf.name, ())))
            cure = f"bring the split {absent}" if absent and not num_examples else "give fewer"
            raise DataError(f"{leaf.name}: {shots} examples are asked for, its data have {num_examples}; {cure}")
        task.set_config("num_fewshot", shots)
        task.process_results = partial(_scored, leaf.name, task.process_results)
        return task

    def _spec(self, leaf: Leaf) -> str | dict:
        if leaf.name in OWN_TASKS:
            return OWN_TASKS[leaf.name]() | {"task": leaf.name}
        if leaf.changes:
            return {"group": f"{leaf.name} alone", "task": [{"task": leaf.name, **leaf.changes}]}
        return leaf.name

    def _leaves(self, name: str, changes: dict) -> list[Leaf]:
        """Single tasks below a name, in their order."""
        entry = self._entry(name)
        if entry.kind.name == TAG:
            return [Leaf(part, changes) for part in sorted(entry.tags)]
        if entry.kind.name != GROUP:
            return [Leaf(name, changes)]
        found = []
        for member in entry.cfg["task"]:
            if isinstance(member, str):
                found += self._leaves(member, changes)
                continue
            given = {key: value for key, value in member.items() if key not in ("task", "group")}
            if not isinstance(member.get("task", ""), str) or not {"task", "group"} & member.keys():
                raise ConfigError(f"{name}: a group with groups inside; give the names of its tasks instead")
            found += self._leaves(member.get("task") or member["group"], changes | given)
        return found

    def _entry(self, name: str):
        """What lm-eval's index says of a task, a group or a tag.

        Raises:
            ConfigError: there is no such name.
        """
        return self._manager(name).task_index[name]

    def _manager(self, name: str) -> TaskManager:
        """lm-eval's index of the folders that define a name."""
        known = next((manager for manager in self._managers if name in manager.task_index), None)
        for find in (_folders_by_name, _defining_folders, _mentioning_folders):
            if known is None:
                known = self._indexed(find(name), name)
        if known is None:
            raise ConfigError(f"no task {name!r}, {did_you_mean(name, _known_names())}")
        return known

    def _indexed(self, folders: set[str], name: str) -> TaskManager | None:
        """The index of some folders of lm-eval, if the name is in it."""
        if not folders:
            return None
        with quiet_harness():
            manager = TaskManager(include_defaults=False, include_path=[str(FOLDER / part) for part in sorted(folders)])
        self._managers.append(manager)
        return manager if name in manager.task_index else None


def _check_answers(task: Task) -> None:
    """Raise ValueError where the answers are none of the choices, of which lm-eval makes scores of 0."""
    if task.OUTPUT_TYPE != "multiple_choice" or task.multiple_input or callable(task.config.process_results):
        return
    for document in islice(task.task_docs, SHOWN_DOCUMENTS):
        answer, choices = task.doc_to_target(document), task.doc_to_choice(document)
        if isinstance(answer, list) or answer in choices or (isinstance(answer, int) and 0 <= answer < len(choices)):
            return
    raise ValueError(f"its answers, as {answer!r}, are none of the choices")


def _scored(name: str, score: Callable[..., dict], document: dict, results: list) -> dict:
    """What a task makes of the answers to a document."""
    try:
        return score(document, results)
    except UserError:
        raise
    # Whatever the functions of a task meet in rows that are not what they expect.
    except Exception as error:
        raise DataError(
            f"{name}: an answer cannot be scored ({_reason(error)}); correct its data, or leave it out with --tasks"
        ) from error


def _reason(error: Exception) -> str:
    """The beginning of what an exception says."""
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]


@cache
def _files() -> tuple[Path, ...]:
    """Files of lm-eval in which a task can have its name."""
    return tuple(file for file in FOLDER.rglob("*") if file.suffix in ("", ".yaml") and file.is_file())


@cache
def _files_with(name: bytes) -> dict[Path, bytes]:
    """Those that have a name in them, and what they hold."""
    contents = ((file, file.read_bytes()) for file in _files())
    return {file: content for file, content in contents if name in content}


def _folders_by_name(name: str) -> set[str]:
    """Folders that are called as a task, or as it begins."""
    return {folder.name for folder in FOLDER.iterdir() if folder.is_dir() and name.startswith(folder.name)}


def _defining_folders(name: str) -> set[str]:
    """Folders with a file that gives the name to a task or a group."""
    return _folders_with(name, rb"(?m)^[\"']?(task|group)[\"']?\s*:\s*[\"']?%s[\"']?\s*$")


def _mentioning_folders(name: str) -> set[str]:
    """Folders with a file that has the name in it, be it as a tag."""
    return _folders_with(name, rb"(?<![\w-])%s(?![\w-])")


def _folders_with(name: str, pattern: bytes) -> set[str]:
    search = re.compile(pattern % re.escape(name.encode())).search
    found = {file.relative_to(FOLDER).parts[0] for file, text in _files_with(name.encode()).items() if search(text)}
    return {folder for folder in found if (FOLDER / folder).is_dir()}


def _known_names() -> list[str]:
    """Names to suggest: tasks of this package, and the tasks, groups and tags of lm-eval's files."""
    search = re.compile(rb"(?m)^[\"']?(?:task|group|tag)[\"']?\s*:\s*[\"']?([\w.-]+)[\"']?\s*$").findall
    names = {name.decode() for file in _files() for name in search(file.read_bytes())}
    return [*OWN_TASKS, *sorted(names - {"null"})]


@contextmanager
def quiet_harness() -> Iterator[None]:
    """Within the block, lm-eval says errors only: it warns of every default that a task leaves to it."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
