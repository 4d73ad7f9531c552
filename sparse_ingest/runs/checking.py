"""Check finished shards against their records in done/, and read them, in one pass.

In: a run, some of its shards. Out: their parts, in order. Each shard is opened once: it is hashed and decoded through
one open file, so its bytes come from the disk once and from the page cache afterwards. A shard at an address is
downloaded to a scratch file first, one at a time. Memory is bounded by a row group.

Not covered: whether an index accepts the documents (cluster/preflight.py).
"""

from __future__ import annotations

import contextlib
import hashlib
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

from sparse_ingest.errors import RunError
from sparse_ingest.runs.run import Run
from sparse_ingest.runs.shards import ShardPart, open_file, read_doc_ids, read_shard
from sparse_ingest.storage.places import Place, RemotePath


def checked_parts(run: Run, shards: Iterable[int]) -> Iterator[ShardPart]:
    """Yield the parts of some finished shards. A shard is hashed before its first part.

    Raises:
        RunError: a shard is missing, or its SHA-256 or number of rows differs from its record in done/.
        StorageError: a shard cannot be fetched, or a web server does not support the range requests of sending.
    """
    for number, shard in enumerate(shards):
        path, record = run.shard_path(shard), run.done(shard)
        if record is None:
            raise RunError(f"{path} is missing, its file in done/ is there. Delete that file and encode again.")
        if not {"sha256", "rows"} <= record.keys():
            raise RunError(f"The file of {path} in done/ names no sha256 or rows. Delete that file and encode again.")
        if number == 0 and isinstance(path, RemotePath) and not path.listable:
            next(read_doc_ids(path), None)  # by ranges, as sending reads: not every web server supports that
        with _local_file(run, path) as local, open_file(local) as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            if digest != record["sha256"]:
                raise RunError(
                    f"{path} has SHA-256 {digest[:12]}, its file in done/ says {str(record['sha256'])[:12]}. "
                    "The shard is damaged: delete that file and encode again, or copy the run anew."
                )
            rows = 0
            for part in read_shard(path, opened=file):
                rows += len(part.rows)
                yield part
        refuse_other_rows(path, rows, record["rows"])


@contextlib.contextmanager
def _local_file(run: Run, path: Place) -> Iterator[Path]:
    """The file of a shard on this machine, downloaded for the block if it is remote."""
    if isinstance(path, Path):
        yield path
        return
    copy = run.scratch_path(path.name)
    try:
        with path.open() as source, copy.open("wb") as target:
            shutil.copyfileobj(source, target, 1 << 20)
        yield copy
    finally:
        copy.unlink(missing_ok=True)


def refuse_other_rows(shard: Place, found: int, recorded: int) -> None:
    """Refuse a shard that holds another number of documents than its file in done/ says.

    Raises:
        RunError: with both numbers.
    """
    if found != recorded:
        raise RunError(
            f"{shard} holds {found} documents, its file in done/ says {recorded}. "
            "The run is damaged: delete that file and encode again."
        )
