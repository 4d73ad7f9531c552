"""docs/guides/fields.md is right about the types of values."""

from __future__ import annotations

import json
import re
from pathlib import Path

from sparse_ingest.cluster.field_types import FieldValues

PAGE = Path(__file__).parents[2] / "docs" / "guides" / "fields.md"


def test_each_row_of_values_gets_the_type_beside_it() -> None:
    rows = re.findall(r"^\| (`.*`) \| (\w+) \|$", PAGE.read_text(), re.MULTILINE)
    assert len(rows) > 10
    for values, kind in rows:
        seen = FieldValues()
        for value in re.findall(r"`([^`]*)`", values):
            seen.add(json.loads(value))
        assert seen.type == kind, values
