"""The hash by which a resumed run knows that the rows of a finished shard are still the same.

In: source rows. Out: SHA-256 of one line of canonical JSON a row. The spelling is part of the run format: of a row
with a document `[row,id,text,fields]`, of a bad row `[row,null]`, because its reason is worded by a release and may
hold the path of a file. Not covered: when the hash is compared (encode.py).
"""

from __future__ import annotations

import hashlib

import orjson

from sparse_ingest.records import SourceRow


class RowHash:
    """The hash of rows that are added one after the other."""

    def __init__(self) -> None:
        self._digest = hashlib.sha256()

    def add(self, row: SourceRow) -> None:
        """Add a row."""
        # The bytes of runs.identity.canonical_json, five times as fast.
        content = (row.row, None) if row.document is None else (row.row, *row.document)
        self._digest.update(orjson.dumps(content, option=orjson.OPT_APPEND_NEWLINE))

    def hexdigest(self) -> str:
        """The hash of all rows that were added so far."""
        return self._digest.hexdigest()
