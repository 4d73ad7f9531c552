"""The hash by which a resumed run knows that the rows of a finished shard are still the same.

In: source rows. Out: SHA-256 of one line of canonical JSON a row. The spelling is part of the run format: of a row
with a document `[row,id,text,fields]`, of a bad row `[row,null]`, because its reason is worded by a release and may
hold the path of a file. Not covered: when the hash is compared (encode.py).
"""

from __future__ import annotations

import hashlib
from concurrent.futures import Future, ThreadPoolExecutor

import orjson

from sparse_ingest.records import SourceRow

# Of lines that are hashed at one time. The worker waits up to 5 ms (the interpreter's switch interval) for its turn:
# blocks that are filled sooner, as 256 KB are, are hashed while the reader waits for them (85 instead of 99 MB/s).
_BLOCK_BYTES = 1 << 21


class RowHash:
    """The hash of rows that are added one after the other."""

    def __init__(self) -> None:
        self._digest = hashlib.sha256()
        self._lines = bytearray()
        # hashlib releases the GIL: the next rows are read while these are hashed.
        self._worker = ThreadPoolExecutor(1)
        self._hashing: Future[None] = self._worker.submit(self._digest.update, b"")

    def add(self, row: SourceRow) -> None:
        """Add a row."""
        # The bytes of runs.manifest.canonical_json, five times as fast.
        content = (row.row, None) if row.document is None else (row.row, *row.document)
        self._lines += orjson.dumps(content, option=orjson.OPT_APPEND_NEWLINE)
        if len(self._lines) >= _BLOCK_BYTES:
            self._hashing.result()  # so that no more than two blocks wait
            self._hashing = self._worker.submit(self._digest.update, self._lines)
            self._lines = bytearray()

    def close(self) -> None:
        """End the thread that hashes; no row is added after that."""
        self._worker.shutdown()

    def hexdigest(self) -> str:
        """The hash of all rows that were added so far."""
        self._hashing.result()
        self._digest.update(self._lines)
        self._lines = bytearray()
        return self._digest.hexdigest()
