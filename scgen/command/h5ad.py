"""Write files of cells, completely or not at all."""

import contextlib
import multiprocessing
import os
import secrets
import shutil
import signal
import warnings
from pathlib import Path

from scgen import atomic

#: The signals that end a command.
ENDING = [getattr(signal, name) for name in ("SIGHUP", "SIGINT", "SIGTERM") if hasattr(signal, name)]


def check_output(path: Path, overwrite: bool) -> None:
    """Refuse, before any work, an output that could not be written at its end."""
    if path.is_dir() or not path.parent.is_dir():
        raise ValueError(f"{path} is a folder." if path.is_dir() else f"the folder {path.parent} does not exist.")
    if os.path.lexists(path) and not overwrite:  # a link to nowhere, too
        raise ValueError(f"{path} exists; pass --overwrite to replace it.")
    if not os.access(path.parent, os.W_OK):
        raise ValueError(f"the folder {path.parent} cannot be written to.")


def try_to_write(adata, path: Path) -> None:
    """Raise an error now if the result could not be written later: write its tables, and one value of its matrices."""
    import anndata

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # they would be about these copies
        tables, rest = anndata.AnnData(obs=adata.obs.copy(), var=adata.var.copy()), adata[:1, :1].copy()
    for part in (tables, rest):
        with atomic.beside(path) as temporary:
            _write_apart(part, temporary)


def write(adata, path: Path, overwrite: bool) -> None:
    """Write a temporary file and move it to the path in one step, so that the path never holds half a file.

    Raises
    ------
    FileExistsError
        If there is a file now and ``overwrite`` is false. The result is then kept under another name, which
        is in the message.
    """
    with atomic.beside(path) as temporary:
        _write_apart(adata, temporary)
        atomic.permit(temporary)
        try:
            (atomic.replace if overwrite else atomic.put)(temporary, path)
        except FileExistsError:
            other = path.with_stem(f"{path.stem}-{secrets.token_hex(4)}")
            atomic.put(temporary, other)
            raise FileExistsError(f"{path} was made by another program meanwhile; the result is in {other}") from None


def _write_apart(adata, path: Path) -> None:
    """Write in a child process: on a full disk the HDF5 library crashes the process that writes (seen with 1.14)."""
    if not hasattr(os, "fork"):
        _write_here(adata, path)
        return
    receiver, sender = multiprocessing.Pipe(duplex=False)
    child = multiprocessing.get_context("fork").Process(target=_write_and_tell, args=(adata, path, sender))
    reason = None
    try:
        child.start()
        sender.close()
        with contextlib.suppress(EOFError, OSError):  # the child ended before or while it sent a message
            reason = receiver.recv()  # before it is joined: it waits until a long message is read
        child.join()
    except BaseException:  # a signal ends the command: nothing is to be written any more
        if child.is_alive():
            child.kill()
            child.join()
        raise
    if child.exitcode != 0:
        if reason is None:
            reason = f"{shutil.disk_usage(path.parent).free / 2**20:.0f} MiB are free in {path.parent}"
        raise OSError(f"the result could not be written: {reason}")


def _write_and_tell(adata, path: Path, sender) -> None:
    for number in ENDING:
        signal.signal(number, signal.SIG_DFL)  # the parent deletes half-written files
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # the parent says what went wrong
    try:
        _write_here(adata, path)
    except Exception as error:
        # anndata says in notes which part it was.
        sender.send(". ".join([str(error), *getattr(error, "__notes__", [])]))
        raise


def _write_here(adata, path: Path) -> None:
    import anndata
    from anndata.io import write_h5ad

    # Text is written as it was read. Without this setting, anndata refuses text with missing values.
    with anndata.settings.override(allow_write_nullable_strings=True):
        write_h5ad(path, adata, convert_strings_to_categoricals=False)
