"""How the values of categorical columns are named: the one place where they become strings."""

from collections.abc import Iterable, Sequence
from numbers import Real

import numpy as np
import pandas as pd

from scgen.arguments import did_you_mean, shown


def name_of(value) -> str:
    """Return the name of a value: an integral float is named as the integer, so that a change of dtype renames nothing.

    Integers become floats where tables are merged and some rows have no value.

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
    """Return the first row of a column whose value cannot be a category, such as a list; None where all can be.

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
    """Return the place of each value's name among the names, (n,) int64; -1 where it is not among them.

    A model that was saved by an older version may have an integral float named "3.0": numbers are found by that, too.

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
    """Return the same for each cell of a column; a missing value has no name, and the code -1."""
    column = column.astype("category")
    # The code of a missing value is -1, which takes the last of what is looked up.
    return np.append(codes_of_values(column.cat.categories, names), -1)[column.cat.codes]


def codes_of(what: str, names: list[str], asked: str | Sequence[str] | None) -> list[int | None]:
    """Return the codes of one or several names; all for "average"; None, for each cell's own, of "observed" and None.

    A name that is "average" or "observed" itself is asked for in a list. ValueError, which says ``what`` was asked,
    for names that the model does not know.

    Examples
    --------
    >>> names = ["a", "b", "c"]
    >>> [codes_of("batch", names, asked) for asked in ("observed", "average", "c", ["c", "a"])]
    [[None], [0, 1, 2], [2], [2, 0]]
    """
    if isinstance(asked, bytes):
        raise TypeError(f"{what}: {shown(asked)} is no name of one, nor a list of names.")
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
    """Return what can be iterated over as a list, but a string, and an array without axes, as the value that it is.

    Examples
    --------
    >>> [value_or_list(asked) for asked in ("a", 2.5, None, np.array("a"), ("a", "b"), {"a": 1}.keys())]
    ['a', 2.5, None, 'a', ['a', 'b'], ['a']]
    """
    if getattr(asked, "ndim", None) == 0:
        return asked.item()
    return list(asked) if isinstance(asked, Iterable) and not isinstance(asked, str) else asked


def _older_name(value) -> str | None:
    """Return the name that an integral number had as a float; None for all other values."""
    is_number = isinstance(value, Real | np.integer | np.floating) and not isinstance(value, bool)
    return str(float(value)) if is_number and abs(value) < 2**53 and value == value // 1 else None
