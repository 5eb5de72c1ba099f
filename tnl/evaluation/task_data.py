"""The data of tasks: from a local folder or the cache of `datasets`, never from the network, never by running code."""

import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import datasets
import huggingface_hub.constants
import pyarrow
import pyarrow.parquet

from tnl.errors import DataError
from tnl.files import sha256_of

# A split in one file, or in numbered ones as the hub names them: test-00000-of-00002.parquet.
SPLIT_FILE = re.compile(r"(?P<split>.+?)(-(?P<part>\d+)-of-(?P<parts>\d+))?\.(jsonl|parquet)")
# What `datasets` itself reads from files that a task names.
FILE_KINDS = {"json", "csv", "text", "parquet", "arrow"}
OFFLINE = "HF_HUB_OFFLINE"


class MissingDataError(DataError):
    """The data of a task are not on this machine."""


class TaskData:
    """Where lm-eval's tasks find their data.

    Attributes:
        sources: of each task that was read: file -> SHA-256, or data set -> fingerprint of `datasets`.
        absent: of each task, the splits that were asked for and are not in its folder.
    """

    def __init__(self, folder: Path | None):
        """
        Args:
            folder: holds ``<task>/<split>.jsonl`` or ``.parquet`` in the task's own schema, or
                ``<data set>/<its configuration>/...``; what is not there is looked for in the cache of `datasets`.

        Raises:
            DataError: there is no such folder.
        """
        self._folder = None if folder is None else folder.expanduser()
        if self._folder is not None and not self._folder.is_dir():
            raise DataError(f"{folder}: no such folder; correct --data-dir")
        self.sources: dict[str, dict[str, str]] = {}
        self.absent: dict[str, list[str]] = {}

    @contextmanager
    def served(self, task: str) -> Iterator[None]:
        """Within the block, `datasets.load_dataset` reads the data of ``task`` as described above.

        That function is the only way in: the classes and functions of tasks call it themselves.
        """
        original = datasets.load_dataset
        datasets.load_dataset = partial(self._load, task, original)
        try:
            with without_network():
                yield
        finally:
            datasets.load_dataset = original

    def read(self, task: str, path: str, name: str | None = None) -> "datasets.DatasetDict":
        """All splits of the data set ``path``, configuration ``name``, of ``task``.

        Raises:
            MissingDataError: they are not here.
            DataError: a file is not what its name says.
        """
        with without_network():
            return self._load(task, datasets.load_dataset, path, name)

    def folder_of(self, task: str, path: str, name: str | None) -> Path | None:
        """The local folder with the data of a task, if there is one."""
        if self._folder is None:
            return None
        last = path.rstrip("/").rpartition("/")[2]
        names = [task, *(f"{start}/{name}" for start in (path, last) if name), *(() if name else (path, last))]
        found = (self._folder / part for part in names if not part.startswith("/") and ".." not in part)
        return next((folder for folder in found if folder.is_dir() and _split_files(folder)), None)

    def _load(self, task: str, original, path: str, name: str | None = None, **options):
        folder = self.folder_of(task, path, name)
        if folder is not None:
            found = self._read_folder(task, folder)
            return found[options["split"]] if options.get("split") else found
        try:
            found = original(path, name, **options)
        # A data set that is a program is refused by `datasets` with a RuntimeError.
        except (OSError, ValueError, RuntimeError) as error:
            if path in FILE_KINDS and not isinstance(error, ConnectionError):
                raise DataError(f"{task}: {str(error).splitlines()[0]}") from None
            what = path if name is None else f"{path} ({name})"
            raise MissingDataError(
                f"{task}: its data set {what} is {self._looked()} the cache of datasets; where there is a network: "
                f"tnl data fetch {task}"
            ) from None
        parts = found.values() if isinstance(found, datasets.DatasetDict) else [found]
        self.sources[task] = {f"{path} {name or ''}".strip(): "+".join(part._fingerprint for part in parts)}
        return found

    def _looked(self) -> str:
        return "not in" if self._folder is None else f"neither in {self._folder} nor in"

    def _read_folder(self, task: str, folder: Path) -> "datasets.DatasetDict":
        self.sources[task], self.absent[task] = {}, []
        found = _Splits(self.absent[task])
        for split, files in _split_files(folder).items():
            _check_parts(folder, split, files)
            tables = [_table(file) for file in files]
            digests = {str(file): sha256_of(file) for file in files}
            self.sources[task] |= digests
            try:
                # Given, so that `datasets` does not hash the rows as Python objects.
                found[split] = datasets.Dataset(pyarrow.concat_tables(tables), fingerprint=digest_of(digests))
            except pyarrow.ArrowInvalid as error:
                raise DataError(f"{files[0]}: does not fit {files[-1]}: {str(error).splitlines()[0]}") from None
        return found


