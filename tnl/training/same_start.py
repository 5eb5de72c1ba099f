"""All ranks of a run must have been started alike: one configuration, one set of packages, one source code, one set of
data, and one run folder.

A rank with another learning rate, another torch or an older checkout would not fail. It would train another model.
"""

import hashlib
import json
import time
from pathlib import Path

import tnl_kernels
import torch
import torch.distributed as dist

import tnl
from tnl.errors import CannotWriteError, ConfigError, DataError
from tnl.training.engine import Ranks
from tnl.training.run_folder import flat_settings, versions
from tnl.training.settings import RunSettings
from tnl.training.start import start_id
from tnl.training.status import FILE as STATUS

SHOWN = 12  # differences in the message


def start_facts(settings: RunSettings) -> dict[str, str]:
    """What must be equal on all ranks: each key of the configuration, version of a package, and hash of a source
    file."""
    facts = {f"configuration {key}": json.dumps(value) for key, value in flat_settings(settings).items()}
    facts |= {f"package {name}": version for name, version in versions().items()}
    for package in (tnl, tnl_kernels):
        folder = Path(package.__file__).parent
        for file in sorted(folder.rglob("*.py")):
            name = f"file {package.__name__}/{file.relative_to(folder).as_posix()}"
            facts[name] = hashlib.sha256(file.read_bytes()).hexdigest()[:12]
    return facts


def check_same_start(settings: RunSettings, ranks: Ranks) -> None:
    """End all ranks together when one was started with something else than rank 0; a collective.

    Raises:
        ConfigError: they differ. The message of rank 0 names the ranks and what differs.
    """
    if ranks.world_size == 1:
        return
    mine = start_facts(settings)
    content = json.dumps(mine, sort_keys=True).encode()
    digests = _gathered(hashlib.sha256(content).digest(), ranks)
    different = [rank for rank, digest in enumerate(digests) if digest != digests[0]]
    if not different:
        return
    lengths = [int.from_bytes(length, "little") for length in _gathered(len(content).to_bytes(8, "little"), ranks)]
    contents = _gathered(content.ljust(max(lengths), b"\0"), ranks)
    if not ranks.is_main:
        raise ConfigError("the ranks were not started alike; see the message of rank 0")
    lines = []
    for rank in different:
        theirs = json.loads(contents[rank][: lengths[rank]])
        for key in sorted(mine.keys() | theirs.keys()):
            here, there = mine.get(key, "nothing"), theirs.get(key, "nothing")
            if here != there:
                lines.append(f"  {key}: {here} on rank 0, {there} on rank {rank}")
    if len(lines) > SHOWN:
        lines[SHOWN:] = [f"  and {len(lines) - SHOWN} more"]
    names = ", ".join(map(str, different))
    raise ConfigError(
        f"rank {names}: started with another configuration or code than rank 0; start every rank with the same "
        "command, packages and checkout\n" + "\n".join(lines)
    )


def gathered_starts(start: Path | None, ranks: Ranks) -> list[str]:
    """Which starts the ranks are of, one of each machine (see `tnl.training.start`); a collective.

    Args:
        start: of this rank; None without a launcher.
    """
    own = b"" if start is None else start_id(start).encode()
    found = [own] if ranks.world_size == 1 else _gathered(own.ljust(16), ranks)
    return sorted({content.decode().strip() for content in found} - {""})


def check_same_data(fingerprint: str, ranks: Ranks) -> None:
    """End all ranks together when one read other data or another tokenizer than rank 0; a collective.

    Raises:
        DataError: they differ.
    """
    if ranks.world_size == 1:
        return
    digests = _gathered(hashlib.sha256(fingerprint.encode()).digest(), ranks)
    different = ", ".join(str(rank) for rank, digest in enumerate(digests) if digest != digests[0])
    if different:
        raise DataError(
            f"data: rank {different} read other data, or has another tokenizer, than rank 0; give all machines the same"
        )


def _gathered(content: bytes, ranks: Ranks) -> list[bytes]:
    """``content`` of every rank, equally long on all of them. Bytes and not objects: nothing is unpickled."""
    own = torch.frombuffer(bytearray(content), dtype=torch.uint8).to(ranks.device)
    parts = [torch.empty_like(own) for _ in range(ranks.world_size)]
    dist.all_gather(parts, own)
    return [bytes(part.tolist()) for part in parts]


def check_shared(folder: Path, ranks: Ranks) -> None:
    """End all ranks together when one does not see what rank 0 writes to the run folder; a collective.

    Each rank saves its own part of a checkpoint there: on disks of several machines none would be whole.

    Raises:
        ConfigError: which rank.
    """
    if ranks.world_size == 1:
        return
    # A name that nobody has looked up yet: a network file system may remember that a file was not there.
    (number,) = ranks.all_reduce([float(time.time_ns() % 2**52) if ranks.is_main else 0.0])
    seen = folder / f"{STATUS}.{number:.0f}"
    with ranks.together():
        if ranks.is_main:
            try:
                seen.touch()
            except OSError as error:
                raise CannotWriteError(f"{seen}: {error.strerror}; free some space and start again") from None
    try:
        with ranks.together():
            if not seen.exists():
                raise ConfigError(
                    f"output: {folder.absolute()}: rank {ranks.rank} does not see what rank 0 writes there; give a "
                    "folder on a file system that all machines share"
                )
    finally:
        if ranks.is_main:
            seen.unlink()
