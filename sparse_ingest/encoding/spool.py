"""The finished windows of a shard in progress, so that an interruption costs one window instead of the shard.

In: the parts and counts of each window except the last one of its shard. Out: the same, for the next process that
encodes the shard. A window is a file RUN/tmp/part-00000/KEY.window: a SHA-256 and msgpack. The key is a hash of all
that a window depends on: the run, package versions, type of device, batch_tokens, and the rows of the shard up to its
end. So a window with another budget, of another release or of a changed corpus is not found. A damaged file is ignored,
and its window encoded again. Files are written in a thread, atomically, and not synced.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import msgspec
import numpy as np

from sparse_ingest.encoding.counts import OF_ROWS, OfRows, WindowCounts
from sparse_ingest.errors import StorageError
from sparse_ingest.records import SourceRow, SparseRows
from sparse_ingest.runs.files import SkippedRow
from sparse_ingest.runs.manifest import canonical_json
from sparse_ingest.runs.run import Run
from sparse_ingest.runs.shards import ShardPart
from sparse_ingest.storage.durable import remove_folder, write_atomic

# Of the parts of a window, which are kept in memory until the last one; usual windows have 15 MB. Passages that repeat
# kept fields of a megabyte exceed it, and are not stored.
MAX_BYTES = 256 << 20
_HASH_BYTES = 16  # of a text
_DIGEST_BYTES = 32
logger = logging.getLogger(__name__)


class _Part(msgspec.Struct):
    """A part as it is stored: arrays are bytes of the named types, or of those in `ShardPart`."""

    doc_ids: list[str]
    fields: list[str]
    hashes: bytes
    rows: bytes
    indptr: bytes
    id_type: str
    token_ids: bytes
    weight_type: str
    weights: bytes
    of_rows: bytes


class _File(msgspec.Struct):
    """The content of a file. `skipped` has rows and reasons."""

    parts: list[_Part]
    without_token: int
    skipped: list[tuple[int, str]]


class Finished(NamedTuple):
    """A finished window: its parts with what each row adds to the counts, and its other counts."""

    parts: list[tuple[ShardPart, OfRows]]
    counts: WindowCounts


class Spool:
    """The finished windows of one shard. `versions` are the packages that the bytes of a window depend on."""

    def __init__(self, run: Run, shard: int, versions: Mapping[str, str]) -> None:
        self.run = run
        self._folder = run.spool_path(shard)
        self._earlier: set[str] | None = None  # the names of the files of earlier processes, listed once
        self._basis = [run.manifest.run_id, versions]
        self._parts: list[tuple[ShardPart, OfRows]] = []  # of the window that is not finished
        self._bytes = 0
        self._worker = ThreadPoolExecutor(1)
        self._writing: Future[None] | None = None

    def key(self, *more: object) -> str:
        """Return the key of a window that depends on some more values."""
        return hashlib.sha256(canonical_json([*self._basis, *more]).encode()).hexdigest()[:32]

    def find(self, key: str, rows: list[SourceRow]) -> Finished | None:
        """Return the window of a key, whose documents are from these rows; None if it is not stored, or is damaged."""
        name = f"{key}.window"
        try:
            if self._earlier is None:
                self._earlier = {path.name for path in self._folder.iterdir()} if self._folder.exists() else set()
            if name not in self._earlier:
                return None
            return _unpacked((self._folder / name).read_bytes(), rows)
        except (StorageError, OSError, ValueError, TypeError, KeyError) as error:
            logger.info("%s is not used: %s", self._folder / name, error)
            return None

    def add(self, part: ShardPart, of_rows: OfRows) -> None:
        """Keep a part of a window in memory."""
        self._bytes += sum(map(len, part.fields)) + part.vectors.token_ids.nbytes + part.vectors.weights.nbytes
        if self._bytes <= MAX_BYTES:
            self._parts.append((part, of_rows))

    def finish(self, key: str, counts: WindowCounts) -> None:
        """Store a window with the parts that were added, in the thread and after the previous window."""
        if self._writing:
            self._writing.result()
        if self._bytes <= MAX_BYTES:
            self._writing = self._worker.submit(self._write, f"{key}.window", Finished(self._parts, counts))
        self._parts, self._bytes = [], 0

    def close(self) -> None:
        """Wait until all windows are stored."""
        self._worker.shutdown()

    def remove(self) -> None:
        """Delete all windows, after the shard is done."""
        self.close()
        if self._writing or self._earlier:
            remove_folder(self._folder)

    def _write(self, name: str, window: Finished) -> None:
        # Another process that has finished the same shard may delete the folder at any time.
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            write_atomic(self._folder / name, _packed(window), sync=False)
        except (StorageError, OSError) as error:
            logger.info("%s is not stored: %s", self._folder / name, error)


def _packed(window: Finished) -> bytes:
    counts = window.counts
    parts = [
        _Part(
            doc_ids=list(part.vectors.doc_ids),
            fields=part.fields,
            hashes=b"".join(part.text_hashes),
            rows=part.rows.tobytes(),
            indptr=part.vectors.indptr.astype(np.int64).tobytes(),
            id_type=part.vectors.token_ids.dtype.str,
            token_ids=part.vectors.token_ids.tobytes(),
            weight_type=part.vectors.weights.dtype.str,
            weights=part.vectors.weights.tobytes(),
            of_rows=of_rows.tobytes(),
        )
        for part, of_rows in window.parts
    ]
    skipped = [(row.row, row.reason) for row in counts.skipped]
    packed = msgspec.msgpack.encode(_File(parts, counts.without_token, skipped))
    return hashlib.sha256(packed).digest() + packed


def _unpacked(content: bytes, rows: list[SourceRow]) -> Finished:
    packed = memoryview(content)[_DIGEST_BYTES:]
    if hashlib.sha256(packed).digest() != content[:_DIGEST_BYTES]:
        raise ValueError("it is damaged")
    file, parts = msgspec.msgpack.decode(packed, type=_File), []
    for part in file.parts:
        token_ids, weights = np.frombuffer(part.token_ids, part.id_type), np.frombuffer(part.weights, part.weight_type)
        vectors = SparseRows(part.doc_ids, np.frombuffer(part.indptr, np.int64), token_ids, weights)
        hashes = [part.hashes[place : place + _HASH_BYTES] for place in range(0, len(part.hashes), _HASH_BYTES)]
        numbers, of_rows = np.frombuffer(part.rows, np.uint64), np.frombuffer(part.of_rows, OF_ROWS)
        parts.append((ShardPart(numbers, hashes, vectors, part.fields), of_rows))
    places = {row.row: row for row in rows}
    skipped = [SkippedRow(row, places[row].file, places[row].line, reason) for row, reason in file.skipped]
    return Finished(parts, WindowCounts(file.without_token, skipped))
