"""The table of value types in docs/guides/fields.md is correct."""

from __future__ import annotations

import json
import re
from pathlib import Path

from sparse_ingest.cluster.field_types import FieldValues

PAGE = Path(__file__).parents[2] / "docs" / "guides" / "fields.md"


def test_each_row_of_values_has_the_type_in_the_table() -> None:
    rows = re.findall(r"^\| (`.*`) \| (\w+) \|$", PAGE.read_text(), re.MULTILINE)
    assert len(rows) > 10
    for values, kind in rows:
        seen = FieldValues()
        for value in re.findall(r"`([^`]*)`", values):
            seen.add(json.loads(value))
        assert seen.type == kind, values
