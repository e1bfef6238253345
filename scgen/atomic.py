"""Put complete files in place in one step."""

import contextlib
import os
import secrets
import time
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def beside(path: Path) -> Iterator[Path]:
    """Give the block a new file in the folder of ``path``, and delete it after the block if it is still there."""
    # The name is known before the file exists, so no signal can come between creating it and being able to delete it.
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.partial")
    try:
        temporary.touch(0o600, exist_ok=False)
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)


def replace(temporary: Path, path: Path) -> None:
    """Move a file over another. Windows refuses this while a process reads the other file, so try again."""
    deadline = time.monotonic() + 10
    while True:
        try:
            return os.replace(temporary, path)
        except PermissionError:
            if os.name != "nt" or time.monotonic() > deadline:
                raise
            time.sleep(0.01)


def put(temporary: Path, path: Path) -> None:
    """Move a file to a path that does not exist; FileExistsError if another process has put a file there.

    On a file system without hard links, a file that is put there at the same moment is replaced.
    """
    try:
        os.link(temporary, path)  # unlike a move, a link never replaces a file
    except FileExistsError:
        raise
    except OSError:  # the file system has no links
        if path.exists():
            raise FileExistsError(path) from None
        replace(temporary, path)
    else:
        os.unlink(temporary)


def permit(path: Path) -> None:
    """Give a file the permissions of a new file under the umask of the process."""
    mask = os.umask(0)
    os.umask(mask)
    os.chmod(path, 0o666 & ~mask)
