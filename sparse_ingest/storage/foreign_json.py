"""JSON from other sources, read with limits on size and depth and checked against a type.

In: bytes, a file or a parsed value, and the expected type: a dataclass, a TypedDict, `dict[str, int]`. Out: a value of
that type, or a ValueError with a short reason, such as "Expected `int`, got `str` - at `$.rows`", to which the caller
adds the file and what to do. Keys that a dataclass or TypedDict lacks are dropped, so that files of newer releases stay
readable.
"""

from __future__ import annotations

import json
import stat
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from sparse_ingest.storage.places import Place

MAX_BYTES = 64 << 20
MAX_DEPTH = 100
LFS_POINTER = b"version https://git-lfs"
NOT_FETCHED = "it is a pointer of Git LFS, not the file: run git lfs pull in its folder"
_TOO_DEEP = f"it is nested more than {MAX_DEPTH} levels deep"
T = TypeVar("T")


def parse_json(content: bytes | str, max_bytes: int = MAX_BYTES) -> Any:
    """Parse JSON.

    Raise `ValueError` if it is not JSON, not UTF-8, larger than `max_bytes`, or nested more than 100 levels deep.
    """
    _refuse_large(content, max_bytes)
    try:
        value = json.loads(content)
    except RecursionError:
        raise ValueError(_TOO_DEEP) from None
    if is_deep(value):
        raise ValueError(_TOO_DEEP)
    return value


def json_parts(content: bytes) -> dict[str, bytes]:
    """Return the unparsed JSON text of each value of a JSON object. Raise ValueError for other content."""
    try:
        return {key: bytes(part) for key, part in msgspec.json.decode(content, type=dict[str, msgspec.Raw]).items()}
    except RecursionError:
        raise ValueError(_TOO_DEEP) from None


def checked(value: object, expected: type[T]) -> T:
    """Return a parsed value as the expected type. Raise ValueError with the place, what was expected, and found."""
    return msgspec.convert(value, expected, dec_hook=lambda kind, given: kind(given))  # such as a Path


def read_json(path: Place, expected: type[T], max_bytes: int = MAX_BYTES) -> T:
    """Read a JSON file. A special file, such as a named pipe, is not opened.

    Raises:
        ValueError: it is not a regular file, or as `parse_json` and `checked`.
        OSError: it cannot be read.
    """
    return checked(parse_json(read_bytes(path, max_bytes), max_bytes), expected)


def read_bytes(path: Place, max_bytes: int = MAX_BYTES) -> bytes:
    """Return the content of a file. Raise ValueError if it is larger than `max_bytes`, or not a regular file."""
    if isinstance(path, Path) and not stat.S_ISREG(path.stat().st_mode):
        raise ValueError("it is not a regular file")
    with path.open("rb") as file:
        content = file.read(max_bytes + 1)
    if content.startswith(LFS_POINTER):
        raise ValueError(NOT_FETCHED)
    _refuse_large(content, max_bytes)
    return content


def _refuse_large(content: bytes | str, max_bytes: int) -> None:
    if len(content) > max_bytes:
        raise ValueError(f"it has too many bytes; at most {max_bytes:,} are read")


def is_deep(value: object) -> bool:
    """Return whether a parsed value is nested deeper than MAX_DEPTH."""
    level: list[Any] = [[value]]
    for _ in range(MAX_DEPTH + 1):
        values = chain.from_iterable(each.values() if isinstance(each, dict) else each for each in level)
        level = [each for each in values if isinstance(each, dict | list)]
        if not level:
            return False
    return True
