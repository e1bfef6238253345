"""Check the arguments of a call: one function for each kind, with errors that name the argument and its value.

Each function returns the value as a plain Python object. NumPy scalars are accepted wherever Python's are. A wrong type
raises TypeError, a value out of range ValueError.
"""

import difflib
import math
import os
import reprlib
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

#: The largest number of draws or epochs. More must be a mistake: they would run for months.
MOST_DRAWS = MOST_EPOCHS = 1_000_000
#: The largest seed that torch, NumPy and the files can all hold.
MOST_SEED = 2**63 - 1
#: The largest number in float32, in which the models compute.
MOST_FLOAT32 = float(np.finfo(np.float32).max)

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 80


def shown(value) -> str:
    """Return a value as code, on one line and shortened.

    Examples
    --------
    >>> shown("a"), shown(list(range(100))), len(shown("a" * 1000))
    ("'a'", '[0, 1, 2, 3, 4, 5, ...]', 80)
    """
    try:
        return " ".join(_SHORT.repr(value).split())
    except Exception:  # an integer of thousands of digits, or an object whose repr fails
        return f"<{type(value).__name__}>"


def counted(n: int, one: str, several: str | None = None) -> str:
    """Return a number and what it counts: ``one`` for 1, else ``several``, by default ``one`` with an s.

    Examples
    --------
    >>> counted(1, "cell"), counted(1200, "cell"), counted(2, "batch has", "batches have")
    ('1 cell', '1,200 cells', '2 batches have')
    """
    return f"{n:,} {one if n == 1 else several or one + 's'}"


def check_flag(name: str, value: bool) -> bool:
    """Check a flag and return it. Anything but True and False raises TypeError.

    Examples
    --------
    >>> check_flag("overwrite", "no")
    Traceback (most recent call last):
    TypeError: overwrite='no'; it takes True or False.
    """
    if not isinstance(value, bool | np.bool_):
        raise TypeError(f"{name}={shown(value)}; it takes True or False.")
    return bool(value)


def check_whole(name: str, value: int, least: int, most: int | None = None) -> int:
    """Check a whole number and return it. Raise TypeError if it is not a number, ValueError if it is out of range.

    Examples
    --------
    >>> check_whole("n_samples", np.int64(5), 1)
    5
    >>> check_whole("n_samples", 5.0, 1)
    Traceback (most recent call last):
    ValueError: n_samples=5.0; it takes a whole number from 1. Write n_samples=5.
    """
    takes = f"{name}={shown(value)}; it takes a whole number from {least}" + (f" to {most}." if most else ".")
    if isinstance(value, str) and value.strip().isdecimal():
        takes += f" Write {name}={value.strip()}."
    _check_number(value, takes)
    if isinstance(value, float | np.floating) and value.is_integer() and value >= least:
        takes += f" Write {name}={int(value)}."
    if not isinstance(value, int | np.integer) or value < least or (most is not None and value > most):
        raise ValueError(takes)
    return int(value)


def check_draws(name: str, value: int, least: int = 1) -> int:
    """Check a number of draws and return it."""
    return check_whole(name, value, least, MOST_DRAWS)


def check_number(
    name: str,
    value: float,
    takes: str,
    *,
    least: float = -math.inf,
    most: float = MOST_FLOAT32,
    above: float = -math.inf,
    below: float = math.inf,
) -> float:
    """Check a finite number and return it. Raise TypeError if it is not a number, ValueError if it is out of range.

    Parameters
    ----------
    name, value
        Name and value of the argument.
    takes
        What the argument takes, as text for the message.
    least, most, above, below
        The range: least <= value <= most and above < value < below.

    Examples
    --------
    >>> check_number("delta", float("nan"), "a log2 fold change from 0", least=0)
    Traceback (most recent call last):
    ValueError: delta=nan; it takes a log2 fold change from 0.
    """
    message = f"{name}={shown(value)}; it takes {takes}."
    _check_number(value, message)
    if isinstance(value, np.floating):
        value = float(value)  # NumPy compares in the type of the value, in which the limits may be infinite
    if not (least <= value <= most and above < value < below):
        raise ValueError(message)
    return float(value)


def check_share(name: str, value: float) -> float:
    """Check a share from 0 to 1 and return it."""
    return check_number(name, value, "a share from 0 to 1", least=0, most=1)


def check_seed(value: int) -> int:
    """Check a seed and return it: a whole number that all random generators take."""
    return check_whole("seed", value, 0, MOST_SEED)


