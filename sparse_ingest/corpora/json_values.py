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
from collections.abc import Mapping
from decimal import Decimal

import numpy as np
import numpy.typing as npt
import orjson

from sparse_ingest.corpora.documents import BadRow, shown

_PLAIN = frozenset({str, int, bool, type(None)})  # types that orjson writes exactly as Python's json does
_encode = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode


def type_name(value: object) -> str:
    """Return the type of a value, for messages: `bytes`, `datetime.timedelta`."""
    kind = type(value)
    return kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"


def json_line(row: Mapping[str, object]) -> bytes:
    r"""Return a row as one line of JSON with its `\n`, the columns in the order of the row. Raises `BadRow`.

    The bytes are those of Python's `json.dumps` without blanks, in UTF-8; half of a surrogate pair, which UTF-8 cannot
    encode, is escaped.
    """
    if _PLAIN.issuperset(map(type, row.values())):
        try:
            return orjson.dumps(row, option=orjson.OPT_APPEND_NEWLINE)
        except orjson.JSONEncodeError:  # an integer of more than 64 bits, or half of a surrogate pair
            pass
    spelled = []
    for column, value in row.items():
        try:
            spelled.append(f"{_encode(column)}:{_encode(_json(value))}")
        except BadRow as bad:
            raise BadRow(f"the column {shown(column)} holds {bad}") from bad
        except RecursionError as error:
            raise BadRow(f"the column {shown(column)} holds a value that is nested too deeply") from error
        except ValueError as error:  # an integer of more digits than Python converts
            reason = str(error).partition(";")[0]
            raise BadRow(f"the column {shown(column)} holds a number that is too long: {reason}") from error
    return f"{{{','.join(spelled)}}}\n".encode("utf-8", "backslashreplace")


def _json(value: object) -> object:
    """Return the JSON value of a Python value. Raises `BadRow`, whose text completes "the column holds"."""
    match value:
        case None | str() | int():
            return value
        case float() | np.floating() | Decimal():
            return _number(value)
        case list() | tuple():
            return [_json(each) for each in value]
        case Mapping():
            return _object(value)
        case np.ndarray() | np.generic():
            return _numpy(value)
        case datetime.date():
            return value.isoformat() if value == value else None  # of pandas.NaT every comparison is false
    if value is getattr(sys.modules.get("pandas"), "NA", None):
        return None
    raise _unknown(value)


def _unknown(value: object) -> BadRow:
    return BadRow(f"a value of type {type_name(value)}, which JSON does not have; make it a string or a number")


def _numpy(value: npt.NDArray[np.generic] | np.generic) -> object:
    if isinstance(value, np.ndarray):
        return [_json(each) for each in value] if value.ndim else _json(value[()])
    if isinstance(value, np.datetime64):
        # Python has no nanoseconds: numpy gives an integer for them.
        whole = value.astype("datetime64[us]") if value.dtype == "datetime64[ns]" else value
        if np.isnat(value) or (whole == value and isinstance(whole.item(), datetime.date)):
            return _json(whole.item())
    if value.dtype.kind in "biu":
        return value.item()
    raise _unknown(value)


def _number(value: float | np.floating | Decimal) -> float | int | None:
    if isinstance(value, Decimal) and str(value).removeprefix("-").isdecimal():
        return int(value)
    if math.isinf(number := float(value)):
        raise BadRow("infinity, which JSON does not have")
    return None if math.isnan(number) else number


def _object(value: Mapping[object, object]) -> dict[str, object]:
    found: dict[str, object] = {}
    for key, each in value.items():
        if not isinstance(key, (str, int, np.integer)) or isinstance(key, bool):
            raise BadRow(f"an object with a key of type {type_name(key)}; strings or whole numbers were expected")
        name = key if isinstance(key, str) else str(int(key))
        if name in found:
            raise BadRow(f"an object with the key {shown(name)} twice")
        found[name] = _json(each)
    return found
