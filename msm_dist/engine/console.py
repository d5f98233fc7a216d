"""Standard output and error that outlive their readers.

pdsh, ssh and terminals that end close what ranks print into. The next line would end a rank with an error, unsaved.
Here it is dropped, with all that follows, and the end of the reader is told: that of whoever started the run.
"""

import contextlib
import errno
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any, TextIO

ENDS_OF_READERS = (errno.EPIPE, errno.EIO)
"""Of a pipe, and of a terminal."""


class Outliving:
    """A text stream; once it can't be written to any more, what is written goes nowhere and `gone` is called, once."""

    def __init__(self, stream: TextIO, gone: Callable[[], None]) -> None:
        self._stream = stream
        self._gone = gone

    def write(self, text: str) -> int:
        """As the stream's own, but for the error."""
        with self._dropping():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        """As the stream's own, but for the error."""
        with self._dropping():
            self._stream.flush()

    def forget(self) -> None:
        """Call `gone` no more, and let go of it.

        A Thread keeps the sys.stderr of its birth for as long as it lives. One that ends while the interpreter does
        would free what `gone` holds, down to torch's process groups, and abort the process (pytorch/pytorch#38228):
        the exit code that asks for a requeue would be lost.
        """
        self._gone = lambda: None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    @contextlib.contextmanager
    def _dropping(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno not in ENDS_OF_READERS:
                raise
            # The descriptor, not the stream: libraries and the interpreter's own end write to it too.
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)
            self._gone()


@contextlib.contextmanager
def outliving_readers(gone: Callable[[], None]) -> Iterator[None]:
    """Let sys.stdout and sys.stderr outlive their readers for the time of the block; `gone` hears of each end."""
    out, err = Outliving(sys.stdout, gone), Outliving(sys.stderr, gone)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            yield
    finally:
        out.forget()
        err.forget()
