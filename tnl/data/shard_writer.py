"""Write one split as shard files of a fixed number of tokens."""

import os
from pathlib import Path

import numpy as np

from tnl.data.shard_format import HEADER_BYTES, ShardEntry, ShardHeader, file_sha256, id_bytes_of


class ShardWriter:
    """Appends documents to ``{split}-00000.bin``, ``{split}-00001.bin`` ...; `close` gives the index entries.

    Every file but the last holds exactly ``shard_tokens`` tokens. Raises OSError as the disk does.
    """

    def __init__(self, folder: Path, split: str, shard_tokens: int, vocab_size: int, tokenizer_sha256: str) -> None:
        """Nothing is created before the first document."""
        self._folder, self._split, self._shard_tokens = folder, split, shard_tokens
        self._vocab_size, self._tokenizer_sha256 = vocab_size, tokenizer_sha256
        self._id_bytes = id_bytes_of(vocab_size)
        self._entries: list[ShardEntry] = []
        self._stream = None

    def append(self, ids: list[int], num_bytes: int) -> None:
        """Add one document of ``ids``, bos and eos included, that stands for ``num_bytes`` bytes of UTF-8 text."""
        array = np.asarray(ids, f"<u{self._id_bytes}")
        assert len(array)
        if self._stream is None:
            self._begin()
        self._starts.append(self._tokens)
        self._bytes += num_bytes
        while True:
            part = array[: self._shard_tokens - self._tokens]
            self._stream.write(part.tobytes())
            self._tokens += len(part)
            self._max_id = max(self._max_id, int(part.max()))
            array = array[len(part) :]
            if self._tokens == self._shard_tokens:
                self._finish()
            if not len(array):
                return
            self._begin()

    def close(self) -> list[ShardEntry]:
        """Finish the last file and return the entries of all, in order."""
        if self._stream is not None:
            self._finish()
        return self._entries

    def abandon(self) -> None:
        """Close the open file without finishing it."""
        if self._stream is not None:
            self._stream.close()

    def _begin(self) -> None:
        self._file = self._folder / f"{self._split}-{len(self._entries):05d}.bin"
        self._stream = self._file.open("xb")
        self._stream.write(bytes(HEADER_BYTES))
        self._tokens, self._bytes, self._max_id, self._starts = 0, 0, 0, []

    def _finish(self) -> None:
        header = ShardHeader(
            self._id_bytes, self._tokens, len(self._starts), self._vocab_size, self._max_id, self._tokenizer_sha256
        )
        stream, self._stream = self._stream, None
        with stream:
            stream.write(bytes(header.starts_offset - stream.tell()))
            stream.write(np.asarray(self._starts, "<u8").tobytes())
            stream.seek(0)
            stream.write(header.pack())
            stream.flush()
            os.fsync(stream.fileno())
        self._entries.append(
            ShardEntry(self._file.name, self._tokens, len(self._starts), self._bytes, file_sha256(self._file))
        )
