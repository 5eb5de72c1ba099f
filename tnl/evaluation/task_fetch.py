"""`tnl data fetch`: the data of tasks from the hub into a folder, for machines with and without a network."""

from collections.abc import Callable, Sequence
from pathlib import Path

import datasets

from tnl.errors import DataError
from tnl.evaluation.scrolls_tasks import PATH as SCROLLS
from tnl.evaluation.scrolls_tasks import archive_files
from tnl.evaluation.task_data import TaskData
from tnl.evaluation.task_library import Leaf, TaskLibrary
from tnl.files import new_folder


def fetch(
    names: Sequence[str],
    folder: Path,
    *,
    report: Callable[[str], None],
    load: Callable[..., datasets.DatasetDict] = datasets.load_dataset,
) -> None:
    """Write the data of tasks as ``folder/TASK/SPLIT.parquet``; what is there already stays.

    Args:
        load: as `datasets.load_dataset`, which runs no code of the hub.

    Raises:
        ConfigError: no such task.
        DataError: some data sets cannot be had; the others are written before.
        CannotWriteError: the folder cannot be written.
    """
    library = TaskLibrary(TaskData(None))
    leaves = dict.fromkeys(leaf for name in names for leaf in library.select(name).leaves)
    failed = []
    for leaf in leaves:
        target = folder / leaf.name
        path, name = library.data_set(leaf)
        if path is None:
            report(f"{leaf.name}: makes its own data")
        elif target.is_dir():
            report(f"{leaf.name}: there already")
        else:
            try:
                splits = _load(load, library, leaf)
            # `datasets` lets through what its client of the hub raises, of whatever type.
            except Exception as error:
                reason = (str(error) or type(error).__name__).splitlines()[0]
                failed.append(f"{leaf.name}: {' '.join(filter(None, (path, name)))}: {reason}")
                continue
            with new_folder(target) as scratch:
                for split, rows in splits.items():
                    rows.to_parquet(scratch / f"{split}.parquet")
            report(f"{leaf.name}: " + ", ".join(f"{split} {len(rows):,}" for split, rows in splits.items()))
    if failed:
        raise DataError("not fetched; try again where there is a network:\n" + "\n".join(f"  {x}" for x in failed))


def _load(load: Callable[..., datasets.DatasetDict], library: TaskLibrary, leaf: Leaf) -> datasets.DatasetDict:
    path, name = library.data_set(leaf)
    if path == SCROLLS:
        return load("json", data_files=archive_files(name))
    return load(path, name, **library.load_options(leaf))
