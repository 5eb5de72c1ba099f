"""Records as they lie in files and datasets, and what happens to bad ones."""

import json
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from tnl.data.settings import DatasetInstructions, DatasetSource, RecordSource
from tnl.errors import DataError
from tnl.settings import Settings

BOM = b"\xef\xbb\xbf"
_NOT_CORPUS = {"site-packages", "dist-packages", "__pycache__"}
_SHOWN_CHARACTERS = 80
_MESSAGES_KEPT = 5


@dataclass
class SourceCounts:
    """What one pass over a source met: records good, empty and bad, and the first messages about bad ones."""

    documents: int = 0
    empty: int = 0
    bad: int = 0
    messages: list[str] = field(default_factory=list)


def show(data: str | bytes) -> str:
    """The first characters of foreign data, escaped to printable ASCII, for an error text."""
    escaped = ascii(data[:_SHOWN_CHARACTERS])
    shown = escaped[:_SHOWN_CHARACTERS]
    return shown if len(data) <= _SHOWN_CHARACTERS and shown == escaped else shown + "..."


def bad_record(source: Settings, counts: SourceCounts, message: str, cure: str) -> None:
    """Count one bad record, or raise `DataError` for it when the user did not ask to skip."""
    if isinstance(source, RecordSource) and source.on_bad == "error":
        raise DataError(f"{message}; {cure} or set {source.section}.on_bad: skip{source.skip_hint}")
    counts.bad += 1
    if len(counts.messages) < _MESSAGES_KEPT:
        counts.messages.append(message)


def check_bad_fraction(source: RecordSource, counts: SourceCounts) -> None:
    """Raise `DataError` when more than ``max_bad_fraction`` of all records were bad."""
    records = counts.documents + counts.empty + counts.bad
    if counts.bad > source.max_bad_fraction * records:
        raise DataError(
            f"{source.path}: {counts.bad} of {records} records are bad, more than {source.section}.max_bad_fraction "
            f"{source.max_bad_fraction}; the first: {counts.messages[0]}"
        )


