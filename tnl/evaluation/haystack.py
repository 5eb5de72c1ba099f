"""Token ids of a long text: of a file of the user's, or of the source code of Python's standard library."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from tnl.data.records import stdlib_files
from tnl.errors import DataError

BLOCK_CHARACTERS = 2**18  # that are tokenized at a time


def text_ids(tokenizer, file: Path | None, num_tokens: int) -> np.ndarray:
    """The first ``num_tokens`` ids int64 [num_tokens] of a text, without special tokens.

    Args:
        file: text in UTF-8; None takes the standard library's files one after the other.

    Raises:
        DataError: the file cannot be read, or is too short.
    """
    parts, count = [np.empty(0, np.int64)], 0
    blocks = _stdlib_blocks() if file is None else _file_blocks(file)
    for block in blocks:
        # A text beyond the tokenizer's own limit is no problem, and not worth a warning.
        ids = tokenizer(block, add_special_tokens=False, verbose=False).input_ids
        parts.append(np.array(ids, dtype=np.int64))
        count += len(ids)
        if count >= num_tokens:
            return np.concatenate(parts)[:num_tokens]
    name = "the standard library" if file is None else file
    raise DataError(f"{name}: has {count:,} tokens, {num_tokens:,} are needed; give a longer --text or ask for less")


def start_ids(tokenizer) -> np.ndarray:
    """What the tokenizer puts before a text: int64 [1] or [0]."""
    whole = tokenizer("a").input_ids
    begins = tokenizer.bos_token_id is not None and whole[:1] == [tokenizer.bos_token_id]
    return np.array(whole[:1] if begins else [], dtype=np.int64)


def _file_blocks(file: Path) -> Iterator[str]:
    """Parts of a file that end with a line, where lines are not longer than a part."""
    try:
        with file.expanduser().open(encoding="utf-8") as stream:
            while block := stream.read(BLOCK_CHARACTERS):
                yield block + stream.readline(BLOCK_CHARACTERS)
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise DataError(f"{file}: cannot be read ({reason}); give a text file in UTF-8") from None


def _stdlib_blocks() -> Iterator[str]:
    """The files, but those that are not in UTF-8."""
    for file in stdlib_files()[1]:
        try:
            text = file.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        if text:
            yield text
