"""Read files of `torch.save` without running code: containers, tensors and arrays are returned, all else is inert.

A pickle is a program that may call what it names. Here a name never stands for the thing itself: dictionaries and the
like aside, it becomes a class of records, which keep what the pickle would have called the thing with. Tensors and
arrays are then made of these records, by this file.
"""

import collections
import io
import math
import pickle
import pickletools
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
_STORAGES = {
    "torch.FloatStorage": torch.float32,
    "torch.DoubleStorage": torch.float64,
    "torch.HalfStorage": torch.float16,
    "torch.BFloat16Storage": torch.bfloat16,
    "torch.LongStorage": torch.int64,
    "torch.IntStorage": torch.int32,
    "torch.ShortStorage": torch.int16,
    "torch.CharStorage": torch.int8,
    "torch.ByteStorage": torch.uint8,
    "torch.BoolStorage": torch.bool,
}


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
        data = archive.read(f"{folder}/data.pkl")
        # An index into the memory of what was made is no larger than the pickle, or it asks for gigabytes.
        places = [place for kind, place, _ in pickletools.genops(data) if kind.name in ("LONG_BINPUT", "PUT")]
        if max(places, default=0) > len(data):
            raise ModelFileError("its pickle numbers what it makes beyond its own length.")
        super().__init__(io.BytesIO(data))
        self.archive, self.folder = archive, folder
        self.named: set[str] = set()

    def find_class(self, module: str, name: str) -> type:
        full = f"{module}.{name}"
        if full in _CONTAINERS:
            return _CONTAINERS[full]
        self.named.add(full)
        return type("Record", (Record,), {"name": full})

    def persistent_load(self, pid: tuple) -> Record:
        kind, storage, key, _, n = pid
        if kind != "storage" or storage.name not in _STORAGES:
            raise ModelFileError(f"a tensor is stored as {getattr(storage, 'name', storage)!r}, which is not read.")
        data = self.archive.read(f"{self.folder}/data/{key}")
        return type("Record", (Record,), {"name": "a storage"})(data, _STORAGES[storage.name], n)


def read(path: Path, dropped: tuple[str, ...]) -> dict:
    """Return the dictionary in a file of `torch.save`, with tensors on the CPU.

    Parameters
    ----------
    path
        The file.
    dropped
        Keys, one within the other, of the one part that may name anything, which is left out.

    Raises
    ------
    ModelFileError
        If the file is damaged, or names anything but containers, tensors and NumPy's arrays.
    """
    try:
        if not zipfile.is_zipfile(path):
            raise ModelFileError("it is not a zip archive, the format of torch.save since torch 1.6.")
        with zipfile.ZipFile(path) as archive:
            unpickler, loaded = _unpickled(archive)
        part = loaded
        for key in dropped[:-1]:
            part = part[key]
        # Whatever was named and is not in that part is refused, even where nothing was made of it.
        refused = unpickler.named - _MADE.keys() - _STORAGES.keys() - _names(part.pop(dropped[-1], None), set())
        if refused:
            raise ModelFileError(f"it names {', '.join(sorted(refused))}, which is refused: nothing was run.")
        return _plain(loaded, {})
    except ModelFileError as error:
        raise ModelFileError(f"{path} is not read: {error}") from None
    except Exception as error:  # what damaged files raise has no bounds
        raise ModelFileError(f"{path} cannot be read: {type(error).__name__}: {error}") from error


def _unpickled(archive: zipfile.ZipFile) -> tuple[_Unpickler, dict]:
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
        raise ModelFileError("its archive is compressed, which torch.save never does.")
    inside = next((name for name in archive.namelist() if name.endswith("/data.pkl")), None)
    if inside is None:
        raise ModelFileError("it holds no data.pkl, which torch.save always writes.")
    folder = inside.removesuffix("/data.pkl")
    order = f"{folder}/byteorder"
    if order in archive.namelist() and archive.read(order).decode() != sys.byteorder:
        raise ModelFileError("it was written on a machine of the other byte order.")
    unpickler = _Unpickler(archive, folder)
    return unpickler, unpickler.load()


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


def _plain(value, made: dict[int, object]):
    """Return the value with tensors, arrays and bytes made of the records in it; each is made once."""
    if id(value) not in made:
        if isinstance(value, Record):
            made[id(value)] = _of_record(value, made)
        elif isinstance(value, type) and issubclass(value, Record):
            raise ModelFileError(f"it names {value.name}, which is refused: nothing was run.")
        elif isinstance(value, dict):
            made[id(value)] = {_plain(key, made): _plain(item, made) for key, item in value.items()}
        elif isinstance(value, list | tuple | set):
            made[id(value)] = type(value)(_plain(item, made) for item in value)
        else:
            return value
    return made[id(value)]


def _of_record(record: Record, made: dict):
    if record.name not in _MADE:
        raise ModelFileError(f"it names {record.name}, which is refused: nothing was run.")
    return _MADE[record.name](record, made)


def _tensor(record: Record, made: dict) -> Tensor:
    storage, offset, size, stride = record.args[:4]
    data, dtype, n = storage.args
    if math.prod(size) > n:
        raise ModelFileError(f"a tensor has {math.prod(size)} values, but its storage has {n}.")
    flat = torch.frombuffer(bytearray(data), dtype=dtype, count=n) if n else torch.empty(0, dtype=dtype)
    return torch.as_strided(flat, tuple(size), tuple(stride), offset).clone()


def _scalar(record: Record, made: dict):
    return np.frombuffer(_plain(record.args[1], made), _dtype(record.args[0]))[0].item()


def _array(record: Record, made: dict) -> np.ndarray:
    _, shape, dtype, fortran, data = record.state
    dtype, data = _dtype(dtype), _plain(data, made)
    if dtype.kind == "O":
        flat = np.empty(len(data), dtype=object)
        flat[:] = data
    else:
        flat = np.frombuffer(data, dtype)
    return flat.reshape(shape, order="F" if fortran else "C")


def _dtype(record: Record) -> np.dtype:
    dtype = np.dtype(str(record.args[0])) if record.name == "numpy.dtype" else None
    if dtype is None or dtype.kind not in "biufOSU":
        raise ModelFileError(f"an array is of {record.args[0] if dtype else record.name}, which is not read.")
    return dtype.newbyteorder(record.state[1] if record.state else "|")


def _bytes(record: Record, made: dict) -> bytes:
    return bytes(_plain(record.args[0], made)) if record.args else b""


def _misplaced(record: Record, made: dict):
    raise ModelFileError(f"it names {record.name} where an array or a tensor belongs.")


#: What is made of the records of each name; all others are refused.
_MADE = {
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_parameter": lambda record, made: _plain(record.args[0], made),
    **{f"numpy.{core}.multiarray._reconstruct": _array for core in ("core", "_core")},
    **{f"numpy.{core}.multiarray.scalar": _scalar for core in ("core", "_core")},
    "numpy.dtype": _misplaced,
    "numpy.ndarray": _misplaced,
    "_codecs.encode": lambda record, made: record.args[0].encode("latin1"),  # how protocol 2 writes bytes
    "builtins.bytes": _bytes,
    "__builtin__.bytes": _bytes,
}
