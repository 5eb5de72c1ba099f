"""Which part of a source a document comes from, and where each part's documents stand in a split."""

from collections.abc import Iterable

from tnl.data.settings import JsonlSource, Source, TextSource

MAX_NAMES = 64  # that are told apart
SOURCE_LOSS = "loss/"  # before a name, in the metrics of a run
# Documents one after the other of the same part: its name, and how many.
Runs = list[tuple[str, int]]


def source_name(source: Source, document: str) -> str:
    """The part of ``source`` that a document is from: the first folder in the path of its file, or for JSON Lines
    without folders the file; of other sources there is one part.

    Args:
        document: its name, as `tnl.data.sources.iterate_documents` gives it.
    """
    if not isinstance(source, TextSource | JsonlSource):
        return source.kind
    folder, slash, _ = document.partition("/")
    if slash:
        return folder
    return document.rpartition(".jsonl:")[0] if isinstance(source, JsonlSource) else "files"


def runs_of(names: Iterable[str]) -> Runs:
    """``names`` of documents, run-length encoded; empty where there is one name only, or more than `MAX_NAMES`."""
    runs: Runs = []
    for name in names:
        if runs and runs[-1][0] == name:
            runs[-1] = name, runs[-1][1] + 1
        else:
            runs.append((name, 1))
    return runs if 1 < len({name for name, _ in runs}) <= MAX_NAMES else []
