"""Finished shards, read after a check against their records in done/.

In: a run, some of its shards. Out: their documents, vectors or ids, in order. A shard is hashed before its first value
is used, once per process as long as the file stays the same; values are checked as they are read. Memory is bounded by
a row group. Whether an index accepts the documents is checked in cluster/preflight.py.
"""

from __future__ import annotations

import contextlib
import hashlib
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from sparse_ingest.errors import RunError
from sparse_ingest.records import SparseRows
from sparse_ingest.runs.run import Run
from sparse_ingest.runs.shards import (
    ShardPart,
    find_doc_ids,
    open_file,
    read_doc_ids,
    read_row,
    read_shard,
    read_shard_vectors,
    reading_shard,
)
from sparse_ingest.storage.places import Place, RemotePath

T = TypeVar("T", ShardPart, SparseRows)
_checked: dict[str, object] = {}  # the hash of each shard by path, and the state of its file when it was hashed


def checked_shard(run: Run, shard: int) -> Place:
    """Return the path of a finished shard. Raise `RunError` if it is missing, unreadable or has another SHA-256."""
    path, record = run.shard_path(shard), run.need_done(shard)
    with reading_shard(path):
        if _checked.get(str(path)) != _state(path, record["sha256"]):
            with open_file(path) if isinstance(path, Path) else path.open() as file:
                _check_hash(path, file, record["sha256"])
    return path


def finished_shards(run: Run) -> list[int]:
    """Return the numbers of the finished shards. Raise `RunError` if shards, records and vocab.json do not match."""
    run.refuse_mixed()
    run.vocabulary()
    return run.done_shards()


def shard_parts(run: Run, shard: int) -> Iterator[ShardPart]:
    """Yield the parts of a shard after its check; see `read_shard`."""
    path = checked_shard(run, shard)
    yield from _counted(path, run.rows_of(shard), read_shard(path, tokens=len(run.vocabulary())))


def shard_vectors(run: Run, shard: int) -> Iterator[SparseRows]:
    """Yield the vectors of a shard after its check; see `read_shard_vectors`."""
    path = checked_shard(run, shard)
    yield from _counted(path, run.rows_of(shard), read_shard_vectors(path, tokens=len(run.vocabulary())))


class DocumentPlace(NamedTuple):
    """The location of a document: its shard, its row group, its place in the group, and its place in all shards."""

    shard: int
    group: int
    place: int
    position: int


def find_documents(run: Run, shards: Iterable[int], doc_ids: Iterable[str]) -> dict[str, DocumentPlace]:
    """Return the place of each of these documents that some finished shards have.

    Only the ids are read, up to the shard of the last document. They are not checked against the hash of the shard.
    """
    found: dict[str, DocumentPlace] = {}
    wanted, first = dict.fromkeys(doc_ids), 0
    for shard in shards:
        if not wanted:
            break
        for doc_id, group, place, row in find_doc_ids(run.shard_path(shard), list(wanted)):
            found.setdefault(doc_id, DocumentPlace(shard, group, place, first + row))
            wanted.pop(doc_id, None)
        first += run.rows_of(shard)
    return found


def read_document(run: Run, found: DocumentPlace) -> ShardPart:
    """Return one document, from its row group, after the check of its shard; see `read_shard`."""
    return read_row(checked_shard(run, found.shard), found.group, found.place, tokens=len(run.vocabulary()))


def checked_parts(run: Run, shards: Iterable[int]) -> Iterator[ShardPart]:
    """Yield the parts of some finished shards. A shard is hashed before its first part.

    It is hashed and decoded through one open file, so the second read comes from the page cache; a shard at an address
    is first downloaded to a scratch file.

    Raises:
        RunError: a shard is missing, or its SHA-256 or number of rows differs from its record in done/.
        StorageError: a shard cannot be fetched, or a web server does not support range requests, which the load needs.
    """
    tokens = len(run.vocabulary())
    for number, shard in enumerate(shards):
        path, record = run.shard_path(shard), run.need_done(shard)
        if number == 0 and isinstance(path, RemotePath) and not path.listable:
            next(read_doc_ids(path), None)  # with range requests, as the load does: not every web server supports them
        with _local_file(run, path) as local, reading_shard(path), open_file(local) as file:
            _check_hash(path, file, record["sha256"])
            yield from _counted(path, record["rows"], read_shard(path, opened=file, tokens=tokens))


def _state(path: Place, sha256: str) -> object:
    """Return a value that changes if the file is replaced; a shard at an address is hashed once per process."""
    about = path.stat() if isinstance(path, Path) else None
    return sha256, about and (about.st_dev, about.st_ino, about.st_size, about.st_mtime_ns)


def _check_hash(path: Place, file: Any, expected: str) -> None:
    state = _state(path, expected)
    digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != expected:
        raise RunError(
            f"{path} has SHA-256 {digest[:12]}, but its record in done/ has {expected[:12]}. "
            "The shard is damaged: delete that record and encode again, or copy the run again."
        )
    _checked[str(path)] = state


@contextlib.contextmanager
def _local_file(run: Run, path: Place) -> Iterator[Path]:
    """Yield the file of a shard on this machine; a remote one is downloaded for the block."""
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


def _counted(shard: Place, recorded: int, parts: Iterator[T]) -> Iterator[T]:
    """Yield the parts. Raise `RunError` if they have another number of documents than the record in done/."""
    found = 0
    for part in parts:
        found += len(part.rows if isinstance(part, ShardPart) else part.doc_ids)
        yield part
    if found != recorded:
        raise RunError(
            f"{shard} has {found} documents, but its record in done/ has {recorded}. "
            "The run is damaged: delete that record and encode again."
        )
