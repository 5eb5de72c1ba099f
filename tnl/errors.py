"""Errors that a user can cure, each with the process exit code that the command line ends with.

Every class is a ``ValueError``: the text is one message that names the file or key at fault and the cure. Defects of
our own are ``assert`` statements and end with `EXIT_INTERNAL`.
"""

EXIT_OK = 0  # finished all steps
EXIT_USAGE = 2  # bad usage or configuration
EXIT_DATA = 65  # bad input data
EXIT_INTERNAL = 70  # a defect of this program
EXIT_CANNOT_WRITE = 73  # disk full, read-only folder
EXIT_PREEMPTED = 75  # asked to stop, checkpoint saved: start again to continue
EXIT_NON_FINITE = 76  # loss or gradients stayed non-finite beyond the limit
EXIT_CHECKPOINT = 77  # checkpoint corrupt or incompatible
EXIT_IN_USE = 78  # the run folder is in use by another process


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