def check_choice(name: str, value: str, known: Sequence[str]) -> str:
    """Check that a value is a known name and return it. Raise TypeError if it is not a string, else ValueError.

    Examples
    --------
    >>> check_choice("mode", "Change", ("change", "vanilla"))
    Traceback (most recent call last):
    ValueError: mode='Change' is unknown; choose "change" or "vanilla". Did you mean "change"?
    """
    *first, last = (f'"{one}"' for one in known)
    message = f"{name}={shown(value)} is unknown; choose {', '.join(first)}{' or ' if first else ''}{last}."
    if not isinstance(value, str):
        raise TypeError(message)
    if value not in known:
        raise ValueError(message + did_you_mean(value, known))
    return str(value)


def check_key(name: str, value: str, example: str) -> str:
    """Check a key under which to write into ``adata.obsm`` or ``uns``, which h5ad files must hold, and return it."""
    if not isinstance(value, str) or not value or "/" in value or "\0" in value:
        kind = ValueError if isinstance(value, str) else TypeError
        raise kind(f'{name}={shown(value)}; it takes a name, such as "{example}", without "/".')
    return str(value)


def check_names(name: str, value: Iterable[str]) -> list[str]:
    """Check a list of names and return it. A single string, or items that are not strings, raise TypeError.

    Examples
    --------
    >>> check_names("gene_list", "CD3E")
    Traceback (most recent call last):
    TypeError: gene_list='CD3E' is a str; it takes a list: gene_list=['CD3E'].
    """
    if isinstance(value, str):
        raise TypeError(f"{name}={shown(value)} is a str; it takes a list: {name}=[{shown(value)}].")
    if not isinstance(value, Iterable) or isinstance(value, bytes) or getattr(value, "ndim", 1) != 1:
        raise TypeError(f"{name}={shown(value)}; it takes a list of names.")
    names = list(value)
    wrong = next((one for one in names if not isinstance(one, str)), None)
    if wrong is not None or None in names:
        raise TypeError(f"{name}={shown(value)} holds {shown(wrong)}; it takes a list of names.")
    return [str(one) for one in names]


def check_path(name: str, value: str | Path) -> Path:
    """Check a path and return it. Raise TypeError if it is not a path, ValueError if no file can have it.

    Examples
    --------
    >>> check_path("folder", None)
    Traceback (most recent call last):
    TypeError: folder=None; it takes a path, a string or pathlib.Path.
    """
    path = value
    if isinstance(value, os.PathLike) and not isinstance(value, str):
        path = os.fspath(value)
    if not isinstance(path, str):
        raise TypeError(f"{name}={shown(value)}; it takes a path, a string or pathlib.Path.")
    if not path or "\0" in path:
        raise ValueError(f"{name}={shown(value)}; it takes a path that is not empty and has no null character.")
    return Path(path)


def check_memory(name: str, value, n_bytes: float, instead: str) -> None:
    """Raise MemoryError if an argument needs more memory than the machine has; ``instead`` says what to do.

    Examples
    --------
    >>> check_memory("n_samples", 10, 1e30, "Ask for fewer draws.")  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    MemoryError: n_samples=10 needs about 1e+21 GB of memory, but this machine has ... GB. Ask for fewer draws.
    """
    there = _memory()
    if n_bytes > there:
        raise MemoryError(
            f"{name}={shown(value)} needs about {n_bytes / 1e9:.3g} GB of memory, but this machine has "
            f"{there / 1e9:.3g} GB. {instead}"
        )


def set_fields(settings, values: dict) -> None:
    """Set fields of a frozen dataclass to their checked values; for its ``__post_init__`` alone."""
    for name, value in values.items():
        object.__setattr__(settings, name, value)


def nearest(name: str, names: Sequence[str]) -> str | None:
    """Return the most similar name, or None if none is similar."""
    return next(iter(difflib.get_close_matches(name, names, n=1, cutoff=0.5)), None)


def did_you_mean(name: str, names: Sequence[str]) -> str:
    """Return a sentence that suggests the most similar name, or an empty string if none is similar."""
    closest = nearest(name, names)
    return f' Did you mean "{closest}"?' if closest else ""


def _check_number(value, message: str) -> None:
    """Raise TypeError unless the value is a real number of Python or NumPy."""
    # NumPy's timedelta64 is a subclass of its integers.
    is_other = isinstance(value, bool | np.timedelta64)
    if is_other or not isinstance(value, int | float | np.integer | np.floating):
        raise TypeError(message)


def _memory() -> float:
    """Return the memory of the machine in bytes; infinity if the system does not report it."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # not a POSIX system
        return math.inf
