"""Validation of JSON from untrusted sources: accepted values, and reasons of refusals."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from sparse_ingest.storage.foreign_json import MAX_BYTES, MAX_DEPTH, checked, parse_json, read_bytes, read_json


@dataclass(frozen=True)
class Shard:
    rows: int
    names: tuple[str, ...] = ()


def test_a_file_is_converted_to_the_expected_type_and_unknown_keys_are_dropped(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"rows": 3, "names": ["x"], "of a newer release": [1]}')
    assert read_json(tmp_path / "a.json", Shard) == Shard(3, ("x",))


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ({"rows": "abc"}, "Expected `int`, got `str` - at `$.rows`"),
        ({"rows": True}, "Expected `int`, got `bool` - at `$.rows`"),
        ({"rows": 1, "names": [5]}, r"Expected `str`, got `int` - at `$.names\[0\]`"),
        ([], "Expected `object`, got `array`"),
        (None, "Expected `object`, got `null`"),
        ({}, "missing required field `rows`"),
    ],
)
def test_a_value_of_the_wrong_type_is_refused_with_its_path(value: object, reason: str) -> None:
    with pytest.raises(ValueError, match=reason.replace("$", r"\$")):
        checked(value, Shard)


@pytest.mark.parametrize("depth", [MAX_DEPTH + 1, 900, 200_000])
@pytest.mark.parametrize(("left", "right"), [("[", "]"), ('{"a":', "}")])
def test_deeply_nested_json_is_refused(depth: int, left: str, right: str) -> None:
    with pytest.raises(ValueError, match="more than 100 levels"):
        parse_json(left * depth + "1" + right * depth)


def test_json_within_the_limit_is_read() -> None:
    value: Any = parse_json("[" * MAX_DEPTH + "]" * MAX_DEPTH)
    for _ in range(MAX_DEPTH - 1):
        (value,) = value
    assert value == []


@pytest.mark.parametrize("content", [b"", b"{", b"\xff", b'{"a": 1} x'])
def test_invalid_json_is_refused(content: bytes) -> None:
    with pytest.raises(ValueError):
        parse_json(content)


def test_a_file_that_is_too_large_is_refused_without_reading_all_of_it(tmp_path: Path) -> None:
    path = tmp_path / "sparse.json"
    with path.open("wb") as file:
        file.truncate(MAX_BYTES * 40)
    with pytest.raises(ValueError, match="at most 67,108,864"):
        read_json(path, dict)


def test_a_file_is_read_completely_or_not_at_all(tmp_path: Path) -> None:
    (tmp_path / "lines").write_bytes(b"a\nb\n")
    assert read_bytes(tmp_path / "lines", 4) == b"a\nb\n"
    with pytest.raises(ValueError, match="at most 3 are read"):
        read_bytes(tmp_path / "lines", 3)


def test_a_named_pipe_is_not_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.json")
    with pytest.raises(ValueError, match="not a regular file"):
        read_json(tmp_path / "pipe.json", dict)
