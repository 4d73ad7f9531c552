"""The types of fields: whether a JSON value fits a mapped type, and which type fits all values of a field.

In: the scalar values of one field. Out: whether OpenSearch indexes a value unchanged, or the type to map. A string
counts as a number only if that number is printed the same way, so that nothing is lost: `00501` and `27.90` are
keywords. Values that OpenSearch changes (27.99 in a long becomes 27) do not fit. Each rule was tried on OpenSearch
3.6.0.
"""

from __future__ import annotations

import datetime
import functools
import re
from collections.abc import Mapping
from decimal import Decimal
from typing import Any

from sparse_ingest.reporting import shortened

MAX_KEYWORD = 256  # UTF-16 units: ignore_above of the keywords that a load maps
_MAX_TERM = 32766  # bytes of a keyword without ignore_above
_INTEGERS = {
    "byte": (-(1 << 7), 1 << 7),
    "short": (-(1 << 15), 1 << 15),
    "integer": (-(1 << 31), 1 << 31),
    "long": (-(1 << 63), 1 << 63),
    "unsigned_long": (0, 1 << 64),
}
# The first numbers that round to infinity.
_FLOATS = {"half_float": 65520.0, "float": float((1 << 128) - (1 << 103)), "double": float("inf")}
_CACHED = 4096  # values; many are repeated
_LONGEST = 400  # characters of a number or a date
_PRINTED_INTEGER = re.compile(r"0|-?[1-9]\d{0,18}", re.ASCII)
_PRINTED_DECIMAL = re.compile(r"-?\d{1,17}\.\d{1,17}", re.ASCII)
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d{1,4})?", re.ASCII)
# strict_date_optional_time; year, month, day, time of day, hour, minute, second, fraction, offset.
_DATE = re.compile(
    r"(\d{4})(?:-(\d\d)(?:-(\d\d)(T(?:(\d\d)(?::(\d\d)(?::(\d\d)(?:[.,](\d{1,9}))?)?)?(Z|[+-]\d\d(?::?\d\d)?)?)?)?)?)?",
    re.ASCII,
)


def fits(value: str | float, entry: Mapping[str, Any]) -> bool:
    """Return whether a mapped field indexes a value unchanged; True for types that are not checked here."""
    kind = entry.get("type", "object")
    if kind == "alias":  # of a field: a name for searches only
        return False
    if kind == "keyword":
        short = not isinstance(value, str) or len(value) <= _MAX_TERM // 4 or len(value.encode()) <= _MAX_TERM
        return short or "ignore_above" in entry
    if entry.get("ignore_malformed") in (True, "true"):
        return True
    if kind == "boolean":
        return isinstance(value, bool) or value in ("true", "false")
    if kind == "date":
        return "format" in entry or _is_date(value)
    if kind not in _INTEGERS and kind not in _FLOATS:
        return True
    if isinstance(value, bool):
        return False
    if isinstance(value, str) and (len(value) > _LONGEST or entry.get("coerce", True) in (False, "false")):
        return False
    return _fits_number(value, kind)


@functools.lru_cache(_CACHED, typed=True)
def _fits_number(value: str | float, kind: str) -> bool:
    if isinstance(value, str) and not _NUMBER.fullmatch(value):
        return value == ""  # indexed as no value
    number = Decimal(value)
    if kind in _FLOATS:
        return abs(number) < Decimal(_FLOATS[kind]) and abs(float(number)) != float("inf")
    low, end = _INTEGERS[kind]
    return low <= number < end and number == int(number)


def _is_date(value: str | float) -> bool:
    """Return whether a value is ISO 8601, or milliseconds since 1970. A string such as 20260105 is neither."""
    if isinstance(value, str):
        if len(value) > _LONGEST:
            return False
        return _date_parts(value) is not None or bool(re.fullmatch(r"-?\d{11,18}", value, re.ASCII))
    return not isinstance(value, bool) and abs(value) < 1e15


