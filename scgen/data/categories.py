"""Names of the values of categorical columns. This is the only place where values become strings."""

from collections.abc import Iterable, Sequence
from numbers import Real

import numpy as np
import pandas as pd

from scgen.arguments import did_you_mean, shown


def name_of(value) -> str:
    """Return the name of a value. An integral float has the name of the integer.

    Integers become floats when tables are merged and some rows have no value. This must not change their names.

    Examples
    --------
    >>> import numpy as np
    >>> [name_of(value) for value in (3, 3.0, np.float32(3), -0.0, 2.5, "3.0", True, float("inf"))]
    ['3', '3', '3', '0', '2.5', '3.0', 'True', 'inf']
    """
    if isinstance(value, float | np.floating) and np.isfinite(value) and value == int(value):
        return str(int(value))
    return str(value)


def names_of(values: Iterable) -> list[str]:
    """Return the name of each value."""
    return [name_of(value) for value in values]


def unhashable(column: pd.Series) -> int | None:
    """Return the first row whose value cannot be a category, such as a list; None if all values can.

    Examples
    --------
    >>> import pandas as pd
    >>> unhashable(pd.Series([(1, 2), [1, 2]])), unhashable(pd.Series(["a", None]))
    (1, None)
    """
    if column.dtype != object:
        return None
    for row, value in enumerate(column):
        try:
            hash(value)
        except TypeError:
            return row
    return None


def codes_of_values(values: Iterable, names: Sequence[str]) -> np.ndarray:
    """Return the position of each value's name in ``names``, (n,) int64; -1 if it is not there.

    Models saved by older versions name integral floats like "3.0". Numbers match such names, too.

    Examples
    --------
    >>> codes_of_values([1, 2.0, "2.0", 7], ["1", "2"]).tolist()
    [0, 1, -1, -1]
    >>> codes_of_values([1, 2.0, "2"], ["1.0", "2.0"]).tolist()
    [0, 1, -1]
    """
    place = {name: i for i, name in enumerate(names)}
    codes = [place.get(name_of(value), place.get(_older_name(value), -1)) for value in values]
    return np.array(codes, dtype=np.int64)


def codes_of_column(column: pd.Series, names: Sequence[str]) -> np.ndarray:
    """Return the position of each cell's name in ``names``, as `codes_of_values`; -1 for a missing value."""
    column = column.astype("category")
    # pandas gives missing values the code -1, which looks up the last element: the -1 that is appended.
    return np.append(codes_of_values(column.cat.categories, names), -1)[column.cat.codes]


def codes_of(what: str, names: list[str], asked: str | Sequence[str] | None) -> list[int | None]:
    """Return the codes of one or several names.

    "average" returns all codes. "observed" and None return [None], which stands for each cell's own value. In a list,
    "average" and "observed" are ordinary names. Names that the model does not know raise ValueError; ``what`` is the
    argument to name in the message.

    Examples
    --------
    >>> names = ["a", "b", "c"]
    >>> [codes_of("batch", names, asked) for asked in ("observed", "average", "c", ["c", "a"])]
    [[None], [0, 1, 2], [2], [2, 0]]
    """
    if isinstance(asked, bytes):
        raise TypeError(f"{what}: {shown(asked)} is neither a name nor a list of names.")
    asked = value_or_list(asked)
    if asked is None or (isinstance(asked, str) and asked == "observed"):
        return [None]
    if isinstance(asked, str) and asked == "average":
        return list(range(len(names)))
    several = asked if isinstance(asked, list) else [asked]
    known = ", ".join(names[:12]) + (", ..." if len(names) > 12 else "")
    if not several:
        raise ValueError(f"{what} is an empty list; the model knows: {known}.")
    codes = codes_of_values(several, names).tolist()
    for name, code in zip(several, codes, strict=True):
        if code < 0:
            hint = did_you_mean(name_of(name), names) if isinstance(name, str) else ""
            raise ValueError(f"{what}: {shown(name)} is unknown to the model (it knows: {known}).{hint}")
    return codes


def value_or_list(asked):
    """Return an iterable as a list; a string, an array without axes or any other value as a single value.

    Examples
    --------
    >>> [value_or_list(asked) for asked in ("a", 2.5, None, np.array("a"), ("a", "b"), {"a": 1}.keys())]
    ['a', 2.5, None, 'a', ['a', 'b'], ['a']]
    """
    if getattr(asked, "ndim", None) == 0:
        return asked.item()
    return list(asked) if isinstance(asked, Iterable) and not isinstance(asked, str) else asked


def _older_name(value) -> str | None:
    """Return the name that older versions gave to an integral number as a float; None for all other values."""
    is_number = isinstance(value, Real | np.integer | np.floating) and not isinstance(value, bool)
    return str(float(value)) if is_number and abs(value) < 2**53 and value == value // 1 else None
