"""A start: what one launcher began on one machine. It may become the run in a folder, or be refused before.

A file that the launcher names stands for it. The name is the identity; the content is the exit code of the first rank
on that machine that failed, which torchrun does not pass on.
"""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tnl.errors import EXIT_INTERNAL, exit_code


def start_id(file: Path) -> str:
    """16 characters that stand for the start of ``file``: as many for every start, so that ranks can exchange them."""
    return hashlib.sha256(str(file).encode()).hexdigest()[:16]


@contextmanager
def noted_end(file: Path | None) -> Iterator[None]:
    """Write the exit code of an error in the block to ``file``, if no other rank has done so.

    Nothing is written where the launcher has no such folder: on the other machines of its start.
    """
    try:
        yield
    except Exception as error:
        if file is not None:
            with suppress(OSError), open(file, "x", encoding="utf-8") as target:
                target.write(str(exit_code(error)))
        raise


def read_end(file: Path) -> int:
    """What `noted_end` or the launcher wrote; `EXIT_INTERNAL` where there is nothing."""
    try:
        return int(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return EXIT_INTERNAL