@functools.lru_cache(_CACHED)
def _date_parts(text: str) -> re.Match[str] | None:
    """Return the parts of a valid date or date and time of at most _LONGEST characters, or None."""
    if (found := _DATE.fullmatch(text)) is None:
        return None
    year, month, day, _, hour, minute, second, _, offset = found.groups()
    try:
        # Python has no year 0; the calendar repeats every 400 years.
        datetime.date(400 + int(year) % 400, int(month or 1), int(day or 1))
        datetime.time(int(hour or 0), int(minute or 0), int(second or 0))
    except ValueError:
        return None
    digits = (offset or "").replace(":", "").removeprefix("Z")
    return found if int(digits[1:3] or 0) * 60 + int(digits[3:] or 0) <= 18 * 60 and digits[3:] < "60" else None


class FieldValues:
    """The kinds of the values of one field."""

    def __init__(self) -> None:
        self.kinds: set[str] = set()
        self.any_string = False
        self.finer = False  # a date has more than milliseconds
        self.long = 0  # strings that a keyword ignores
        self.odd: str | float | None = None  # the first value that is a keyword only because of how it is written
        self._any_word = False
        self._inexact: int | None = None  # the first integer that a double changes

    def add(self, value: str | float) -> None:
        """Count one value."""
        if isinstance(value, str):
            self.any_string = True
            self.count_long(value, MAX_KEYWORD)
            if self._any_word:
                return
        kind = self._kind(value)
        self.kinds.add(kind)
        if kind == "keyword":
            is_word = isinstance(value, str) and value != "" and not _NUMBER.fullmatch(value)
            self._any_word |= is_word
            if is_word or not self.odd:
                self.odd = value

    def count_long(self, value: str, most: int) -> None:
        """Count a value if it is longer than the ignore_above of a keyword."""
        self.long += len(value) > most // 2 and len(value.encode("utf-16-le")) > 2 * most

    def _kind(self, value: str | float) -> str:
        if isinstance(value, bool):
            return "boolean"
        if isinstance(value, float):
            return "double"
        if isinstance(value, str):
            if _PRINTED_DECIMAL.fullmatch(value):
                return "double" if repr(float(value)) == value else "keyword"
            if not _PRINTED_INTEGER.fullmatch(value):
                parts = _date_parts(value) if len(value) <= _LONGEST else None
                if parts is None or parts[3] is None or parts[4] == "T":
                    return "keyword"
                self.finer |= bool((parts[8] or "")[3:].strip("0"))
                return "date"
            value = int(value)
        low, end = _INTEGERS["long"]
        if not low <= value < end:
            return "keyword"
        if self._inexact is None and int(float(value)) != value:
            self._inexact = value
        return "long"

    @property
    def type(self) -> str:
        """The type that keeps every value; keyword if there are no values, or values of several kinds."""
        if self.kinds == {"long", "double"}:
            return "double" if self._inexact is None else "keyword"
        return next(iter(self.kinds)) if len(self.kinds) == 1 else "keyword"

    @property
    def reason(self) -> str | None:
        """The reason why a field with numbers, or with values of several kinds, is a keyword; None for other fields."""
        if self.type != "keyword" or not self.kinds or (self._any_word and self.kinds == {"keyword"}):
            return None
        if self.kinds == {"long", "double"}:
            return f"{self._inexact} is not exact as a double"
        if self.odd == "" or self._any_word:
            kinds = sorted(self.kinds - {"keyword"})
            return f"{shortened(str(self.odd), 40)!r} is not a {' or '.join(kinds)}" if kinds else None
        if not self.kinds <= {"long", "double", "keyword"}:
            return f"it has values of several kinds ({', '.join(sorted(self.kinds))})"
        return f"{self.odd!r} is {'not how that number is printed' if isinstance(self.odd, str) else 'over 64 bits'}"
