"""Records of instruction data: JSON arrays, JSON Lines and datasets, each with where it stands."""

import json
from collections.abc import Iterator
from pathlib import Path

from tnl.data.records import (
    BOM,
    DECODER,
    SourceCounts,
    bad_record,
    dataset_rows,
    files_below,
    jsonl_records,
    show,
)
from tnl.data.settings import DatasetInstructions, InstructionSource, JsonInstructions
from tnl.errors import DataError

_SUFFIXES = [".json", ".jsonl"]
_BLANKS = " \t\r\n"


def iterate_records(source: InstructionSource, counts: SourceCounts, cure: str) -> Iterator[tuple[str, object]]:
    """``(where, value)`` of each record; ``cure`` ends the messages about those that are no JSON.

    Raises:
        DataError: the source cannot be read, or a record is bad and ``on_bad`` is ``error``. An array with a mistake in
            its JSON in any case, for what follows the mistake cannot be told apart.
    """
    if isinstance(source, DatasetInstructions):
        for i, row in enumerate(dataset_rows(source)):
            yield f"{source.path}: row {i} of {source.split}", row
        return
    _, files = files_below(source.path, _SUFFIXES, source.section)
    for file in files:
        if _is_array(file):
            yield from _array_records(source, counts, file)
        else:
            for number, _, _, record in jsonl_records(source, counts, file, cure):
                yield f"{file}:{number}", record


def _is_array(file: Path) -> bool:
    try:
        with file.open("rb") as stream:
            # Blanks before the first record are few.
            start = stream.read(4096).removeprefix(BOM).lstrip()
    except OSError as error:
        raise DataError(f"{file}: cannot be read ({error.strerror}); make it readable") from error
    return start.startswith(b"[")


def _array_records(source: JsonInstructions, counts: SourceCounts, file: Path) -> Iterator[tuple[str, object]]:
    data = file.read_bytes()
    body = data.removeprefix(BOM)
    try:
        text = body.decode("utf-8")
    except UnicodeDecodeError as error:
        # Where the records end cannot be told, so none of them is skipped.
        line = 1 + body.count(b"\n", 0, error.start)
        what = f"not UTF-8 at byte {error.start + len(data) - len(body)}"
        raise _broken(file, line, what, body[error.start : error.start + 20].decode("latin-1")) from error
    position = _skip_blanks(text, 0) + 1
    line, counted = 1, 0
    while True:
        position = _skip_blanks(text, position)
        line, counted = line + text.count("\n", counted, position), position
        if text.startswith("]", position):
            break
        try:
            record, end = DECODER.raw_decode(text, position)
        except (ValueError, RecursionError) as error:
            if isinstance(error, json.JSONDecodeError):
                line, what = line + text.count("\n", counted, error.pos), error.msg
            else:
                what = str(error)
            raise _broken(file, line, what, text[position:]) from error
        where = f"{file}:{line}"
        if end - position > source.max_document_bytes:
            limit = f"{source.section}.max_document_bytes {source.max_document_bytes}"
            bad_record(source, counts, f"{where}: more than {limit}", "split the record, raise the limit")
        else:
            yield where, record
        position = _skip_blanks(text, end)
        if text.startswith(",", position):
            position = _skip_blanks(text, position + 1)
            if text.startswith("]", position):
                line += text.count("\n", counted, position)
                raise _broken(file, line, "no record between , and ]", text[position:])
        elif not text.startswith("]", position):
            line += text.count("\n", counted, position)
            raise _broken(file, line, "expected , or ] behind a record", text[position:])
    rest = _skip_blanks(text, position + 1)
    if rest < len(text):
        line += text.count("\n", counted, rest)
        raise _broken(file, line, "something follows the array", text[rest:])


def _skip_blanks(text: str, position: int) -> int:
    while position < len(text) and text[position] in _BLANKS:
        position += 1
    return position


def _broken(file: Path, line: int, what: str, rest: str) -> DataError:
    return DataError(
        f"{file}:{line}: {what}: {show(rest)}; correct the JSON, what follows cannot be read (with one record a line, "
        "data.source.on_bad: skip leaves out single records)"
    )
