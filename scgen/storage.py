"""Weights and their description in one folder: written so that a crash at any moment leaves a model that loads.

``model.json`` names the weights' file and is replaced last, in one step. Nothing is pickled, and everything read is
checked. Several processes may save to one folder and load from it at the same time. There are no locks, since not every
file system has them, and a lock can outlive its owner. Three rules take their place:

- The weights of each save have a name of their own, so that no two saves ever write one file.
- A save deletes weights that ``model.json`` named and no longer names, since it never will again. It also deletes files
  of ours that are not named and older than a day: a crash left them. Younger ones may be another process's.
- A load that fails reads again if ``model.json`` has changed meanwhile.
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
    """A saved model is missing, damaged or not one of ours."""


def write(folder: str | Path, description: dict, tensors: dict[str, Tensor], overwrite: bool) -> None:
    """Write a model into ``folder``, which is made if need be.

    Raises
    ------
    FileExistsError
        If a model is there and ``overwrite`` is false, or ``folder`` is a file.
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
        written = weights.stat().st_mtime  # by the clock of the file system, as the times of the other files
        replaced = _write_atomically(path, text.encode(), _replace_description if overwrite else atomic.put)
    except BaseException as error:
        # An interrupt may come after model.json was put in place: what it names is never deleted.
        with contextlib.suppress(OSError):
            if _weights_named(folder) != name:
                weights.unlink()
        if isinstance(error, FileExistsError):  # another process has saved a model since
            raise _exists(folder) from None
        raise
    dead = {replaced}
    with contextlib.suppress(OSError):
        if _weights_named(folder) not in (name, None):  # another process has replaced ours already
            dead.add(name)
    for other in folder.iterdir():
        # What cannot be deleted, as another process has deleted it or is reading it on Windows, is left.
        with contextlib.suppress(OSError):
            ours = _WEIGHTS.fullmatch(other.name) or other.name.startswith(_PARTIAL)
            crashed = other.name != name and other.stat().st_mtime < written - _SECONDS_A_DAY
            if ours and (crashed or other.name in dead):
                other.unlink()


def read(folder: str | Path) -> tuple[dict, dict[str, Tensor]]:
    """Return description and tensors of the model in ``folder``.

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
            # Another process may have replaced the model since, and deleted these weights.
            if _read_description(folder) == text:
                raise


def _read_description(folder: Path) -> bytes:
    """Return the text of ``model.json``."""
    path = folder / "model.json"
    if not path.is_file():
        raise ModelFileError(
            f"{path} is not there (found: {found_in(folder)}). Give the folder that model.save(folder) wrote."
        )
    if path.stat().st_size > _MAX_JSON_BYTES:
        raise ModelFileError(f"{path} is larger than any description of a model ({path.stat().st_size} bytes).")
    return path.read_bytes()


def _read_model(folder: Path, text: bytes) -> tuple[dict, dict[str, Tensor]]:
    """Return the description that ``model.json`` holds, and the tensors that it names."""
    path = folder / "model.json"
    try:
        description = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ModelFileError(f"{path} is no valid JSON ({error}); it is damaged.") from None
    if not isinstance(description, dict) or description.get("format") != FORMAT:
        found = description.get("format") if isinstance(description, dict) else type(description).__name__
        raise ModelFileError(f"{path} has format {found!r}; this version of scgen reads format {FORMAT}.")
    name = description.get("weights")
    if not isinstance(name, str) or not _WEIGHTS.fullmatch(name):
        raise ModelFileError(f"{path} names {name!r} as its weights, which is no name that scgen writes.")
    if description.pop("sha256", None) != _digest(description):
        raise ModelFileError(f"{path} is not what was saved (its sha256 differs): altered.")
    weights = folder / name
    if not weights.is_file():
        raise ModelFileError(f"{weights} is not there, though model.json names it; copy the folder whole.")
    # Before anything is read: a damaged file may claim more than the memory holds. Older models do not say their size.
    size, expected = weights.stat().st_size, description.get("weights_bytes")
    if expected is not None and size != expected:
        raise ModelFileError(
            f"{weights} is not what was saved (it has {size} bytes, not {expected}): truncated or altered."
        )
    data = weights.read_bytes()
    if hashlib.sha256(data).hexdigest() not in name:
        raise ModelFileError(f"{weights} is not what was saved (its sha256 differs): truncated or altered.")
    try:
        return description, safetensors.torch.load(data)
    except (SafetensorError, ValueError, KeyError) as error:
        raise ModelFileError(f"{weights} is no valid safetensors file: {error}.") from None


def found_in(folder: str | Path) -> str:
    """Return what is in a folder, for a message that says what is not."""
    if not Path(folder).is_dir():
        return "no folder"
    return ", ".join(sorted(path.name for path in Path(folder).iterdir())[:8]) or "nothing"


def _write_atomically(path: Path, data: bytes, put: Callable[[Path, Path], str | None]) -> str | None:
    """Write all of ``data`` to a file beside ``path``, let ``put`` move it there, and return what that returns.

    ``path`` holds either what it held before or all of ``data``, even after a power cut.
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
    """Move a description over another, and return the name of the weights that are thereby replaced."""
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
    return FileExistsError(f'{folder} holds a model already. Replace it with save("{folder}", overwrite=True).')


def _digest(description: dict) -> str:
    return hashlib.sha256(json.dumps(description, sort_keys=True).encode()).hexdigest()


def _sync_folder(folder: Path) -> None:
    """Make a rename last through a power cut, where folders can be synchronised at all."""
    if hasattr(os, "O_DIRECTORY"):
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
