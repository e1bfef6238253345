"""The standard streams of the command, which may be closed, full, or read by nobody."""

import os
import sys


def open_closed() -> None:
    """Open the null device for standard streams that were closed at the start.

    Otherwise the next file that is opened would get their number, and what libraries print would go into it.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            handle = os.open(os.devnull, os.O_RDWR)
            try:
                os.fstat(number)
            except OSError:
                os.dup2(handle, number)
            setattr(sys, name, os.fdopen(handle, "r" if name == "stdin" else "w", encoding="utf-8"))


class Lasting:
    """A stream that falls silent when it cannot be written to any more, instead of ending the work.

    Its reader or its terminal may have gone, or its disk may be full. Its other methods are those of the stream.
    """

    def __init__(self, stream):
        self._stream = stream

    def write(self, text: str) -> int:
        """Write, or be silent from now on."""
        try:
            return self._stream.write(text)
        except OSError:
            silence(self._stream)
            return len(text)

    def flush(self) -> None:
        """Flush, or be silent from now on."""
        try:
            self._stream.flush()
        except OSError:
            silence(self._stream)

    def __getattr__(self, name: str):
        return getattr(self._stream, name)


def silence(stream) -> None:
    """Send a stream that cannot be written to the null device, so that Python's last flush does not fail."""
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    except (OSError, ValueError):  # it has no number, as where the command is called from Python
        return
