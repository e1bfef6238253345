"""Save and load weights and their description in one folder. A crash at any moment leaves a model that loads.

``model.json`` names the file of the weights and is replaced last, in one step. Nothing is pickled, and everything that
is read is checked. Several processes may save to one folder and load from it at the same time. There are no locks: some
file systems lack them, and a lock can outlive its owner. Instead there are three rules:

- The weights of each save have a unique name, so two saves never write the same file.
- A save deletes the weights that ``model.json`` named before, because they will never be named again. It also deletes
  scgen's files that are not named and older than a day, which a crash left. Younger files may be another process's.
- If a load fails and ``model.json`` has changed meanwhile, the load starts again.
"""

import contextlib
import hashlib
import json
import os
import re
import secrets
import tempfile
from collections.abc import Callable
from pathlib import Path

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from scgen import atomic

FORMAT = 1
_WEIGHTS = re.compile(r"weights-[0-9a-f]{64}(-[0-9a-f]{16})?\.safetensors")
_PARTIAL = ".scgen-partial-"
_MAX_JSON_BYTES = 256 * 2**20
_SECONDS_A_DAY = 86_400


class ModelFileError(ValueError):
    """A saved model is missing, damaged or not from scgen."""


def write(folder: str | Path, description: dict, tensors: dict[str, Tensor], overwrite: bool) -> None:
    """Write a model into ``folder``, which is created if it does not exist.

    Raises
    ------
    FileExistsError
        If the folder holds a model and ``overwrite`` is false, or ``folder`` is a file.
    """
    folder = Path(folder)
    path = folder / "model.json"
    if path.exists() and not overwrite:
        raise _exists(folder)
    folder.mkdir(parents=True, exist_ok=True)
    data = safetensors.torch.save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})
    name = f"weights-{hashlib.sha256(data).hexdigest()}-{secrets.token_hex(8)}.safetensors"
    description = {"format": FORMAT, "weights": name, "weights_bytes": len(data), **description}
    text = json.dumps({**description, "sha256": _digest(description)}, indent=1)
    weights = folder / name
    try:
        _write_atomically(weights, data, atomic.replace)
        written = weights.stat().st_mtime  # the file system's clock, as for the other files
        replaced = _write_atomically(path, text.encode(), _replace_description if overwrite else atomic.put)
    except BaseException as error:
        # An interrupt may come after model.json was replaced. The weights that it names are never deleted.
        with contextlib.suppress(OSError):
            if _weights_named(folder) != name:
                weights.unlink()
        if isinstance(error, FileExistsError):  # another process has saved a model meanwhile
            raise _exists(folder) from None
        raise
    dead = {replaced}
    with contextlib.suppress(OSError):
        if _weights_named(folder) not in (name, None):  # another process has already replaced this model
            dead.add(name)
    for other in folder.iterdir():
        # A file that cannot be deleted is left: another process has deleted it, or reads it (on Windows).
        with contextlib.suppress(OSError):
            ours = _WEIGHTS.fullmatch(other.name) or other.name.startswith(_PARTIAL)
            crashed = other.name != name and other.stat().st_mtime < written - _SECONDS_A_DAY
            if ours and (crashed or other.name in dead):
                other.unlink()


def read(folder: str | Path) -> tuple[dict, dict[str, Tensor]]:
    """Read the description and the tensors of the model in ``folder``.

    Raises
    ------
    ModelFileError
        If there is no model, or a file is truncated, altered or of another format.
    """
    folder = Path(folder)
    while True:
        text = _read_description(folder)
        try:
            return _read_model(folder, text)
        except (OSError, ModelFileError):
            # Another process may have replaced the model meanwhile and deleted these weights.
            if _read_description(folder) == text:
                raise


def _read_description(folder: Path) -> bytes:
    """Return the text of ``model.json``."""
    path = folder / "model.json"
    if not path.is_file():
        raise ModelFileError(
            f"{path} does not exist (found: {found_in(folder)}). Give the folder that model.save(folder) wrote."
        )
    if path.stat().st_size > _MAX_JSON_BYTES:
        raise ModelFileError(f"{path} is too large for the description of a model ({path.stat().st_size} bytes).")
    return path.read_bytes()


def _read_model(folder: Path, text: bytes) -> tuple[dict, dict[str, Tensor]]:
    """Return the description in ``model.json`` and the tensors that it names."""
    path = folder / "model.json"
    try:
        description = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ModelFileError(f"{path} is not valid JSON ({error}); it is damaged.") from None
    if not isinstance(description, dict) or description.get("format") != FORMAT:
        found = description.get("format") if isinstance(description, dict) else type(description).__name__
        raise ModelFileError(f"{path} has format {found!r}; this version of scgen reads format {FORMAT}.")
    name = description.get("weights")
    if not isinstance(name, str) or not _WEIGHTS.fullmatch(name):
        raise ModelFileError(f"{path} names {name!r} as its weights, which is not a name that scgen writes.")
    if description.pop("sha256", None) != _digest(description):
        raise ModelFileError(f"{path} was altered after it was saved (its sha256 differs).")
    weights = folder / name
    if not weights.is_file():
        raise ModelFileError(f"{weights} does not exist, but model.json names it. Copy the whole folder.")
    # Checked before reading: a damaged file may claim more than the memory holds. Older models lack their size.
    size, expected = weights.stat().st_size, description.get("weights_bytes")
    if expected is not None and size != expected:
        raise ModelFileError(
            f"{weights} was truncated or altered after it was saved (it has {size} bytes, not {expected})."
        )
    data = weights.read_bytes()
    if hashlib.sha256(data).hexdigest() not in name:
        raise ModelFileError(f"{weights} was truncated or altered after it was saved (its sha256 differs).")
    try:
        return description, safetensors.torch.load(data)
    except (SafetensorError, ValueError, KeyError) as error:
        raise ModelFileError(f"{weights} is not a valid safetensors file: {error}.") from None


def found_in(folder: str | Path) -> str:
    """Return the names of the files in a folder, for an error message."""
    if not Path(folder).is_dir():
        return "no folder"
    return ", ".join(sorted(path.name for path in Path(folder).iterdir())[:8]) or "nothing"


def _write_atomically(path: Path, data: bytes, put: Callable[[Path, Path], str | None]) -> str | None:
    """Write ``data`` to a file beside ``path``, move it to ``path`` with ``put``, and return the result of ``put``.

    ``path`` holds either its old content or all of ``data``, even after a power cut.
    """
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=_PARTIAL)
    temporary = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        atomic.permit(temporary)
        result = put(temporary, path)
        _sync_folder(path.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return result


def _replace_description(temporary: Path, path: Path) -> str | None:
    """Move a description over another, and return the name of the weights that the old one named."""
    replaced = _weights_named(path.parent)
    atomic.replace(temporary, path)
    return replaced


def _weights_named(folder: Path) -> str | None:
    """Return the name of the weights that ``model.json`` names; None if it is missing or damaged."""
    try:
        name = json.loads(_read_description(folder)).get("weights")
    except (FileNotFoundError, ValueError, RecursionError, AttributeError):
        return None
    return name if isinstance(name, str) else None


def _exists(folder: Path) -> FileExistsError:
    return FileExistsError(f'{folder} already holds a model. Replace it with save("{folder}", overwrite=True).')


def _digest(description: dict) -> str:
    return hashlib.sha256(json.dumps(description, sort_keys=True).encode()).hexdigest()


def _sync_folder(folder: Path) -> None:
    """Make a rename survive a power cut, if the system can synchronise folders."""
    if hasattr(os, "O_DIRECTORY"):
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
