"""JSON from elsewhere, read with limits on size and depth and checked against a type.

In: bytes, a file or a parsed value, and the type that is expected: a dataclass, a TypedDict, `dict[str, int]`. Out: a
value of that type, or a ValueError with a short reason, such as "Expected `int`, got `str` - at `$.rows`". The caller
knows which file or answer it was, and adds that and what to do.

Keys that a dataclass or TypedDict lacks are dropped, so that files of newer releases stay readable.
"""

from __future__ import annotations

import json
import stat
from io import BufferedReader
from pathlib import Path
from typing import Any, Protocol, TypeVar

import msgspec

MAX_BYTES = 64 << 20
MAX_DEPTH = 100
T = TypeVar("T")


class Readable(Protocol):
    """A file at an address, as `storage.places.RemotePath`."""

    def open(self) -> BufferedReader:
        """Open it for reading."""
        ...


def parse_json(content: bytes | str) -> Any:
    """Parse JSON.

    Raises:
        ValueError: it is no JSON, not UTF-8, larger than 64 MiB, or nested more than 100 levels deep.
    """
    if len(content) > MAX_BYTES:
        raise ValueError(f"it has {len(content):,} bytes; at most {MAX_BYTES:,} are read")
    try:
        value = json.loads(content)
    except RecursionError:
        value = None
        deep = True
    else:
        deep = is_deep(value)
    if deep:
        raise ValueError(f"it is nested more than {MAX_DEPTH} levels deep")
    return value


def checked(value: object, expected: type[T]) -> T:
    """Return a parsed value as the type that is expected.

    Raises:
        ValueError: with the place in it, what was expected there, and what was found.
    """
    return msgspec.convert(value, expected, dec_hook=lambda kind, given: kind(given))  # such as a Path


def read_json(path: Path | Readable, expected: type[T]) -> T:
    """Read a JSON file. Something that is no regular file, such as a named pipe, is not opened.

    Raises:
        ValueError: as `parse_json` and `checked`.
        OSError: it cannot be read.
    """
    if isinstance(path, Path):
        if not stat.S_ISREG(path.stat().st_mode):
            raise ValueError("it is no regular file")
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
    else:
        with path.open() as file:
            content = file.read(MAX_BYTES + 1)
    return checked(parse_json(content), expected)


def is_deep(value: object) -> bool:
    """Return whether containers are nested deeper than MAX_DEPTH."""
    level = [value]
    for _ in range(MAX_DEPTH):
        inner: list[object] = []
        for each in level:
            if isinstance(each, dict):
                inner += (one for one in each.values() if isinstance(one, dict | list))
            elif isinstance(each, list):
                inner += (one for one in each if isinstance(one, dict | list))
        if not inner:
            return False
        level = inner
    return True
