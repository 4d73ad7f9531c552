"""Python values to canonical JSON.

In: a row, whose values may be of numpy, pandas, Arrow and the standard library. Out: one line of JSON, the same bytes
for equal rows whatever container they came in; or `BadRow`, which names the column and the type.

How values that JSON lacks are converted:

    NaN, NaT, pandas.NA                    null
    numpy scalars and arrays               their Python values
    date, datetime, Timestamp, datetime64  a string in ISO 8601
    Decimal                                the number that JSON reads from its digits
    tuples                                 lists
    integer keys of mappings               strings
    infinity and all other types           `BadRow`
"""

from __future__ import annotations

import datetime
import json
import math
import sys
from collections.abc import Callable, Mapping
from decimal import Decimal
from functools import singledispatch
from typing import NamedTuple, NoReturn

import numpy as np
import numpy.typing as npt
import orjson

from sparse_ingest.corpora.documents import BadRow, shown

_PLAIN = frozenset({str, int, bool, type(None)})  # types that orjson writes exactly as Python's json does
_encode = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode
_encode_ascii = json.JSONEncoder(allow_nan=False, separators=(",", ":")).encode
_LISTED = "biufUO"  # kinds of arrays whose `tolist` gives the values; that of datetime64[ns] gives integers


class Unreadable(NamedTuple):
    """Stands for a row or a value that cannot be read, with the reason."""

    reason: str


def type_name(value: object) -> str:
    """The type of a value, for messages: `bytes`, `datetime.timedelta`."""
    kind = type(value)
    return kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"


class _NotJson(Exception):
    """Its text completes "the column holds"."""


def json_line(row: Mapping[str, object]) -> bytes:
    r"""Return a row as one line of JSON with its `\n`, the columns in the order of the row. Raises `BadRow`.

    The bytes are those of Python's `json.dumps` without blanks, in UTF-8. In a row with half of a surrogate pair, which
    UTF-8 cannot encode, all characters beyond ASCII are escaped.
    """
    if _PLAIN.issuperset(map(type, row.values())):
        try:
            return orjson.dumps(row, option=orjson.OPT_APPEND_NEWLINE)
        except orjson.JSONEncodeError:  # an integer of more than 64 bits, or half of a surrogate pair
            pass
    try:
        return _spelled(row, _encode).encode()
    except UnicodeEncodeError:
        return _spelled(row, _encode_ascii).encode()


def _spelled(row: Mapping[str, object], encode: Callable[[object], str]) -> str:
    spelled = []
    for column, value in row.items():
        try:
            spelled.append(f"{encode(column)}:{_encoded(_json(value), encode)}")
        except _NotJson as error:
            raise BadRow(f"the column {shown(column)} holds {error}") from error
        except RecursionError as error:
            raise BadRow(f"the column {shown(column)} holds a value that is nested too deeply") from error
    return f"{{{','.join(spelled)}}}\n"


def _encoded(value: object, encode: Callable[[object], str]) -> str:
    try:
        return encode(value)
    except ValueError as error:  # an integer of more digits than Python converts
        raise _NotJson(f"a number that is too long: {str(error).partition(';')[0]}") from error


def _json(value: object) -> object:
    if type(value) in _PLAIN:
        return value
    if isinstance(value, (list, tuple)) and not isinstance(value, Unreadable):
        return [_json(each) for each in value]
    return _converted(value)


@singledispatch
def _converted(value: object) -> object:
    """The JSON value of a Python value, by its type."""
    pandas = sys.modules.get("pandas")
    if pandas is not None and value is getattr(pandas, "NA", pandas):
        return None
    _refuse(value)


def _refuse(value: object) -> NoReturn:
    raise _NotJson(f"a value of type {type_name(value)}, which JSON does not have; make it a string or a number")


@_converted.register
def _(value: Unreadable) -> NoReturn:
    raise _NotJson(value.reason)


@_converted.register
def _(value: str) -> str:
    return str.__str__(value)  # of a subclass; str() of an enum is its name


@_converted.register
def _(value: int) -> int:
    return int(value)


@_converted.register
def _(value: np.bool_) -> bool:
    return bool(value)


@_converted.register
def _(value: np.integer) -> int:
    return int(value)


@_converted.register(float)
@_converted.register(np.floating)
def _(value: float) -> float | None:
    number = float(value)
    if math.isinf(number):
        raise _NotJson("infinity, which JSON does not have")
    return None if math.isnan(number) else number


@_converted.register
def _(value: Decimal) -> float | int | None:
    if value.is_nan():
        return None
    digits = str(value)
    if digits.removeprefix("-").isdecimal():
        return int(value)
    if math.isinf(number := float(digits)):
        raise _NotJson(f"{shown(digits)}, which is not a number in JSON, or beyond float64")
    return number


@_converted.register
def _(value: datetime.date) -> str | None:
    # Of pandas.NaT, which is a datetime, every comparison is false.
    return value.isoformat() if value == value else None


@_converted.register
def _(value: np.datetime64) -> str | None:
    if np.isnat(value):
        return None
    whole = value.astype("datetime64[us]") if value.dtype == "datetime64[ns]" else value
    moment = whole.item()
    if not isinstance(moment, datetime.date):  # an int: not within the years 1 to 9999, or finer than nanoseconds
        raise _NotJson(f"the {value.dtype} {value}, which datetime cannot hold")
    if value.dtype != "datetime64[ns]" or whole == value:
        return moment.isoformat()
    return f"{whole}{int(value.astype(np.int64)) % 1000:03}"  # as pandas.Timestamp gives it


@_converted.register
def _(value: np.timedelta64) -> None:  # which numpy counts among the integers
    if not np.isnat(value):
        _refuse(value)


@_converted.register
def _(value: np.ndarray) -> object:
    return _array(value)


def _array(array: npt.NDArray[np.generic]) -> object:
    if array.ndim == 0:
        return _json(array[()])
    return _json(array.tolist() if array.dtype.kind in _LISTED else list(array))


@_converted.register
def _(value: Mapping) -> dict[str, object]:  # type: ignore[type-arg]
    found: dict[str, object] = {}
    for key, each in value.items():
        name = _key(key)
        if name in found:
            raise _NotJson(f"an object with the key {shown(name)} twice")
        found[name] = _json(each)
    return found


def _key(key: object) -> str:
    if isinstance(key, str):
        return str.__str__(key)
    if isinstance(key, (int, np.integer)) and not isinstance(key, (bool, np.timedelta64)):
        return str(int(key))
    raise _NotJson(f"an object with a key of type {type_name(key)}; strings or whole numbers were expected")
