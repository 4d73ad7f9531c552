"""The values in the stamp of an index, checked: any client with rights on the index can write `_meta`."""

from __future__ import annotations

import re

# The index settings that loads change, and the values that they can have.
CHANGED_BY_LOADS = {
    "refresh_interval": r"-1|0|\d+ *(nanos|micros|ms|[smhd])",
    "number_of_replicas": r"\d+",
    "translog.durability": "request|async",
}


def is_changed_by_loads(name: str, entry: object) -> bool:
    """Return whether loads change this setting, and `entry` has possible values: before and during the load."""
    if name not in CHANGED_BY_LOADS or not isinstance(entry, dict):
        return False
    before, loading = entry.get("before", ""), entry.get("loading")
    possible = re.compile(CHANGED_BY_LOADS[name], re.IGNORECASE)
    values = (loading, loading if before is None else before)
    return all(isinstance(value, str) and possible.fullmatch(value.strip()) for value in values)