def decode(source: Settings, counts: SourceCounts, where: str, offset: int, data: bytes) -> str | None:
    """Text of UTF-8 ``data`` that starts at byte ``offset`` of its file; None when it was counted as bad."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        position = offset + error.start
        bad_record(
            source,
            counts,
            f"{where}: not UTF-8 at byte {position}: {show(data[error.start : error.start + 16])}",
            "convert it to UTF-8",
        )
        return None


def files_below(path: str, suffixes: list[str], section: str = "source") -> tuple[Path, list[Path]]:
    """The folder that names are relative to, and the files: ``path`` itself or those below it, sorted by name.

    Raises `DataError`, which calls the setting ``section``.path.
    """
    root = Path(path)
    try:
        if root.is_file():
            return root.parent, [root]
        found = root.is_dir()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); correct {section}.path") from error
    if not found:
        raise DataError(f"{path}: no such file or folder; correct {section}.path")
    files = [file for file in root.rglob("*") if file.suffix in suffixes and file.is_file()]
    if not files:
        raise DataError(f"{path}: no file with suffix {', '.join(suffixes)}; correct {section}.path or the suffixes")
    return root, sorted(files, key=lambda file: file.relative_to(root).as_posix())


def stdlib_folder() -> Path:
    """Where this Python keeps its standard library."""
    return Path(sysconfig.get_path("stdlib"))


def stdlib_files() -> tuple[Path, list[Path]]:
    """As `files_below`, of the standard library without what was installed into it."""
    root, files = files_below(str(stdlib_folder()), [".py"])
    return root, [file for file in files if not _NOT_CORPUS & set(file.relative_to(root).parts)]


def parse_record(text: str) -> object:
    """The value of one JSON text; raises ValueError or RecursionError, for NaN and keys that stand twice, too."""
    return DECODER.decode(text)


def _reject_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _object_without_duplicates(pairs: list[tuple[str, object]]) -> dict:
    record = dict(pairs)
    if len(record) != len(pairs):
        raise ValueError("a key stands twice")
    return record


DECODER = json.JSONDecoder(parse_constant=_reject_constant, object_pairs_hook=_object_without_duplicates)


def encodable(name: str, text: object) -> str:
    """``text`` if it is one that UTF-8 can hold; raises ValueError that says what is wrong with ``name`` otherwise."""
    if not isinstance(text, str):
        raise ValueError(f"{name} must be a string, found {type(text).__name__}")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"{name} holds half of a surrogate pair at character {error.start}") from error
    return text


def jsonl_lines(source: RecordSource, counts: SourceCounts, file: Path) -> Iterator[tuple[int, int, bytes]]:
    """``(line number, byte offset, line)``, split at newline bytes only: U+2028 and others stay inside a record."""
    limit = source.max_document_bytes
    with file.open("rb") as stream:
        number, offset = 0, 0
        while line := stream.readline(limit + 1):
            number += 1
            size = len(line)
            if size > limit and not line.endswith(b"\n"):
                while not line.endswith(b"\n") and (line := stream.readline(limit + 1)):
                    size += len(line)
                bad_record(
                    source,
                    counts,
                    f"{file}:{number}: {size} bytes, more than {source.section}.max_document_bytes {limit} "
                    f"(byte {offset})",
                    "split the record, raise the limit",
                )
            elif number == 1 and line.startswith(BOM):
                yield number, len(BOM), line[len(BOM) :]
            else:
                yield number, offset, line
            offset += size


def jsonl_records(
    source: RecordSource, counts: SourceCounts, file: Path, cure: str
) -> Iterator[tuple[int, int, str, object]]:
    """``(line number, byte offset, line, value)`` of each line that is not blank and is JSON; others are bad records.

    Raises `DataError`, also for a file that cannot be read.
    """
    try:
        for number, offset, line in jsonl_lines(source, counts, file):
            if not line.strip():
                continue
            where = f"{file}:{number}"
            text = decode(source, counts, where, offset, line.rstrip(b"\r\n"))
            if text is None:
                continue
            try:
                record = parse_record(text)
            except (ValueError, RecursionError) as error:
                inside = len(text[: error.pos].encode()) if isinstance(error, json.JSONDecodeError) else 0
                what = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
                bad_record(source, counts, f"{where}: {what} (byte {offset + inside}): {show(text.strip())}", cure)
                continue
            yield number, offset, text, record
    except OSError as error:
        raise DataError(f"{file}: cannot be read ({error.strerror}); make it readable") from error


def dataset_rows(source: DatasetSource | DatasetInstructions) -> Iterator[dict]:
    """The rows of a dataset in order; raises `DataError` when they cannot be had."""
    rows = _dataset_rows(source)
    while True:
        # The library and those below it raise dozens of types for one fact: these rows cannot be had.
        try:
            row = next(rows, None)
        except Exception as error:
            keys = ", ".join(f"{source.section}.{name}" for name in ("path", "config"))
            raise DataError(
                f"{source.path}: cannot read split {show(source.split)} ({type(error).__name__}: {show(str(error))}); "
                f"check {keys} and {source.section}.split; without network give a local folder"
            ) from error
        if row is None:
            return
        yield row


def _dataset_rows(source: DatasetSource | DatasetInstructions) -> Iterator[dict]:
    # Imported here: it takes seconds, and the other sources do not need it.
    import datasets

    if any((Path(source.path) / name).is_file() for name in ("dataset_dict.json", "state.json")):
        rows = datasets.load_from_disk(source.path)
        rows = rows[source.split] if isinstance(rows, datasets.DatasetDict) else rows
    else:
        rows = datasets.load_dataset(source.path, name=source.config, split=source.split, streaming=source.streaming)
    yield from rows
