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
from sparse_ingest.records import SourceRow
from sparse_ingest.runs.manifest import canonical_json
from sparse_ingest.runs.run import Run
from sparse_ingest.runs.shards import ShardPart
from sparse_ingest.storage.durable import remove_folder, write_atomic

# Of the parts of a window, which are kept in memory until the last one; usual windows have 15 MB. Passages that repeat
# kept fields of a megabyte exceed it, and are not stored.
MAX_BYTES = 256 << 20
_DIGEST_BYTES = 32
logger = logging.getLogger(__name__)


class Finished(NamedTuple):
    """A finished window: its parts with what each row adds to the counts, and its other counts."""

    parts: list[tuple[ShardPart, OfRows]]
    counts: WindowCounts


# An array is its type and its bytes.
_ENCODER = msgspec.msgpack.Encoder(enc_hook=lambda array: (array.dtype.str, array.tobytes()))
_DECODER = msgspec.msgpack.Decoder(Finished, dec_hook=lambda _, stored: np.frombuffer(stored[1], stored[0]))


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
            packed = _ENCODER.encode(window)
            write_atomic(self._folder / name, hashlib.sha256(packed).digest() + packed, sync=False)
        except (StorageError, OSError) as error:
            logger.info("%s is not stored: %s", self._folder / name, error)


def _unpacked(content: bytes, rows: list[SourceRow]) -> Finished:
    packed = memoryview(content)[_DIGEST_BYTES:]
    if hashlib.sha256(packed).digest() != content[:_DIGEST_BYTES]:
        raise ValueError("it is damaged")
    window, places = _DECODER.decode(packed), {row.row: row for row in rows}
    # The process that stored it may have had another name for the same file.
    skipped = [one._replace(file=places[one.row].file, line=places[one.row].line) for one in window.counts.skipped]
    parts = [(part, of_rows.view(OF_ROWS)) for part, of_rows in window.parts]
    return Finished(parts, WindowCounts(window.counts.without_token, skipped))
