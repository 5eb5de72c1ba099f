"""Settings of a suite of `configs/evaluate`: its tasks, its table's columns, and the published rows beside ours."""

from typing import Literal

from pydantic import Field, model_validator

from tnl.errors import did_you_mean
from tnl.settings import Settings


class SuiteTask(Settings):
    """A task, or a group of them, and the column that its score fills."""

    task: str  # a name of lm-eval, or of the tasks that this package brings
    column: str
    metric: str
    num_fewshot: int = Field(0, ge=0)
    unit: Literal["percent", "raw"] = "percent"
    allow_empty: bool = False  # whether an empty text is an answer, if a wrong one


class Average(Settings):
    """A column that is the mean of others; it stays empty in a row that lacks one of them."""

    column: str
    of: tuple[str, ...]


class PublishedRow(Settings):
    """Scores that somebody published, by column, as they stand there."""

    model: str
    parameters: str
    tokens: str | None = None  # that it was trained on
    source: str
    scores: dict[str, float]


class SuiteSettings(Settings):
    """One suite."""

    title: str
    tasks: tuple[SuiteTask, ...]
    averages: tuple[Average, ...] = ()
    # Columns that no task of the suite fills, for published figures of other measurements.
    published_only: tuple[str, ...] = ()
    published: tuple[PublishedRow, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def columns(self) -> list[str]:
        """Names of all columns, in their order."""
        return [*(task.column for task in self.tasks), *(a.column for a in self.averages), *self.published_only]

    @model_validator(mode="after")
    def _check(self) -> "SuiteSettings":
        columns = self.columns
        problems = [] if self.tasks else ["tasks: none, give one or more"]
        problems += [
            f"tasks: the column {column} is there twice, name another"
            for column in dict.fromkeys(columns)
            if columns.count(column) > 1
        ]
        firsts: dict[str, SuiteTask] = {}
        for task in self.tasks:
            first = firsts.setdefault(task.task, task)
            problems += [
                f"tasks: {task.task} has two values of {key}, give one"
                for key in ("num_fewshot", "allow_empty")
                if getattr(first, key) != getattr(task, key)
            ]
        filled = [task.column for task in self.tasks]
        for average in self.averages:
            problems += [
                f"averages: no column {column}, {did_you_mean(column, filled)}"
                for column in average.of
                if column not in filled
            ]
        for i, row in enumerate(self.published):
            problems += [
                f"published.{i}.scores: no column {column}, {did_you_mean(column, columns)}"
                for column in row.scores
                if column not in columns
            ]
        if problems:
            raise ValueError("\n".join(problems))
        return self


class SpeedSettings(Settings):
    """Published figures of speed, of `configs/speed`."""

    title: str
    columns: tuple[str, ...]
    published: tuple[PublishedRow, ...]
    notes: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _check(self) -> "SpeedSettings":
        problems = [
            f"published.{i}.scores: no column {column}, {did_you_mean(column, self.columns)}"
            for i, row in enumerate(self.published)
            for column in row.scores
            if column not in self.columns
        ]
        if problems:
            raise ValueError("\n".join(problems))
        return self
