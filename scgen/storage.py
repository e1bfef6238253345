"""Weights and their description in one folder: written so that a crash at any moment leaves a model that loads.

``model.json`` names the weights' file, ``weights-<sha256>.safetensors``, and is replaced last, in one step; older
weights are deleted after that. Nothing is pickled, and everything read is checked.
"""

import hashlib
import json
import os
import re
import tempfile
from pathlib import Path

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

FORMAT = 1
_WEIGHTS = re.compile(r"weights-[0-9a-f]{64}\.safetensors")
_MAX_JSON_BYTES = 256 * 2**20


class ModelFileError(ValueError):
    """A saved model is missing, damaged or not one of ours."""


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file so that ``path`` holds either what it held before or all of ``data``, even after a power cut."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".scgen-partial-")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def write(folder: str | Path, description: dict, tensors: dict[str, Tensor], overwrite: bool) -> None:
    """Write a model into ``folder``, which is made if need be.

    Raises
    ------
    FileExistsError
        If a model is there and ``overwrite`` is false, or ``folder`` is a file.
    """
    folder = Path(folder)
    if (folder / "model.json").exists() and not overwrite:
        raise FileExistsError(f'{folder} holds a model already. Replace it with save("{folder}", overwrite=True).')
    folder.mkdir(parents=True, exist_ok=True)
    weights = safetensors.torch.save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})
    name = f"weights-{hashlib.sha256(weights).hexdigest()}.safetensors"
    description = {"format": FORMAT, "weights": name, **description}
    text = json.dumps({**description, "sha256": _digest(description)}, indent=1)
    write_atomically(folder / name, weights)
    write_atomically(folder / "model.json", text.encode())
    for path in folder.iterdir():
        ours = _WEIGHTS.fullmatch(path.name) or path.name.startswith(".scgen-partial-")
        if ours and path.name != name and path.is_file():
            path.unlink(missing_ok=True)


def read(folder: str | Path) -> tuple[dict, dict[str, Tensor]]:
    """Return description and tensors of the model in ``folder``.

    Raises
    ------
    ModelFileError
        If there is no model, or a file is truncated, altered or of another format.
    """
    path = Path(folder) / "model.json"
    if not path.is_file():
        raise ModelFileError(
            f"{path} is not there (found: {found_in(folder)}). Give the folder that model.save(folder) wrote."
        )
    if path.stat().st_size > _MAX_JSON_BYTES:
        raise ModelFileError(f"{path} is larger than any description of a model ({path.stat().st_size} bytes).")
    try:
        description = json.loads(path.read_bytes())
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
    weights = Path(folder) / name
    if not weights.is_file():
        raise ModelFileError(f"{weights} is not there, though model.json names it; copy the folder whole.")
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


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
