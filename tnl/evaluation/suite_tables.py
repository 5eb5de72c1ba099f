"""The tables of an evaluation: our row beside the published ones, loss of texts by unit, all metrics of all tasks."""

import math
from collections.abc import Sequence

from tnl.errors import ConfigError, did_you_mean
from tnl.evaluation.score_tables import OURS, PUBLISHED, Cell, Row, Table
from tnl.evaluation.suite_settings import SuiteSettings, SuiteTask
from tnl.evaluation.task_scores import Score, TextLoss

HEADS = ("model", "parameters", "trained on")
UNITS = {"nats": 4, "bits": 4, "perplexity": 3}


def find_metric(name: str, known: Sequence[str], task: str) -> str:
    """The metric of a task that is called ``name``, the first of its filters where it has several.

    Raises:
        ConfigError: there is none.
    """
    if name in known:
        return name
    filtered = [metric for metric in known if metric.startswith(f"{name} (")]
    if not filtered:
        raise ConfigError(f"{task}: no metric {name!r}, {did_you_mean(name, known)}")
    return filtered[0]


def suite_table(
    suite: SuiteSettings, ours: tuple[str, str], source: str, scores: dict[str, list[Score]], sizes: dict[str, int]
) -> Table:
    """The table of a suite.

    Args:
        ours: name and parameters of the model.
        source: what is to be known of our row.
        scores: by task of the suite; one that was not measured is missing.
        sizes: how many tasks each of them stands for.
    """
    cells: dict[str, Cell] = {}
    for task in suite.tasks:
        if task.task in scores:
            cells[task.column] = _cell(task, scores[task.task], sizes[task.task])
    for average in suite.averages:
        parts = [cells[column] for column in average.of if column in cells]
        if len(parts) == len(average.of):
            cells[average.column] = _mean(parts)
    rows = [Row((*ours, "-"), cells, OURS, source)]
    rows += [
        Row((row.model, row.parameters, row.tokens or "-"), _published(row.scores), PUBLISHED, row.source)
        for row in suite.published
    ]
    return Table(suite.title, HEADS, tuple(suite.columns), tuple(rows), suite.notes)


def _published(scores: dict[str, float]) -> dict[str, Cell]:
    return {column: Cell(value) for column, value in scores.items()}


def _cell(task: SuiteTask, scores: list[Score], size: int) -> Cell:
    metric = find_metric(task.metric, [score.metric for score in scores], task.task)
    score = next(score for score in scores if score.metric == metric)
    scale = 100 if task.unit == "percent" else 1
    return Cell(scale * score.value, None if score.stderr is None else scale * score.stderr, _partial(score, size))


def _partial(score: Score, size: int) -> str:
    """What must be known of a group that was measured in part."""
    return f"of {score.num_parts} of {size} tasks only" if score.num_parts < size else ""


def _mean(cells: Sequence[Cell]) -> Cell:
    """Of independent numbers."""
    errors = [cell.stderr for cell in cells]
    stderr = None if None in errors else math.sqrt(sum(error**2 for error in errors)) / len(cells)
    return Cell(sum(cell.value for cell in cells) / len(cells), stderr, "; ".join(c.note for c in cells if c.note))


def losses_table(losses: Sequence[TextLoss], source: str) -> Table:
    """Loss of texts per token, word and byte: in nats, in bits, and as perplexity."""
    rows = []
    for loss in losses:
        errors = [None] * 3 if loss.stderr is None else _errors(loss)
        values = (loss.nats, loss.bits, loss.perplexity)
        cells = {unit: Cell(value, error) for unit, value, error in zip(UNITS, values, errors, strict=True)}
        rows.append(Row((loss.task, f"per {loss.unit}", f"{loss.count:,}"), cells, OURS, source))
    return Table("Loss of texts", ("text", "unit", "units"), tuple(UNITS), tuple(rows), (), UNITS)


def _errors(loss: TextLoss) -> list[float]:
    return [loss.stderr, loss.stderr / math.log(2), loss.stderr * loss.perplexity]


def scores_table(
    title: str, scores: Sequence[Score], source: str, *, sizes: dict[str, int] | None = None, is_detail: bool = False
) -> Table:
    """Every metric as lm-eval gives it, one a row.

    Args:
        sizes: how many tasks each name stands for, where that is not one.
    """
    heads = ("task", "metric", "examples", "documents", "version")
    rows = tuple(
        Row(
            (score.task, score.metric, str(score.num_fewshot), f"{score.num_documents:,}", score.version),
            {"value": Cell(score.value, score.stderr, _partial(score, (sizes or {}).get(score.task, 1)))},
            OURS,
            source,
        )
        for score in scores
    )
    return Table(title, heads, ("value",), rows, (), {"value": 4}, is_detail)
