"""Documents, in a fixed order, from files, JSON Lines, datasets and Python's standard library."""

import json
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from tnl.data.settings import DatasetSource, JsonlSource, Source, StdlibSource, TextSource, UserSource
from tnl.errors import DataError

_BOM = b"\xef\xbb\xbf"
_NOT_CORPUS = {"site-packages", "dist-packages", "__pycache__"}
_JSONL = [".jsonl"]
_SHOWN_CHARACTERS = 80
_MESSAGES_KEPT = 5


@dataclass
class SourceCounts:
    """What one pass over a source met: records good, empty and bad, and the first messages about bad ones."""

    documents: int = 0
    empty: int = 0
    bad: int = 0
    messages: list[str] = field(default_factory=list)


def iterate_documents(source: Source, counts: SourceCounts) -> Iterator[tuple[str, str]]:
    """Yield ``(name, text)`` of each document that is not blank, in an order that depends on the source alone.

    ``counts`` is updated while iterating. Raises `DataError` for a source that is missing, malformed (see
    `tnl.data.settings.UserSource`), beyond its ``max_bad_fraction``, or without a single document.
    """
    for name, text in _READERS[type(source)](source, counts):
        if not text or text.isspace():
            counts.empty += 1
            continue
        counts.documents += 1
        yield name, text
    if isinstance(source, UserSource):
        records = counts.documents + counts.empty + counts.bad
        if counts.bad > source.max_bad_fraction * records:
            raise DataError(
                f"{source.path}: {counts.bad} of {records} records are bad, more than source.max_bad_fraction "
                f"{source.max_bad_fraction}; the first: {counts.messages[0]}"
            )
    if counts.documents == 0:
        where = source.path if isinstance(source, UserSource) else _stdlib_folder()
        raise DataError(
            f"{where}: no document with text ({counts.empty} empty, {counts.bad} bad); check source.path and its text"
        )


def show(data: str | bytes) -> str:
    """The first characters of foreign data, escaped to printable ASCII, for an error text."""
    escaped = ascii(data[:_SHOWN_CHARACTERS])
    shown = escaped[:_SHOWN_CHARACTERS]
    return shown if len(data) <= _SHOWN_CHARACTERS and shown == escaped else shown + "..."


def _bad(source: UserSource | StdlibSource, counts: SourceCounts, message: str, cure: str) -> None:
    """Count one bad record, or raise for it when the user did not ask to skip."""
    if isinstance(source, UserSource) and source.on_bad == "error":
        raise DataError(f"{message}; {cure} or set source.on_bad: skip (of tnl quickstart: --on-bad skip)")
    counts.bad += 1
    if len(counts.messages) < _MESSAGES_KEPT:
        counts.messages.append(message)


