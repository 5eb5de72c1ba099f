"""An evaluation: tasks by name, built from local data, asked of a model through lm-eval, and scored."""

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lm_eval
import numpy as np
import torch
from lm_eval.api.task import Task

from tnl.errors import ConfigError, DataError, NonFiniteError
from tnl.evaluation.empty_answers import EmptyAnswers, empty_answers, group_reason
from tnl.evaluation.harness_model import HarnessModel
from tnl.evaluation.hub_programs import hub_programs
from tnl.evaluation.request_tokens import RequestTokens
from tnl.evaluation.suite_tables import find_metric
from tnl.evaluation.task_data import MissingDataError, without_network
from tnl.evaluation.task_library import Leaf, Selection, TaskLibrary, quiet_harness
from tnl.evaluation.task_scores import (
    TOKEN_PERPLEXITY,
    Score,
    TextLoss,
    group_scores,
    metric_names,
    task_scores,
    text_losses,
)
from tnl.files import write_atomically

# As lm-eval has them.
SEEDS = {"random": 0, "numpy": 1234, "torch": 1234, "fewshot": 1234}


@dataclass(frozen=True)
class Wanted:
    """A name that is to be measured, the examples before each question, the metrics that are needed of it, and whether
    an empty text is an answer."""

    name: str
    num_fewshot: int | None = None
    metrics: tuple[str, ...] = ()
    allow_empty: bool = False


@dataclass
class Plan:
    """What can be measured.

    Attributes:
        selections: what each wanted name stands for.
        tasks: those with data, by name.
        allow_empty: names of those of which an empty text is an answer, if a wrong one.
        missing: wanted name -> why it, or a part of it, cannot be measured.
    """

    selections: dict[str, Selection] = field(default_factory=dict)
    tasks: dict[str, Task] = field(default_factory=dict)
    allow_empty: set[str] = field(default_factory=set)
    missing: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Measured:
    """Scores by wanted name, those of all single tasks, the losses of texts, the empty answers of tasks that have some,
    and by wanted name why it, or a part of it, has no score."""

    scores: dict[str, list[Score]]
    details: list[Score]
    losses: list[TextLoss]
    empty: dict[str, EmptyAnswers]
    missing: dict[str, str]


def plan(library: TaskLibrary, wanted: Sequence[Wanted], *, confirm_unsafe: bool) -> Plan:
    """Find and build the tasks, before any model is loaded.

    Raises:
        ConfigError: no such task or metric, a task that runs generated code without being confirmed, or one that is
            wanted in two ways.
    """
    found, ways = Plan(), {}
    for each in wanted:
        found.selections[each.name] = library.select(each.name)
        for leaf in found.selections[each.name].leaves:
            if library.is_unsafe(leaf) and not confirm_unsafe:
                raise ConfigError(
                    f"{leaf.name}: runs programs that the model writes, on this machine and as you; leave it out, or "
                    "start in a container without anything of value and give --confirm-unsafe"
                )
            changes = _changes(leaf, each)
            if ways.setdefault(leaf.name, changes) != changes:
                raise ConfigError(
                    f"{leaf.name}: wanted in two ways ({ways[leaf.name] or 'as it is'}, {changes or 'as it is'}); give "
                    "--few-shot or --allow-empty if that is all, or measure them one by one"
                )
            if each.allow_empty:
                found.allow_empty.add(leaf.name)
    for each in wanted:
        _build(library, each, found)
    return found


def _changes(leaf: Leaf, wanted: Wanted) -> dict[str, Any]:
    """What is not as the task itself has it, but names."""
    changes = {key: value for key, value in leaf.changes.items() if not key.endswith("alias")}
    if wanted.num_fewshot is not None:
        changes["num_fewshot"] = wanted.num_fewshot
    return changes | {"allow_empty": True} if wanted.allow_empty else changes


def _build(library: TaskLibrary, wanted: Wanted, found: Plan) -> None:
    """Add the tasks of one name to ``found.tasks``, and what it lacks to ``found.missing``."""
    selection = found.selections[wanted.name]
    absent: list[Leaf] = []
    for leaf in selection.leaves:
        if leaf.name in found.tasks:
            continue
        try:
            found.tasks[leaf.name] = library.build(leaf, wanted.num_fewshot)
        except MissingDataError as error:
            absent.append(leaf)
            reason = str(error)
        except DataError as error:
            found.missing[wanted.name] = str(error)
            continue
        else:
            for metric in wanted.metrics:
                find_metric(metric, metric_names(found.tasks[leaf.name]), leaf.name)
    if len(absent) > 1 or (absent and selection.is_group):
        names = ", ".join(leaf.name for leaf in absent[:3]) + (", ..." if len(absent) > 3 else "")
        reason = (
            f"{wanted.name}: {len(absent)} of its {len(selection.leaves)} tasks have no data ({names}); where there is "
            f"a network: tnl data fetch {wanted.name}"
        )
    if absent:
        found.missing[wanted.name] = reason


