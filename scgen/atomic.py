"""Files that appear under their name in one step, whole."""

import os
import time
from pathlib import Path


def replace(temporary: Path, path: Path) -> None:
    """Move a file over another. Windows refuses it while a process reads the other, which is soon over."""
    deadline = time.monotonic() + 10
    while True:
        try:
            return os.replace(temporary, path)
        except PermissionError:
            if os.name != "nt" or time.monotonic() > deadline:
                raise
            time.sleep(0.01)


def put(temporary: Path, path: Path) -> None:
    """Move a file to where there is none; FileExistsError if another process has put one there.

    On a file system without hard links, one that is put there at the very same moment is replaced.
    """
    try:
        os.link(temporary, path)  # which never replaces anything, unlike a move
    except FileExistsError:
        raise
    except OSError:  # the file system has no links
        if path.exists():
            raise FileExistsError(path) from None
        replace(temporary, path)
    else:
        os.unlink(temporary)


def permit(path: Path) -> None:
    """Give a file the permissions of a new one, as the process's umask says."""
    mask = os.umask(0)
    os.umask(mask)
    os.chmod(path, 0o666 & ~mask)
