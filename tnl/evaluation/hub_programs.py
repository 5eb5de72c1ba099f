"""Metrics that are programs of the hub: the library `evaluate` downloads and runs them, here only when told so."""

from collections.abc import Iterator
from contextlib import contextmanager

import evaluate

from tnl.errors import DataError


@contextmanager
def hub_programs(*, allowed: bool) -> Iterator[None]:
    """Within the block, `evaluate.load` runs nothing unless ``allowed``.

    Raises:
        DataError: at its end, if a program was asked for and refused, also where lm-eval made light of that.
    """
    if allowed:
        yield
        return
    refused: list[str] = []

    def load(path: str, *_, **__) -> None:
        refused.append(path)
        raise DataError(_message(path))

    original, evaluate.load = evaluate.load, load
    try:
        yield
    finally:
        evaluate.load = original
    if refused:
        raise DataError(_message(refused[0]))


def _message(path: str) -> str:
    return f"its metric {path} is a program of the hub, which is not run without --confirm-unsafe; leave the task out"
