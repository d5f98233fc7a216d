"""The errors a user can meet: one sentence each with the value found, the rule it breaks and the remedy.

Every entry point catches `MsmError`, prints its message without a traceback and exits with `exit_code`.
"""


class MsmError(Exception):
    """Anything the user can put right. The message names value, rule and remedy."""

    exit_code = 2


class ConfigError(MsmError):
    """The configuration is wrong or contradicts the corpus, the run folder or the machine."""


class DataError(MsmError):
    """The corpus is missing, damaged or not what its index says."""


class CheckpointError(MsmError):
    """A checkpoint can't be written or read; the last complete one is untouched."""


class Diverged(MsmError):
    """The loss or a gradient became non-finite. Raised on all ranks at the same step."""

    exit_code = 3
