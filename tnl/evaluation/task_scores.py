"""From what lm-eval hands back to scores with standard errors: of tasks, of groups, and of texts per token."""

import math
import random
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from lm_eval.api.metrics import bits_per_byte, mean, perplexity, pooled_sample_stderr, weighted_perplexity
from lm_eval.api.task import Task

from tnl.errors import NonFiniteError
from tnl.evaluation.request_tokens import RequestTokens
from tnl.evaluation.standard_error import ratio, standard_error

BOOTSTRAPS = 200
TOKEN, WORD, BYTE = "token", "word", "byte"
TOKEN_PERPLEXITY = f"{TOKEN}_perplexity"  # that this package adds


@dataclass(frozen=True)
class Score:
    """One metric of one task or group.

    Attributes:
        metric: as lm-eval calls it, with its filter where that is not ``none``.
        stderr: standard error of ``value``; None where there is one document only.
        num_documents: that were scored.
        num_parts: tasks of a group; 1 of a task.
    """

    task: str
    metric: str
    value: float
    stderr: float | None
    num_documents: int
    num_fewshot: int
    version: str
    higher_is_better: bool | None = None
    num_parts: int = 1


@dataclass(frozen=True)
class TextLoss:
    """Loss of the texts of one task per token, word or byte; nats, with its standard error over documents."""

    task: str
    unit: str
    nats: float
    stderr: float | None
    count: int

    @property
    def bits(self) -> float:
        """The loss in bits."""
        return self.nats / math.log(2)

    @property
    def perplexity(self) -> float:
        """exp of the loss in nats."""
        return math.exp(self.nats)

    def score(self, like: Score) -> Score:
        """The perplexity as a score of the task that ``like`` is of."""
        stderr = None if self.stderr is None else self.stderr * self.perplexity
        name = f"{self.unit}_perplexity"
        return Score(
            self.task, name, self.perplexity, stderr, like.num_documents, like.num_fewshot, like.version, False
        )


def metric_names(task: Task) -> list[str]:
    """What `task_scores` and `text_losses` call the metrics of a task."""
    names = [_named(metric, kept.name) for metric in task.aggregation() for kept in task._filters]
    of_texts = [f"{unit}_perplexity" for unit in (TOKEN, WORD, BYTE)]
    return names + [name for name in of_texts if {"perplexity", "word_perplexity"} & {*names} and name not in names]


def _named(metric: str, kept: str) -> str:
    """A metric with its filter ``kept``."""
    return metric if kept == "none" else f"{metric} ({kept})"


def task_scores(task: Task, samples: Sequence[dict[str, Any]]) -> list[Score]:
    """Every metric of a task.

    Args:
        samples: what `lm_eval.evaluate` logged of it.

    Raises:
        NonFiniteError: a score is not finite.
    """
    values: dict[tuple[str, str], list] = {}
    for sample in samples:
        for metric in sample["metrics"]:
            values.setdefault((metric, sample["filter"]), []).append(sample[metric])
    found = []
    aggregations, better = task.aggregation(), task.higher_is_better() or {}
    for (metric, kept), items in values.items():
        aggregate = aggregations.get(metric, mean)
        value = float(aggregate(items))
        name = _named(metric, kept)
        if not math.isfinite(value):
            raise NonFiniteError(f"{task.task_name}: {name} is {value}; evaluate in float32, or another checkpoint")
        found.append(
            Score(
                task=task.task_name,
                metric=name,
                value=value,
                stderr=metric_error(aggregate, items),
                num_documents=len(items),
                num_fewshot=task.get_config("num_fewshot") or 0,
                version=str(task.VERSION),
                higher_is_better=better.get(metric),
            )
        )
    return found


def metric_error(aggregate: Callable, items: Sequence[Any]) -> float | None:
    """Of a metric over documents: in closed form for means, perplexities and bits, else by `BOOTSTRAPS` resamplings."""
    if len(items) < 2:
        return None
    if aggregate is mean:
        return standard_error(items)
    if aggregate is perplexity:
        return aggregate(items) * standard_error(items)
    if aggregate in (weighted_perplexity, bits_per_byte):
        nats, stderr = ratio([-item[0] for item in items], [item[1] for item in items])
        return stderr / math.log(2) if aggregate is bits_per_byte else stderr * math.exp(nats)
    draw = random.Random(0)
    with warnings.catch_warnings(action="ignore"):  # of one resampling of a few documents or another
        values = [aggregate(draw.choices(items, k=len(items))) for _ in range(BOOTSTRAPS)]
    return float(np.std(values, ddof=1))


def group_scores(name: str, parts: Sequence[Sequence[Score]], weights: dict[str, bool]) -> list[Score]:
    """Means over the tasks of a group, of the metrics that all of them have and of which a mean makes sense.

    Args:
        parts: the scores of each task.
        weights: by metric, whether documents count alike and not tasks; documents do where nothing is said.
    """
    found = []
    for metric in dict.fromkeys(score.metric for score in parts[0]):
        scores = [score for part in parts for score in part if score.metric == metric]
        if len(scores) < len(parts) or "perplexity" in metric or metric == "bits_per_byte":
            continue
        sizes = [score.num_documents for score in scores]
        by_size = weights.get(metric, True)
        counted = sizes if by_size else [1] * len(sizes)
        value = float(np.average([score.value for score in scores], weights=counted))
        errors = [score.stderr for score in scores]
        stderr = None
        if None not in errors:
            if by_size:
                stderr = float(pooled_sample_stderr(errors, sizes))
            else:
                stderr = float(np.sqrt(np.square(errors).sum()) / len(errors))
        first = scores[0]
        found.append(
            Score(
                task=name,
                metric=metric,
                value=value,
                stderr=stderr,
                num_documents=sum(sizes),
                num_fewshot=first.num_fewshot,
                version=first.version,
                higher_is_better=first.higher_is_better,
                num_parts=len(parts),
            )
        )
    return found


def text_losses(task: str, samples: Sequence[dict[str, Any]], tokens: RequestTokens) -> list[TextLoss]:
    """Loss per token, word and byte of a task whose documents are texts to score, whole or behind a context.

    Words and bytes are counted as the task does, of its own text; those of a continuation are its own, the space before
    it included. Empty for tasks of another kind.
    """
    counts: dict[str, list[int]] = {TOKEN: [], WORD: [], BYTE: []}
    sums = []
    for sample in samples:
        arguments = sample["arguments"]
        if "word_perplexity" in sample:
            (text,) = arguments[0]
            nll, words = -sample["word_perplexity"][0], sample["word_perplexity"][1]
            num_bytes = sample["byte_perplexity"][1]
            num_tokens = len(tokens.encode([text])[text])
        elif "perplexity" in sample:
            context, text = arguments[0]
            nll, words, num_bytes = -sample["perplexity"], len(text.split()), len(text.encode())
            ((_, ids),) = tokens.encode_pairs([(context, text)], [task])
            num_tokens = len(ids)
        else:
            return []
        sums.append(nll)
        for unit, count in ((TOKEN, num_tokens), (WORD, words), (BYTE, num_bytes)):
            counts[unit].append(count)
    return [TextLoss(task, unit, *ratio(sums, found), sum(found)) for unit, found in counts.items()]
