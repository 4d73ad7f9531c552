"""Finished shards, read after a check against their records in done/.

In: a run, some of its shards. Out: their documents, vectors or ids, in order. A shard is hashed before its first value
is used, once in a process as long as the file stays the same; the values are checked as they are read. `checked_parts`
hashes and decodes a shard through one open file, so its bytes come from the disk once and from the page cache
afterwards; a shard at an address is downloaded to a scratch file for that, one at a time. Memory is bounded by a row
group.

Not covered: whether an index accepts the documents (cluster/preflight.py).
"""

from __future__ import annotations

import contextlib
import hashlib
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from sparse_ingest.errors import RunError
from sparse_ingest.records import SparseRows
from sparse_ingest.runs.run import Run
from sparse_ingest.runs.shards import ShardPart, open_file, read_doc_ids, read_shard, read_shard_vectors, reading_shard
from sparse_ingest.storage.places import Place, RemotePath

T = TypeVar("T")
_checked: dict[str, object] = {}  # shards by path: the hash that they had, and the state of the file at that time


def checked_shard(run: Run, shard: int) -> Place:
    """Return the path of a finished shard whose SHA-256 is that of its record in done/.

    Raises:
        RunError: it is missing or damaged, or cannot be read.
    """
    path, record = run.shard_path(shard), run.need_done(shard)
    with reading_shard(path):
        state = _state(path, record["sha256"])
        if _checked.get(str(path)) != state:
            with open_file(path) if isinstance(path, Path) else path.open() as file:
                _refuse_other_hash(path, file, record["sha256"])
            _checked[str(path)] = state
    return path


def finished_shards(run: Run) -> list[int]:
    """Return the numbers of the finished shards of a run whose files belong together.

    Raises:
        RunError: shards were lost or come from another run, or vocab.json is not that of the run.
    """
    run.refuse_mixed()
    run.vocabulary()
    return run.done_shards()


def shard_parts(run: Run, shard: int) -> Iterator[ShardPart]:
    """Yield the parts of a shard after its check; see `read_shard`."""
    return _counted(run, shard, read_shard, lambda part: part.vectors)


def shard_vectors(run: Run, shard: int) -> Iterator[SparseRows]:
    """Yield the vectors of a shard after its check; see `read_shard_vectors`."""
    return _counted(run, shard, read_shard_vectors, lambda vectors: vectors)


def _counted(run: Run, shard: int, read: Callable[..., Iterator[T]], vectors: Callable[[T], SparseRows]) -> Iterator[T]:
    path, rows = checked_shard(run, shard), 0
    for part in read(path, tokens=len(run.vocabulary())):
        rows += len(vectors(part).doc_ids)
        yield part
    _refuse_other_rows(path, rows, run.rows_of(shard))


def checked_parts(run: Run, shards: Iterable[int]) -> Iterator[ShardPart]:
    """Yield the parts of some finished shards. A shard is hashed before its first part.

    Raises:
        RunError: a shard is missing, or its SHA-256 or number of rows differs from its record in done/.
        StorageError: a shard cannot be fetched, or a web server does not support the range requests of sending.
    """
    tokens = len(run.vocabulary())
    for number, shard in enumerate(shards):
        path, record = run.shard_path(shard), run.need_done(shard)
        if number == 0 and isinstance(path, RemotePath) and not path.listable:
            next(read_doc_ids(path), None)  # by ranges, as sending reads: not every web server supports that
        with _local_file(run, path) as local, reading_shard(path), open_file(local) as file:
            state = _state(path, record["sha256"])
            _refuse_other_hash(path, file, record["sha256"])
            _checked[str(path)] = state
            rows = 0
            for part in read_shard(path, opened=file, tokens=tokens):
                rows += len(part.rows)
                yield part
        _refuse_other_rows(path, rows, record["rows"])


def _state(path: Place, sha256: str) -> object:
    """Return what changes if the file is replaced. At an address it is read again only by a new process."""
    about = path.stat() if isinstance(path, Path) else None
    return sha256, about and (about.st_dev, about.st_ino, about.st_size, about.st_mtime_ns)


def _refuse_other_hash(path: Place, file: Any, expected: str) -> None:
    digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != expected:
        raise RunError(
            f"{path} has SHA-256 {digest[:12]}, its file in done/ says {expected[:12]}. "
            "The shard is damaged: delete that file and encode again, or copy the run anew."
        )


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


def _refuse_other_rows(shard: Place, found: int, recorded: int) -> None:
    if found != recorded:
        raise RunError(
            f"{shard} holds {found} documents, its file in done/ says {recorded}. "
            "The run is damaged: delete that file and encode again."
        )
