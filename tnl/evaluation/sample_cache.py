"""Results of single requests on disk, so that an evaluation which was interrupted continues where it stood."""

import json
import logging
import os
import uuid
import zlib
from pathlib import Path

from tnl.errors import CannotWriteError, DataError

_log = logging.getLogger(__name__)


class SampleCache:
    """A folder of results by key: the content hash of all that a result depends on.

    Every process appends to a file of its own, a batch in one write, so that several can share the folder and a process
    that is killed loses the batch in hand at most. A line that was cut off, or changed since, does not have its
    checksum; its request is computed again.

    Attributes:
        num_damaged: lines that were left aside.
    """

    def __init__(self, folder: str | Path):
        """
        Raises:
            CannotWriteError: the folder cannot be made or written to.
            DataError: a file in it cannot be read.
        """
        self.folder = Path(folder).expanduser()
        self.num_damaged = 0
        self._results: dict[str, list | str] = {}
        self._file = self.folder / f"{uuid.uuid4().hex}.jsonl"
        self._descriptor: int | None = None
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CannotWriteError(f"{self.folder}: {error.strerror}; choose another folder") from None
        if not os.access(self.folder, os.W_OK):
            raise CannotWriteError(f"{self.folder}: not writable; choose another folder")
        for file in sorted(self.folder.glob("*.jsonl")):
            self._read(file)

    def __len__(self) -> int:
        return len(self._results)

    def get(self, key: str) -> list | str | None:
        """The result of ``key``, as it was put; None if there is none."""
        return self._results.get(key)

    def put(self, results: dict[str, list | str]) -> None:
        """Keep the results of a batch, JSON values by key.

        Raises:
            CannotWriteError: the disk refused.
        """
        lines = [json.dumps([key, value], allow_nan=False) for key, value in results.items()]
        data = "".join(f"{_checksum(line)} {line}\n" for line in lines).encode()
        try:
            if self._descriptor is None:
                self._descriptor = os.open(self._file, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o644)
            # Not synchronised: what is written outlives the process, and a power cut costs a computation only.
            while data:
                data = data[os.write(self._descriptor, data) :]
        except OSError as error:
            raise CannotWriteError(
                f"{self._file}: {error.strerror}; free some space or choose another folder"
            ) from None
        self._results |= results

    def close(self) -> None:
        """Close the file of this process."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def _read(self, file: Path) -> None:
        try:
            lines = file.read_text(encoding="utf-8", errors="replace").split("\n")
        except OSError as error:
            raise DataError(f"{file}: {error.strerror}; make it readable or remove it") from None
        # Behind the last line break is what was cut off by a kill, if anything.
        damaged = int(lines.pop() != "")
        for line in lines:
            checksum, _, text = line.partition(" ")
            if checksum == _checksum(text):
                key, value = json.loads(text)
                self._results[key] = value
            else:
                damaged += 1
        if damaged:
            _log.warning("%s: %d damaged or unfinished results are computed again", file, damaged)
        self.num_damaged += damaged


def _checksum(text: str) -> str:
    return f"{zlib.crc32(text.encode()):08x}"
