"""Errors that a user can cure, each with the process exit code that the command line ends with.

Every class is a ``ValueError``: the text is one message that names the file or key at fault and the cure. Defects of
our own are ``assert`` statements and end with `EXIT_INTERNAL`.
"""

import difflib
import errno
from collections.abc import Iterable

EXIT_OK = 0  # finished all steps
EXIT_USAGE = 2  # bad usage or configuration
EXIT_DATA = 65  # bad input data
EXIT_MACHINE = 69  # the machine failed a check of `tnl doctor`
EXIT_INTERNAL = 70  # a defect of this program
EXIT_CANNOT_WRITE = 73  # disk full, read-only folder
EXIT_PREEMPTED = 75  # asked to stop, checkpoint saved: start again to continue
EXIT_NON_FINITE = 76  # loss or gradients stayed non-finite beyond the limit
EXIT_CHECKPOINT = 77  # checkpoint corrupt or incompatible
EXIT_IN_USE = 78  # the run folder is in use by another process
# What a disk or its owner answers; anything else is a defect of ours.
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.ENAMETOOLONG)


class UserError(ValueError):
    """A mistake that the user can cure; the base of all of them."""

    exit_code = EXIT_USAGE


class ConfigError(UserError):
    """A configuration or command line that cannot be run."""


class DataError(UserError):
    """Input data that is missing, malformed or does not belong together."""

    exit_code = EXIT_DATA


class CannotWriteError(UserError):
    """The output folder cannot take what must be written."""

    exit_code = EXIT_CANNOT_WRITE


class NonFiniteError(UserError):
    """Training diverged: non-finite loss or gradients beyond the allowed number of steps."""

    exit_code = EXIT_NON_FINITE


class CheckpointError(UserError):
    """A checkpoint that is corrupt, incomplete or of another run."""

    exit_code = EXIT_CHECKPOINT


class RunInUseError(UserError):
    """Another process holds the run folder."""

    exit_code = EXIT_IN_USE


def exit_code(error: BaseException) -> int:
    """The code that a process ends with whose command raised ``error``."""
    if isinstance(error, UserError):
        return error.exit_code
    if isinstance(error, OSError) and error.errno in DISK_ERRORS and error.filename is not None:
        return EXIT_CANNOT_WRITE
    return EXIT_INTERNAL


def plain_name(name: str) -> str:
    """``name`` without what is easily mistaken: letter case, and ``-`` for ``_``."""
    return name.lower().replace("-", "_")


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The cure for an unknown name: the known one that is most like it, or all of them."""
    by_plain = {plain_name(key): key for key in known}
    close = difflib.get_close_matches(plain_name(name), by_plain, n=1, cutoff=0.5)
    return f"did you mean {by_plain[close[0]]}?" if close else f"known: {', '.join(by_plain.values())}"
