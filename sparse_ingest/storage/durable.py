"""Atomic writes that survive a kill and a power cut: under its final name, a file is complete or absent.

In: a local path or an address, and its content. Locally, a temporary file is synced and renamed; at an address
(s3://...) the store makes the write atomic.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from sparse_ingest.errors import StorageError
from sparse_ingest.storage.places import Place, RemotePath

_ATTEMPTS = 5


def write_atomic(path: Place, content: bytes, *, exclusive: bool = False) -> None:
    """Write a file atomically. With `exclusive`, an existing file is kept."""
    if isinstance(path, RemotePath):
        with contextlib.suppress(FileExistsError):
            path.write_whole(content, exclusive=exclusive)
        return
    with new_file(path, exclusive=exclusive) as file:
        file.write(content)


@contextlib.contextmanager
def new_file(path: Path, *, exclusive: bool = False) -> Iterator[BinaryIO]:
    """Open a file that gets its name at the end of the block, complete. With `exclusive`, an existing file is kept."""
    handle, temporary = tempfile.mkstemp(prefix=".new-", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).chmod(0o644)
        if exclusive:
            # A hard link fails if the name exists, so one of two processes wins, with a complete file.
            with contextlib.suppress(FileExistsError):
                os.link(temporary, path)
        else:
            Path(temporary).replace(path)
    finally:
        Path(temporary).unlink(missing_ok=True)
    sync_folder(path.parent)


def move_whole(scratch: Path, target: Place, before: Callable[[], None]) -> None:
    """Move a complete, synced file to its final name, which may be an address.

    `before` is called before each change there, and may raise to prevent it.
    """
    before()
    if not isinstance(target, RemotePath):
        scratch.replace(target)
        sync_folder(target.parent)
        return
    for _ in range(_ATTEMPTS):
        try:
            target.upload(scratch, exclusive=True)
        except FileExistsError:
            # From a killed process, or from this one if the answer was lost. It is deleted first, never overwritten: a
            # delayed request of a process that `before` would stop by now then finds the new file, and fails.
            before()
            target.unlink(missing_ok=True)
        else:
            scratch.unlink()
            return
    raise StorageError(f"{target} is written by another process again and again. Stop that one, and start again.")


def sync_folder(folder: Place) -> None:
    """Sync a folder, so that a rename in it survives a power cut. Does nothing at an address."""
    if isinstance(folder, RemotePath):
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