class _Splits(datasets.DatasetDict):
    """Splits of a folder; one that is not there has no rows.

    lm-eval opens the training split of every task, though without examples nothing of it is used.
    """

    def __init__(self, absent: list[str]):
        super().__init__()
        self._absent = absent

    def __getitem__(self, name: str) -> datasets.Dataset:
        if name in self:
            return super().__getitem__(name)
        self._absent.append(name)
        return next(iter(self.values())).select([])


def _split_files(folder: Path) -> dict[str, list[Path]]:
    """Files of each split in a folder."""
    found: dict[str, list[Path]] = {}
    for file in sorted(folder.iterdir()):
        match = SPLIT_FILE.fullmatch(file.name)
        if match and file.is_file():
            found.setdefault(match["split"], []).append(file)
    return found


def _check_parts(folder: Path, split: str, files: list[Path]) -> None:
    """Refuse a split that lacks a part, or stands there twice: its score would be of other questions.

    Raises:
        DataError: the files are not one, nor all the parts of one.
    """
    parts = [SPLIT_FILE.fullmatch(file.name).group("part", "parts") for file in files]
    count = int(parts[0][1] or 1)
    if sorted((int(part or 0), int(of or 1)) for part, of in parts) != [(i, count) for i in range(count)]:
        names = ", ".join(file.name for file in files[:4]) + (", ..." if len(files) > 4 else "")
        raise DataError(f"{folder}: {names}: not the one file of the split {split}, nor all its parts; correct them")


def _table(file: Path) -> pyarrow.Table:
    """The rows of a file.

    Raises:
        DataError: it is not what its name says, or has no rows.
    """
    try:
        if file.suffix == ".parquet":
            table = pyarrow.parquet.read_table(file)
        else:
            table = pyarrow.Table.from_pylist(_rows(file))
    except OSError as error:
        raise DataError(f"{file}: {error.strerror or error}; make it readable") from None
    except pyarrow.ArrowException as error:
        raise DataError(f"{file}: {str(error).splitlines()[0]}; correct it, or write it again") from None
    if not table.num_rows:
        raise DataError(f"{file}: has no rows; remove it, or write it again")
    return table


def _rows(file: Path) -> list[dict]:
    """The objects of a JSON Lines file; keys that one of them lacks are null there."""
    rows, keys = [], {}
    for number, line in enumerate(file.read_bytes().split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise DataError(f"{file}:{number}: not JSON ({error}); correct this line") from None
        if not isinstance(row, dict):
            raise DataError(f"{file}:{number}: not a JSON object; correct this line")
        keys |= dict.fromkeys(row)
        rows.append(row)
    return [{key: row.get(key) for key in keys} for row in rows]


@contextmanager
def without_network() -> Iterator[None]:
    """Within the block, `datasets` and the client of the hub read what is on this machine and ask nobody."""
    # Their environment variable is read when they are imported, which is long ago when a model was loaded.
    places = (datasets.config, huggingface_hub.constants)
    before = [getattr(place, OFFLINE) for place in places]
    try:
        for place in places:
            setattr(place, OFFLINE, True)
        yield
    finally:
        for place, value in zip(places, before, strict=True):
            setattr(place, OFFLINE, value)


def digest_of(sources: dict[str, str]) -> str:
    """One short name of what a task was read from, whatever the files are called."""
    return hashlib.sha256("".join(sorted(sources.values())).encode()).hexdigest()[:16]