def measure(
    model: HarnessModel,
    tasks: Plan,
    *,
    limit: int | None,
    confirm_unsafe: bool,
    prompts: Path | None,
) -> Measured:
    """Ask the model and score its answers.

    Args:
        limit: of documents of each task.
        prompts: folder for a file of each task with every prompt, answer and score; None writes none.

    Raises:
        UserError: see `HarnessModel`; a score is not finite.
    """
    random.seed(SEEDS["random"])
    np.random.seed(SEEDS["numpy"])
    torch.manual_seed(SEEDS["torch"])
    for task in tasks.tasks.values():
        task.set_fewshot_seed(seed=SEEDS["fewshot"])
    # Some tasks load their metric when they are scored.
    with quiet_harness(), without_network(), hub_programs(allowed=confirm_unsafe):
        try:
            results = lm_eval.evaluate(
                model,
                {"tasks": dict(tasks.tasks)},
                limit=limit,
                bootstrap_iters=0,
                confirm_run_unsafe_code=confirm_unsafe,
            )
        except OverflowError:
            texts = [name for name, task in tasks.tasks.items() if TOKEN_PERPLEXITY in metric_names(task)]
            raise NonFiniteError(
                f"{', '.join(texts)}: a perplexity is beyond all numbers, as per word of a text without spaces; leave "
                "such texts out with --tasks, or evaluate another checkpoint"
            ) from None
    tokens = RequestTokens(model.tokenizer)
    single: dict[str, list[Score]] = {}
    losses: list[TextLoss] = []
    empty: dict[str, EmptyAnswers] = {}
    for name, task in tasks.tasks.items():
        samples = results["samples"][name]
        if prompts is not None:
            write_prompts(prompts / f"{name}.jsonl", samples)
        found = empty_answers(samples)
        if found.documents:
            empty[name] = found
            if name not in tasks.allow_empty:
                continue
        single[name] = task_scores(task, samples)
        of_texts = text_losses(name, samples, tokens)
        losses += of_texts
        there = {score.metric for score in single[name]}
        more = [loss.score(single[name][0]) for loss in of_texts]
        single[name] += [score for score in more if score.metric not in there]
    scores, missing = {}, dict(tasks.missing)
    for name, selection in tasks.selections.items():
        refused = [leaf.name for leaf in selection.leaves if leaf.name in empty and leaf.name not in single]
        if refused:
            size = len(selection.leaves)
            reason = group_reason(name, refused, size) if selection.is_group else empty[refused[0]].reason(refused[0])
            missing[name] = f"{missing[name]}; {reason}" if name in missing else reason
        parts = [single[leaf.name] for leaf in selection.leaves if leaf.name in single]
        if parts:
            whole = group_scores(name, parts, selection.weights) if selection.is_group else parts[0]
            # A group of which no mean makes sense stands for its tasks.
            scores[name] = whole or [score for part in parts for score in part]
    return Measured(scores, [score for found in single.values() for score in found], losses, empty, missing)


def write_prompts(file: Path, samples: Sequence[dict[str, Any]]) -> None:
    """One JSON object a line for every document: what the model was asked, what it answered, how that was scored."""
    file.parent.mkdir(parents=True, exist_ok=True)
    lines = []
    for sample in samples:
        arguments = sample["arguments"]
        line = {"doc_id": sample["doc_id"], "doc_hash": sample["doc_hash"], "filter": sample["filter"]}
        # A context that all requests of a document share stands there once.
        contexts = {args[0] for args in arguments}
        if len(contexts) == 1 and len(arguments) > 1:
            line |= {"context": arguments[0][0], "continuations": [args[1] for args in arguments]}
        else:
            line["requests"] = [list(args) for args in arguments]
        line |= {"target": sample["target"], "answers": sample["filtered_resps"]}
        texts = [answer for answers in sample["resps"] for answer in answers if isinstance(answer, str)]
        if texts:  # before the filter
            line["texts"] = texts
        line["scores"] = {metric: sample[metric] for metric in sample["metrics"]}
        lines.append(json.dumps(line, default=_plain))
    write_atomically(file, "".join(f"{line}\n" for line in lines))


def _plain(value: Any) -> Any:
    """A number or an array of numpy as JSON has it."""
    assert isinstance(value, np.generic | np.ndarray), type(value)
    return value.tolist()
