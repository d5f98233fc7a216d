"""The errors a user can meet: one sentence each with the value found, the rule it breaks and the remedy.

Every entry point runs inside `reporting`, which prints the message without a traceback and gives the exit code.
"""

import errno
import os
import sys
from collections.abc import Callable
from typing import NamedTuple

from msm_dist.redact import redacted


class MsmError(Exception):
    """Anything the user can put right. The message names value, rule and remedy."""

    exit_code = 2
    on_all_ranks = False
    """Raised on every rank alike, so that one of them is enough to tell the user."""

    def __str__(self) -> str:
        """The message as it may be shown and kept: without secrets, and without what steers a terminal."""
        return redacted(super().__str__())


class ConfigError(MsmError):
    """The configuration is wrong or contradicts the corpus, the run folder or the machine."""


class ChangedShard(NamedTuple):
    """A shard that others changed under a run: what it has to be again."""

    name: str
    location: str
    sha256: str


class DataError(MsmError):
    """The corpus is missing, damaged or not what its index says."""

    changed: tuple[ChangedShard, ...] = ()
    """The shards that were overwritten, replaced, truncated or deleted while they were read."""


class CheckpointError(MsmError):
    """A checkpoint can't be written or read; the last complete one is untouched."""


class Diverged(MsmError):
    """The loss or a gradient is not finite, or above a bound, once more than allowed; on all ranks at the same step."""

    exit_code = 3


class PeerLost(MsmError):
    """Another process of the run ended or stopped answering; what went wrong is in that one's output."""

    exit_code = 1


STORAGE_FAULTS = {
    *(errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO),
    *(errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG, errno.ELOOP),
}


def reporting(action: Callable[[], int | None]) -> int:
    """Run a command and give its exit code; an MsmError, or a disk that can't be written, becomes a message."""
    try:
        return action() or 0
    except MsmError as error:
        if not error.on_all_ranks or os.environ.get("RANK", "0") == "0":
            print(f"msm-dist: {error}", file=sys.stderr, flush=True)
        return error.exit_code
    except OSError as error:
        if error.errno not in STORAGE_FAULTS:
            raise
        message = f"{error.filename or 'a file'}: {error.strerror}; mend that (room, access, name), then start again"
        print(f"msm-dist: {message}", file=sys.stderr, flush=True)
        return MsmError.exit_code
