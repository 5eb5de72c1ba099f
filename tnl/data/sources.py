"""Documents, in a fixed order, from files, JSON Lines, datasets and Python's standard library."""

from collections.abc import Iterator
from pathlib import Path

from tnl.data.records import (
    BOM,
    SourceCounts,
    bad_record,
    check_bad_fraction,
    dataset_rows,
    decode,
    encodable,
    files_below,
    jsonl_records,
    show,
    stdlib_files,
    stdlib_folder,
)
from tnl.data.settings import DatasetSource, JsonlSource, Source, StdlibSource, TextSource, UserSource
from tnl.errors import DataError

_JSONL = [".jsonl"]


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
        check_bad_fraction(source, counts)
    if counts.documents == 0:
        where = source.path if isinstance(source, UserSource) else stdlib_folder()
        raise DataError(
            f"{where}: no document with text ({counts.empty} empty, {counts.bad} bad); check source.path and its text"
        )


def _read_text(
    source: TextSource | StdlibSource, counts: SourceCounts, root: Path, files: list[Path]
) -> Iterator[tuple[str, str]]:
    limit = source.max_document_bytes if isinstance(source, UserSource) else None
    for file in files:
        name = file.relative_to(root).as_posix()
        try:
            if limit is not None and file.stat().st_size > limit:
                bad_record(
                    source,
                    counts,
                    f"{file}: {file.stat().st_size} bytes, more than source.max_document_bytes {limit}",
                    "split the file, raise the limit",
                )
                continue
            data = file.read_bytes()
        except OSError as error:
            bad_record(source, counts, f"{file}: cannot be read ({error.strerror})", "make it readable")
            continue
        body = data.removeprefix(BOM)
        text = decode(source, counts, str(file), len(data) - len(body), body)
        if text is not None:
            yield name, text


def local_size(source: Source) -> tuple[int, int] | None:
    """Number of files and their total bytes as they are now, 0 of both for a source that is gone; None for a dataset,
    whose size is not known without reading it."""
    try:
        match source:
            case TextSource():
                _, files = files_below(source.path, source.suffixes)
            case JsonlSource():
                _, files = files_below(source.path, _JSONL)
            case StdlibSource():
                _, files = stdlib_files()
            case _:
                return None
    except DataError:
        return 0, 0
    return len(files), sum(file.stat().st_size for file in files)


def _text_documents(source: TextSource, counts: SourceCounts) -> Iterator[tuple[str, str]]:
    return _read_text(source, counts, *files_below(source.path, source.suffixes))


def _stdlib_documents(source: StdlibSource, counts: SourceCounts) -> Iterator[tuple[str, str]]:
    return _read_text(source, counts, *stdlib_files())


def _text_of(record: object, text_field: str) -> str:
    """The text of one record; raises ValueError with what is wrong."""
    if not isinstance(record, dict):
        raise ValueError(f"a record must be an object, found {type(record).__name__}")
    if text_field not in record:
        raise ValueError(f"no field {show(text_field)}, found {show(', '.join(map(str, record)))}")
    return encodable(f"field {show(text_field)}", record[text_field])


def _jsonl_documents(source: JsonlSource, counts: SourceCounts) -> Iterator[tuple[str, str]]:
    root, files = files_below(source.path, _JSONL)
    cure = "correct the line or source.text_field"
    for file in files:
        for number, offset, line, record in jsonl_records(source, counts, file, cure):
            try:
                document = _text_of(record, source.text_field)
            except ValueError as error:
                bad_record(source, counts, f"{file}:{number}: {error} (byte {offset}): {show(line.strip())}", cure)
                continue
            yield f"{file.relative_to(root).as_posix()}:{number}", document


def _dataset_documents(source: DatasetSource, counts: SourceCounts) -> Iterator[tuple[str, str]]:
    for i, row in enumerate(dataset_rows(source)):
        where = f"{source.path}: row {i} of {source.split}"
        try:
            text = _text_of(row, source.text_field)
        except ValueError as error:
            bad_record(source, counts, f"{where}: {error}", "correct the row or source.text_field")
            continue
        if len(text.encode()) > source.max_document_bytes:
            limit = f"source.max_document_bytes {source.max_document_bytes}"
            bad_record(source, counts, f"{where}: more than {limit}", "split the row, raise the limit")
            continue
        yield f"{source.split}:{i}", text


_READERS = {
    TextSource: _text_documents,
    JsonlSource: _jsonl_documents,
    DatasetSource: _dataset_documents,
    StdlibSource: _stdlib_documents,
}