def _decode(
    source: UserSource | StdlibSource, counts: SourceCounts, where: str, offset: int, data: bytes
) -> str | None:
    """Text of UTF-8 ``data`` that starts at byte ``offset`` of its file; None when it was counted as bad."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        position = offset + error.start
        _bad(
            source,
            counts,
            f"{where}: not UTF-8 at byte {position}: {show(data[error.start : error.start + 16])}",
            "convert it to UTF-8",
        )
        return None


def _read_text(
    source: TextSource | StdlibSource, counts: SourceCounts, root: Path, files: list[Path]
) -> Iterator[tuple[str, str]]:
    limit = source.max_document_bytes if isinstance(source, UserSource) else None
    for file in files:
        name = file.relative_to(root).as_posix()
        try:
            if limit is not None and file.stat().st_size > limit:
                _bad(
                    source,
                    counts,
                    f"{file}: {file.stat().st_size} bytes, more than source.max_document_bytes {limit}",
                    "split the file, raise the limit",
                )
                continue
            data = file.read_bytes()
        except OSError as error:
            _bad(source, counts, f"{file}: cannot be read ({error.strerror})", "make it readable")
            continue
        body = data.removeprefix(_BOM)
        text = _decode(source, counts, str(file), len(data) - len(body), body)
        if text is not None:
            yield name, text


def _files_below(path: str, suffixes: list[str]) -> tuple[Path, list[Path]]:
    """The folder that names are relative to, and the files: ``path`` itself or those below it, sorted by name."""
    root = Path(path)
    try:
        if root.is_file():
            return root.parent, [root]
        found = root.is_dir()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); correct source.path") from error
    if not found:
        raise DataError(f"{path}: no such file or folder; correct source.path")
    files = [file for file in root.rglob("*") if file.suffix in suffixes and file.is_file()]
    if not files:
        raise DataError(f"{path}: no file with suffix {', '.join(suffixes)}; correct source.path or the suffixes")
    return root, sorted(files, key=lambda file: file.relative_to(root).as_posix())


def local_size(source: Source) -> tuple[int, int] | None:
    """Number of files and their total bytes as they are now, 0 of both for a source that is gone; None for a dataset,
    whose size is not known without reading it."""
    try:
        match source:
            case TextSource():
                _, files = _files_below(source.path, source.suffixes)
            case JsonlSource():
                _, files = _files_below(source.path, _JSONL)
            case StdlibSource():
                _, files = _stdlib_files()
            case _:
                return None
    except DataError:
        return 0, 0
    return len(files), sum(file.stat().st_size for file in files)


def _text_documents(source: TextSource, counts: SourceCounts) -> Iterator[tuple[str, str]]:
    return _read_text(source, counts, *_files_below(source.path, source.suffixes))


def _stdlib_folder() -> Path:
    return Path(sysconfig.get_path("stdlib"))


def _stdlib_files() -> tuple[Path, list[Path]]:
    """As `_files_below`, without what was installed into the library."""
    root, files = _files_below(str(_stdlib_folder()), [".py"])
    return root, [file for file in files if not _NOT_CORPUS & set(file.relative_to(root).parts)]


def _stdlib_documents(source: StdlibSource, counts: SourceCounts) -> Iterator[tuple[str, str]]:
    return _read_text(source, counts, *_stdlib_files())


def _reject_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _object_without_duplicates(pairs: list[tuple[str, object]]) -> dict:
    record = dict(pairs)
    if len(record) != len(pairs):
        raise ValueError("a key stands twice")
    return record


def _text_of(record: object, text_field: str) -> str:
    """The text of one record; raises ValueError with what is wrong."""
    if not isinstance(record, dict):
        raise ValueError(f"a record must be an object, found {type(record).__name__}")
    if text_field not in record:
        raise ValueError(f"no field {show(text_field)}, found {show(', '.join(map(str, record)))}")
    text = record[text_field]
    if not isinstance(text, str):
        raise ValueError(f"field {show(text_field)} must be a string, found {type(text).__name__}")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"field {show(text_field)} holds half of a surrogate pair at character {error.start}"
        ) from error
    return text


def _jsonl_lines(source: JsonlSource, counts: SourceCounts, file: Path) -> Iterator[tuple[int, int, bytes]]:
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
                _bad(
                    source,
                    counts,
                    f"{file}:{number}: {size} bytes, more than source.max_document_bytes {limit} (byte {offset})",
                    "split the record, raise the limit",
                )
            elif number == 1 and line.startswith(_BOM):
                yield number, len(_BOM), line[len(_BOM) :]
            else:
                yield number, offset, line
            offset += size


def _jsonl_documents(source: JsonlSource, counts: SourceCounts) -> Iterator[tuple[str, str]]:
    root, files = _files_below(source.path, _JSONL)
    for file in files:
        try:
            for number, offset, line in _jsonl_lines(source, counts, file):
                if not line.strip():
                    continue
                where = f"{file}:{number}"
                text = _decode(source, counts, where, offset, line.rstrip(b"\r\n"))
                if text is None:
                    continue
                try:
                    record = json.loads(
                        text, parse_constant=_reject_constant, object_pairs_hook=_object_without_duplicates
                    )
                    document = _text_of(record, source.text_field)
                except (ValueError, RecursionError) as error:
                    inside = len(text[: error.pos].encode()) if isinstance(error, json.JSONDecodeError) else 0
                    what = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
                    _bad(
                        source,
                        counts,
                        f"{where}: {what} (byte {offset + inside}): {show(text.strip())}",
                        "correct the line or source.text_field",
                    )
                    continue
                yield f"{file.relative_to(root).as_posix()}:{number}", document
        except OSError as error:
            raise DataError(f"{file}: cannot be read ({error.strerror}); make it readable") from error


def _dataset_rows(source: DatasetSource) -> Iterator[dict]:
    # Imported here: it takes seconds, and the other sources do not need it.
    import datasets

    if any((Path(source.path) / name).is_file() for name in ("dataset_dict.json", "state.json")):
        rows = datasets.load_from_disk(source.path)
        rows = rows[source.split] if isinstance(rows, datasets.DatasetDict) else rows
    else:
        rows = datasets.load_dataset(source.path, name=source.config, split=source.split, streaming=source.streaming)
    yield from rows


def _dataset_documents(source: DatasetSource, counts: SourceCounts) -> Iterator[tuple[str, str]]:
    rows = enumerate(_dataset_rows(source))
    while True:
        # The library and those below it raise dozens of types for one fact: these rows cannot be had.
        try:
            i, row = next(rows, (-1, None))
        except Exception as error:
            raise DataError(
                f"{source.path}: cannot read split {show(source.split)} ({type(error).__name__}: {show(str(error))}); "
                "check source.path, source.config and source.split; without network give a local folder"
            ) from error
        if row is None:
            return
        where = f"{source.path}: row {i} of {source.split}"
        try:
            text = _text_of(row, source.text_field)
        except ValueError as error:
            _bad(source, counts, f"{where}: {error}", "correct the row or source.text_field")
            continue
        if len(text.encode()) > source.max_document_bytes:
            limit = f"source.max_document_bytes {source.max_document_bytes}"
            _bad(source, counts, f"{where}: more than {limit}", "split the row, raise the limit")
            continue
        yield f"{source.split}:{i}", text


_READERS = {
    TextSource: _text_documents,
    JsonlSource: _jsonl_documents,
    DatasetSource: _dataset_documents,
    StdlibSource: _stdlib_documents,
}
