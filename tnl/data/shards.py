"""A folder of shards as one stream of tokens."""

from collections import OrderedDict
from pathlib import Path

import numpy as np

from tnl.data.shard_format import (
    HEADER_BYTES,
    INDEX_FILE,
    REBUILD,
    SPLITS,
    TOKENIZER_FILE,
    ShardHeader,
    ShardIndex,
    file_sha256,
    id_bytes_of,
    read_header,
)
from tnl.errors import DataError

# Each open map costs a file descriptor, of which a process commonly has 1,024.
_MAX_OPEN_MAPS = 64


class ShardSet:
    """All shards of one split as one stream of tokens, memory-mapped.

    Attributes: ``folder``, ``split``, ``index``, ``fingerprint`` (of the whole folder, hex), ``num_tokens``,
    ``num_documents``, ``num_bytes`` (UTF-8 text), ``max_token_id``, ``vocab_size``, ``dtype`` (of the ids).
    """

    def __init__(self, folder: Path, split: str, index: ShardIndex, headers: list[ShardHeader]) -> None:
        """Use `open`."""
        entries = index.splits[split]
        self.folder, self.split, self.index = folder, split, index
        self.fingerprint, self.vocab_size = index.fingerprint, index.vocab_size
        self.num_tokens = sum(entry.num_tokens for entry in entries)
        self.num_documents = sum(entry.num_documents for entry in entries)
        self.num_bytes = sum(entry.num_bytes for entry in entries)
        self.max_token_id = max(header.max_token_id for header in headers)
        self.dtype = headers[0].dtype
        self._files = [folder / entry.file for entry in entries]
        self._headers = headers
        self._first = np.cumsum([0, *(header.num_tokens for header in headers)])  # [num_shards + 1] stream positions
        self._maps: OrderedDict[int, np.memmap] = OrderedDict()

    @classmethod
    def open(cls, folder: str | Path, split: str = "train") -> "ShardSet":
        """Open ``split`` of ``folder`` after checking every header, size and count, but not the content (see `verify`).

        Raises `DataError` naming the file for one that is missing, truncated, too long, of another dtype, not what the
        index says, or made with another tokenizer, and for a split without documents.
        """
        folder = Path(folder)
        index = ShardIndex.read(folder)
        if split not in SPLITS:
            raise DataError(f"{folder}: no split {split!r}, there are {', '.join(SPLITS)}")
        if not index.splits[split]:
            raise DataError(f"{folder}: no documents in split {split}; prepare it with a larger heldout_fraction")
        _check_tokenizer(folder, index)
        headers = []
        for entry in index.splits[split]:
            file = folder / entry.file
            header = read_header(file)
            if header.tokenizer_sha256 != index.tokenizer_sha256:
                raise DataError(
                    f"{file}: made with tokenizer {header.tokenizer_sha256}, the index says {index.tokenizer_sha256}; "
                    f"{REBUILD}"
                )
            id_bytes = id_bytes_of(index.vocab_size)
            found = (header.id_bytes, header.vocab_size, header.num_tokens, header.num_documents)
            expected = (id_bytes, index.vocab_size, entry.num_tokens, entry.num_documents)
            if found != expected:
                raise DataError(
                    f"{file}: bytes per id, pieces, tokens, documents are {found}, the index says {expected}; {REBUILD}"
                )
            headers.append(header)
        return cls(folder, split, index, headers)

    def tokens(self, start: int, stop: int) -> np.ndarray:
        """Ids at stream positions ``start`` to ``stop``, a copy [stop - start] of the shards' dtype."""
        assert 0 <= start <= stop <= self.num_tokens, (start, stop, self.num_tokens)
        out = np.empty(stop - start, self.dtype)
        for i, lower, upper in self._overlaps(start, stop):
            header, first = self._headers[i], int(self._first[i])
            ids = self._map(i)[HEADER_BYTES : HEADER_BYTES + header.num_tokens * header.id_bytes].view(header.dtype)
            out[lower - start : upper - start] = ids[lower - first : upper - first]
        return out

    def document_starts(self, start: int, stop: int) -> np.ndarray:
        """Ascending stream positions in ``[start, stop)`` at which a document starts, int64 [n]."""
        assert 0 <= start <= stop <= self.num_tokens, (start, stop, self.num_tokens)
        found = [np.empty(0, np.int64)]
        for i, lower, upper in self._overlaps(start, stop):
            header, first = self._headers[i], int(self._first[i])
            starts = self._map(i)[header.starts_offset :].view("<u8")
            # The bounds as uint64 too: mixed types would convert the whole map to float64 first.
            begin, end = np.searchsorted(starts, np.array([lower - first, upper - first], np.uint64))
            found.append(starts[begin:end].astype(np.int64) + first)
        return np.concatenate(found)

    def _overlaps(self, start: int, stop: int) -> list[tuple[int, int, int]]:
        """``(shard, lower, upper)`` of the stream positions in each shard that meets ``[start, stop)``."""
        if start == stop:
            return []
        i_first = int(np.searchsorted(self._first, start, side="right")) - 1
        i_last = int(np.searchsorted(self._first, stop, side="left")) - 1
        bounds = range(i_first, i_last + 1)
        return [(i, max(start, int(self._first[i])), min(stop, int(self._first[i + 1]))) for i in bounds]

    def _map(self, i: int) -> np.memmap:
        """Shard ``i`` as mapped bytes; the least recently used map is closed when too many are open."""
        if i not in self._maps:
            self._maps[i] = np.memmap(self._files[i], np.uint8, mode="r")
            if len(self._maps) > _MAX_OPEN_MAPS:
                self._maps.popitem(last=False)
        self._maps.move_to_end(i)
        return self._maps[i]

    def __getstate__(self) -> dict:
        """Without the maps: another process opens its own."""
        return {**self.__dict__, "_maps": OrderedDict()}


def _check_tokenizer(folder: Path, index: ShardIndex) -> None:
    file = folder / TOKENIZER_FILE
    if (found := file_sha256(file)) != index.tokenizer_sha256:
        raise DataError(f"{file}: SHA-256 {found}, the shards were made with {index.tokenizer_sha256}; {REBUILD}")


def verify(folder: str | Path) -> int:
    """Check the content hash of every file of ``folder`` and return the number of bytes read.

    Raises `DataError` naming the first file that is not what was prepared, or that is not part of the index.
    """
    folder = Path(folder)
    index = ShardIndex.read(folder)
    known = {INDEX_FILE, TOKENIZER_FILE}
    total = 0
    for split, entries in index.splits.items():
        if entries:
            ShardSet.open(folder, split)
        for entry in entries:
            file = folder / entry.file
            if (found := file_sha256(file)) != entry.sha256:
                raise DataError(f"{file}: SHA-256 {found}, expected {entry.sha256}: the content was altered; {REBUILD}")
            known.add(entry.file)
            total += file.stat().st_size
    if strays := sorted(path.name for path in folder.iterdir() if path.name not in known):
        raise DataError(f"{folder}: {strays[0]!a} does not belong to these shards; move it away")
    return total


def check_vocabulary(shards: ShardSet, model_vocab_size: int) -> None:
    """Raise `DataError` when ``shards`` hold, or their tokenizer can make, an id that the model does not have."""
    if shards.vocab_size > model_vocab_size:
        raise DataError(
            f"{shards.folder}: its tokenizer has {shards.vocab_size} pieces (largest id stored {shards.max_token_id}), "
            f"the model {model_vocab_size}; set model.vocab_size to at least {shards.vocab_size} or prepare the data "
            "with a smaller tokenizer"
        )
