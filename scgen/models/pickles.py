"""Files of `torch.save` read without running anything: containers, tensors and arrays come back, all else is inert.

A pickle is a program that may call what it names. Here a name never stands for the thing itself: dictionaries and the
like aside, it becomes a class of records, which keep what the pickle would have called the thing with. Tensors and
arrays are then made of these records, by this file.
"""

import collections
import io
import math
import pickle
import sys
import zipfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from scgen.storage import ModelFileError

_CONTAINERS = {
    **{f"{where}.{kind.__name__}": kind for where in ("builtins", "__builtin__") for kind in (dict, list, tuple, set)},
    "collections.OrderedDict": collections.OrderedDict,
    "collections.defaultdict": collections.defaultdict,
}
_TENSORS = ("torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_parameter")
_ARRAYS = tuple(f"numpy.{core}.multiarray.{name}" for core in ("core", "_core") for name in ("_reconstruct", "scalar"))
#: Names that `_made` makes tensors, arrays and bytes of.
_KNOWN = (*_TENSORS, *_ARRAYS, "numpy.dtype", "numpy.ndarray", "_codecs.encode", "builtins.bytes", "__builtin__.bytes")
_STORAGES = {
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}


def _storage(name: str) -> torch.dtype | None:
    """Return the dtype of one of torch's storages; None for any other name."""
    return _STORAGES.get(name.removeprefix("torch.")) if name.startswith("torch.") else None


class Record:
    """What a pickle wanted made: of which ``name``, with which ``args`` and, if it said so, ``state``."""

    name = ""

    def __new__(cls, *args):
        """Keep the arguments; a pickle may call this and no ``__init__``."""
        record = super().__new__(cls)
        record.args, record.state = args, None
        return record

    def __init__(self, *args):
        pass

    def __setstate__(self, state):
        self.state = state


class _Unpickler(pickle.Unpickler):
    """Reads ``data.pkl`` of an archive; no name of it is ever imported."""

    def __init__(self, archive: zipfile.ZipFile, folder: str):
        super().__init__(io.BytesIO(archive.read(f"{folder}/data.pkl")))
        self.archive, self.folder = archive, folder
        self.storages: dict[str, Tensor] = {}
        self.named: set[str] = set()

    def find_class(self, module: str, name: str) -> type:
        full = f"{module}.{name}"
        if full in _CONTAINERS:
            return _CONTAINERS[full]
        self.named.add(full)
        return type("Record", (Record,), {"name": full})

    def persistent_load(self, pid: tuple) -> Tensor:
        kind, storage, key, _, n = pid
        dtype = _storage(storage.name) if kind == "storage" else None
        if dtype is None:
            raise ModelFileError(f"a tensor is stored as {getattr(storage, 'name', storage)!r}, which is not read.")
        if key not in self.storages:
            data = bytearray(self.archive.read(f"{self.folder}/data/{key}"))
            self.storages[key] = torch.frombuffer(data, dtype=dtype, count=n) if n else torch.empty(0, dtype=dtype)
        return self.storages[key]


def read(path: Path, unread: tuple[str, ...]) -> dict:
    """Return the dictionary in a file of `torch.save`, with tensors on the CPU.

    Parameters
    ----------
    path
        The file.
    unread
        Keys, one within the other, of the one part that may name anything, which is left out.

    Raises
    ------
    ModelFileError
        If the file is damaged, or names anything but containers, tensors and NumPy's arrays.
    """
    if not zipfile.is_zipfile(path):
        raise ModelFileError(f"{path} is no file of torch.save in its form since torch 1.6 (a zip archive).")
    try:
        with zipfile.ZipFile(path) as archive:
            inside = next((name for name in archive.namelist() if name.endswith("/data.pkl")), None)
            if inside is None:
                raise ModelFileError(f"{path} holds no data.pkl: it is no file of torch.save.")
            folder = inside.removesuffix("/data.pkl")
            order = f"{folder}/byteorder"
            if order in archive.namelist() and archive.read(order).decode() != sys.byteorder:
                raise ModelFileError(f"{path} was written on a machine of the other byte order.")
            unpickler = _Unpickler(archive, folder)
            loaded = part = unpickler.load()
        for key in unread[:-1]:
            part = part[key]
        # Whatever was named and is not in that part is refused, even where nothing was made of it.
        allowed = {name for name in unpickler.named if name in _KNOWN or _storage(name)}
        refused = unpickler.named - allowed - _names(part.pop(unread[-1], None), set())
        if refused:
            raise ModelFileError(f"{path} names {', '.join(sorted(refused))}, which is refused: nothing was run.")
        return _plain(loaded)
    except ModelFileError:
        raise
    except Exception as error:  # what damaged files raise has no bounds
        raise ModelFileError(f"{path} cannot be read: {type(error).__name__}: {error}") from error


def _names(value, seen: set[int]) -> set[str]:
    """Return all names in a value."""
    if id(value) in seen or not isinstance(value, Record | type | dict | list | tuple | set):
        return set()
    seen.add(id(value))
    found = {value.name} if hasattr(value, "name") else set()
    if isinstance(value, Record):
        value = (type(value), value.args, value.state)
    elif isinstance(value, dict):
        value = (*value.keys(), *value.values())
    return found.union(*(_names(item, seen) for item in (() if isinstance(value, type) else value)))


def _plain(value):
    """Return the value with tensors, arrays and bytes made of the records in it; refuse all other records by name."""
    if isinstance(value, Record):
        return _made(value)
    if isinstance(value, type) and issubclass(value, Record):
        raise ModelFileError(f"it names {value.name}, which is refused: nothing was run.")
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set):
        return [_plain(item) for item in value]
    return value


def _made(record: Record):
    name, args = record.name, record.args
    if name not in _KNOWN:
        raise ModelFileError(f"it names {name}, which is refused: nothing was run.")
    if name.endswith("_rebuild_tensor_v2"):
        storage, offset, size, stride = args[:4]
        return torch.as_strided(storage, tuple(size), tuple(stride), offset).clone()
    if name.endswith("_rebuild_parameter"):
        return _plain(args[0])
    if name.endswith("encode"):  # how bytes are written by protocol 2
        return args[0].encode("latin1")
    if name.endswith("bytes"):
        return bytes(_plain(args[0])) if args else b""
    if name.endswith("scalar"):
        return np.frombuffer(_plain(args[1]), _dtype(args[0]))[0].item()
    if name.endswith("_reconstruct"):
        _, shape, dtype, fortran, data = record.state
        return _array(shape, _dtype(dtype), fortran, _plain(data))
    raise ModelFileError(f"it names {name} where an array or a tensor belongs.")


def _dtype(record: Record) -> np.dtype:
    if record.name != "numpy.dtype":
        raise ModelFileError(f"it names {record.name} where a dtype belongs.")
    order = record.state[1] if record.state else "|"
    return np.dtype(str(record.args[0])).newbyteorder(order)


def _array(shape: tuple[int, ...], dtype: np.dtype, fortran: bool, data: bytes | list) -> np.ndarray:
    if dtype.kind == "O":
        flat = np.empty(math.prod(shape), dtype=object)
        flat[:] = data
    else:
        flat = np.frombuffer(data, dtype)
    return flat.reshape(shape, order="F" if fortran else "C")
