"""Answers of no text: a template or stop texts that do not fit a model look the same as a model that does not know."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

SHOWN = 5
CURE = "and give --allow-empty to count them as wrong"


@dataclass(frozen=True)
class EmptyAnswers:
    """Of a task.

    Attributes:
        documents: ids of those with an answer that is empty or blank, in their order.
        total: number of the documents.
    """

    documents: tuple[int, ...]
    total: int

    def reason(self, task: str) -> str:
        """What is wrong, and what to do."""
        return (
            f"{task}: the answers to {len(self.documents)} of {self.total} documents are empty (doc_id "
            f"{_first(self.documents)}); look at them in prompts/{task}.jsonl, {CURE}"
        )


def empty_answers(samples: Sequence[Mapping[str, Any]]) -> EmptyAnswers:
    """Find them among the samples that lm-eval logs: one for each document and filter, whose ``resps`` hold the answers
    to every request as the model gave them."""
    documents = {sample["doc_id"]: [answer for answers in sample["resps"] for answer in answers] for sample in samples}
    empty = [doc_id for doc_id, answers in documents.items() if any(map(_is_empty, answers))]
    return EmptyAnswers(tuple(sorted(empty)), len(documents))


def group_reason(group: str, tasks: Sequence[str], size: int) -> str:
    """What is wrong with a group of ``size`` tasks of which these have empty answers."""
    return (
        f"{group}: {len(tasks)} of its {size} tasks have empty answers ({_first(tasks)}); look at them in prompts/, "
        f"{CURE}"
    )


def _is_empty(answer: Any) -> bool:
    """A log-likelihood is no text."""
    return isinstance(answer, str) and not answer.strip()


def _first(items: Sequence) -> str:
    return ", ".join(map(str, items[:SHOWN])) + (", ..." if len(items) > SHOWN else "")
