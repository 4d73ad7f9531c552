"""Files that survive a kill and a power cut: whole under their final name, or not there.

At an address (s3://...) that is what the store does: an object is seen when it is complete.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

from sparse_ingest.errors import StorageError
from sparse_ingest.storage.places import Place, RemotePath

_ATTEMPTS = 5


def write_atomic(path: Place, content: bytes, *, exclusive: bool = False) -> None:
    """Write a file under a temporary name, fsync it, and give it its final name.

    With `exclusive`, a file that is already there stays as it is.
    """
    if isinstance(path, RemotePath):
        with contextlib.suppress(FileExistsError):
            path.write_whole(content, exclusive=exclusive)
        return
    handle, temporary = tempfile.mkstemp(prefix=".new-", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).chmod(0o644)
        if exclusive:
            # A hard link fails when the name exists, so of two processes one wins with a whole file.
            with contextlib.suppress(FileExistsError):
                os.link(temporary, path)
        else:
            Path(temporary).replace(path)
    finally:
        Path(temporary).unlink(missing_ok=True)
    sync_folder(path.parent)


def move_whole(scratch: Path, target: Place, before: Callable[[], None]) -> None:
    """Give a file that is complete and synced its final name, which may lie in a store.

    `before` is called before anything changes there, and may refuse.
    """
    before()
    if isinstance(target, RemotePath):
        _create(scratch, target, before)
        scratch.unlink()
        return
    scratch.replace(target)
    sync_folder(target.parent)


def _create(source: Path, target: RemotePath, before: Callable[[], None]) -> None:
    """Upload a file. One that is there is removed first and never replaced: a request that is late, from a process
    that `before` would refuse by now, must find it and fail.
    """
    for _ in range(_ATTEMPTS):
        try:
            return target.upload(source, exclusive=True)
        except FileExistsError:
            # Left by a process that was killed, or our own, if the answer was lost.
            before()
            target.unlink(missing_ok=True)
    raise StorageError(f"{target} is written by another process again and again. Stop that one, and start again.")


def sync_folder(folder: Place) -> None:
    """Make a rename in `folder` survive a power cut."""
    if isinstance(folder, RemotePath):
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
