"""Python values to canonical JSON: the same bytes for equal rows of any container, or `BadRow`.

How values that JSON lacks are converted:

    NaN, infinity, NaT, pandas.NA          null
    numpy scalars and arrays               their Python values
    date, time, datetime, Timestamp        a string in ISO 8601
    timedelta, Timedelta                   a duration in ISO 8601, as pandas writes it: P1DT2H3M4S
    Decimal                                the number that JSON reads from its digits
    members of enums                       their values
    UUID                                   a string
    tuples                                 lists
    non-string keys of mappings            strings, as Python's json writes them: 1, true
    all other types, such as bytes         `BadRow`
"""

from __future__ import annotations

import datetime
import enum
import math
import sys
import uuid
from collections.abc import Mapping
from decimal import Decimal

import numpy as np
import numpy.typing as npt
import orjson

from sparse_ingest.corpora.documents import BadRow, encode_json
from sparse_ingest.errors import shown

_PLAIN = frozenset({str, int, bool, type(None)})  # types that orjson writes exactly as Python's json does


def type_name(value: object) -> str:
    """Return the type of a value, for messages: `bytes`, `datetime.timedelta`."""
    kind = type(value)
    return kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"


def json_line(row: Mapping[str, object]) -> bytes:
    r"""Return a row as one line of JSON with its `\n`, as `json.dumps` without blanks. Raise `BadRow`.

    Half of a surrogate pair, which UTF-8 cannot encode, is escaped.
    """
    if _PLAIN.issuperset(map(type, row.values())):
        try:
            return orjson.dumps(row, option=orjson.OPT_APPEND_NEWLINE)
        except orjson.JSONEncodeError:  # an integer of more than 64 bits, or half of a surrogate pair
            pass
    spelled = []
    for column, value in row.items():
        try:
            spelled.append(f"{encode_json(column)}:{encode_json(json_value(value))}")
        except BadRow as bad:
            raise BadRow(f"column {shown(column)}: {bad}") from bad
        except RecursionError as error:
            raise BadRow(f"column {shown(column)}: a value is nested too deeply") from error
        except ValueError as error:  # an integer of more digits than Python converts
            reason = str(error).partition(";")[0]
            raise BadRow(f"column {shown(column)}: a number has too many digits: {reason}") from error
    return f"{{{','.join(spelled)}}}\n".encode("utf-8", "backslashreplace")


def json_value(value: object) -> object:
    """Return the JSON value of a Python value. Raise `BadRow`."""
    match value:
        case enum.Enum():
            return json_value(value.value)
        case None | str() | int():
            return value
        case float() | np.floating() | Decimal():
            return _number(value)
        case list() | tuple():
            return [json_value(each) for each in value]
        case Mapping():
            return _object(value)
        case np.ndarray() | np.generic():
            return _numpy(value)
        case datetime.date() | datetime.time() | datetime.timedelta() | uuid.UUID():
            return _text(value)
    if value is getattr(sys.modules.get("pandas"), "NA", None):
        return None
    raise _unknown(value)


def _unknown(value: object) -> BadRow:
    return BadRow(f"JSON has no values of type {type_name(value)}; convert it to a string or a number")


def _numpy(value: npt.NDArray[np.generic] | np.generic) -> object:
    if isinstance(value, np.ndarray):
        return [json_value(each) for each in value] if value.ndim else json_value(value[()])
    if isinstance(value, (np.datetime64, np.timedelta64)):
        if np.isnat(value):
            return None
        # Python has no nanoseconds: numpy gives an integer for them.
        whole = value.astype(f"{value.dtype.kind}8[us]") if value.dtype.name.endswith("[ns]") else value
        if whole == value and not isinstance(whole.item(), int):
            return json_value(whole.item())
        if value.dtype == "datetime64[ns]":
            return str(value)
    elif value.dtype.kind in "biu":
        return value.item()
    raise _unknown(value)


def _number(value: float | np.floating | Decimal) -> float | int | None:
    if isinstance(value, Decimal) and str(value).removeprefix("-").isdecimal():
        return int(value)
    number = float(value)
    if isinstance(value, Decimal) and value.is_finite() and math.isinf(number):
        raise BadRow(f"the number {value} is beyond float64")
    return number if math.isfinite(number) else None


def _text(value: datetime.date | datetime.time | datetime.timedelta | uuid.UUID) -> str | None:
    if value != value:  # pandas.NaT
        return None
    if isinstance(value, uuid.UUID):
        return str(value)
    if not isinstance(value, datetime.timedelta):
        return value.isoformat()
    minutes, seconds = divmod(value.seconds, 60)
    fraction = f".{value.microseconds:06}{getattr(value, 'nanoseconds', 0):03}".rstrip("0.")  # the latter of pandas
    return f"P{value.days}DT{minutes // 60}H{minutes % 60}M{seconds}{fraction}S"


def _object(value: Mapping[object, object]) -> dict[str, object]:
    found: dict[str, object] = {}
    for key, each in value.items():
        name = json_value(key)
        if not isinstance(name, str):
            if not isinstance(name, (int, float)):
                raise BadRow(f"an object has a key of type {type_name(key)}; expected a string or a number")
            name = encode_json(name)
        if name in found:
            raise BadRow(f"an object has the duplicate key {shown(name)}")
        found[name] = json_value(each)
    return found
