"""Requests of lm-eval, without its tasks."""

import random

import pytest
from lm_eval.api.instance import Instance

_TEXT = "def return self value for in range print the of a state decay 12 345 ( ) : = +"
WORDS = _TEXT.split()


def words(draw: random.Random, count: int) -> str:
    """Text of ``count`` words that the tiny tokenizers know."""
    return " ".join(draw.choices(WORDS, k=count))


def requests(kind: str, arguments: list[tuple]) -> list[Instance]:
    """A request of each tuple of arguments."""
    return [Instance(kind, {}, args, 0, metadata=("tiny", i, 1)) for i, args in enumerate(arguments)]


def multiple_choice(
    num_prefixes: int, num_questions: int, prefix: int, question: int, choices: tuple[str, ...]
) -> list[Instance]:
    """Questions of so many words behind few-shot prefixes of so many words, each asked with every choice."""
    draw = random.Random(0)
    pairs = []
    for _ in range(num_prefixes):
        shots = words(draw, prefix)
        for _ in range(num_questions):
            context = f"{shots}\n{words(draw, question)}" if prefix else words(draw, question)
            pairs += [(context, choice) for choice in choices]
    return requests("loglikelihood", pairs)


def assert_same_scores(actual: list[tuple[float, bool]], expected: list[tuple[float, bool]]) -> None:
    """Log-likelihoods to 1e-4, and greedy flags."""
    assert [greedy for _, greedy in actual] == [greedy for _, greedy in expected]
    assert [score for score, _ in actual] == pytest.approx([score for score, _ in expected], abs=1e-4, rel=0)
