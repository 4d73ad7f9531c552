"""docs/reference/json-output.md as a schema: what a command prints with `--json` has the keys and types of the page."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

PAGE = Path(__file__).parents[2] / "docs" / "reference" / "json-output.md"
TYPES: dict[str, Any] = {
    "string": (str,), "integer": (int,), "number": (int, float), "boolean": (bool,), "map": (dict,), "list": (list,),
}  # fmt: skip
Tables = dict[str, dict[str, str]]  # name of an object ("" is the printed one) to key to type


def sections() -> dict[str, Tables]:
    """The tables of each command on the page."""
    parts = re.split(r"^## (.+)$", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]
    return {name: _tables(text) for name, text in zip(parts[::2], parts[1::2], strict=True)}


def _tables(text: str) -> Tables:
    tables: Tables = {}
    for table in re.findall(r"(?:^\|.*\n)+", text, flags=re.MULTILINE):
        heading, _, *rows = (line.split("|")[1:3] for line in table.splitlines())
        keys = {key: kind.strip() for names, kind in rows for key in re.findall(r"`([^`]+)`", names)}
        [name] = re.findall(r"`([^`]+)`", heading[0]) or [""]
        tables[name] = keys
    return tables


def check(command: str, *printed: Any) -> None:
    """Compare objects that `command` printed with its section: together they have every key of it, and no other."""
    tables = sections()[command]
    seen: set[tuple[str, str]] = set()
    for one in printed:
        _check_object(one, "", tables, seen)
    unseen = {(name, key) for name, keys in tables.items() for key in keys} - seen
    assert not unseen, f"{command}: the page has keys that were not printed: {unseen}"


def _check_object(found: dict[str, Any], name: str, tables: Tables, seen: set[tuple[str, str]]) -> None:
    keys = tables[name]
    required = {key for key, kind in keys.items() if "absent" not in kind}
    assert required <= found.keys(), f"{name}: not printed: {required - found.keys()}"
    assert found.keys() <= keys.keys(), f"{name}: not on the page: {found.keys() - keys.keys()}"
    for key, value in found.items():
        seen.add((name, key))
        kinds = [kind for kind in keys[key].split(" or ") if kind != "absent"]
        if not (value is None and "null" in kinds):
            _check_value(value, kinds[0], f"{name} {key}", tables, seen)


def _check_value(value: Any, kind: str, place: str, tables: Tables, seen: set[tuple[str, str]]) -> None:
    outer, of, inner = kind.partition(" of ")
    if kind.strip("`") in tables:
        _check_object(value, kind.strip("`"), tables, seen)
    else:
        assert isinstance(value, TYPES[outer]), f"{place}: {value!r} is not {kind}"
        assert isinstance(value, bool) == (outer == "boolean"), f"{place}: {value!r} is not {kind}"
        if of:
            for one in value:
                _check_value(one, inner, place, tables, seen)
