"""Atomic writes that survive a kill and a power cut: under its final name, a file is complete or absent.

A local temporary file is synced and renamed; at an address (s3://...) the store makes the write atomic.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

from sparse_ingest.errors import StorageError
from sparse_ingest.storage.places import Place, RemotePath

_ATTEMPTS = 5
_NO_LINKS = (errno.EPERM, errno.ENOSYS, errno.EOPNOTSUPP)
_OF_DISKS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS)


@contextlib.contextmanager
def naming(*places: Place) -> Iterator[None]:
    """Add a file name to an `OSError` of the block that has none: the local place with the least free space."""
    try:
        yield
    except OSError as error:
        if error.errno in _OF_DISKS and error.filename is None:
            error.filename = min((str(place) for place in places if isinstance(place, Path)), key=_room, default=None)
        raise


def _room(folder: str) -> int:
    """Return the free bytes of the file system of a path, which need not exist."""
    about = os.statvfs(next(path for path in (Path(folder), *Path(folder).absolute().parents) if path.exists()))
    return about.f_bavail * about.f_frsize


def write_atomic(path: Place, content: bytes, *, exclusive: bool = False, sync: bool = True) -> None:
    """Write a file atomically. With `exclusive`, an existing file is kept; for `sync` see `atomic_file`."""
    if isinstance(path, RemotePath):
        with contextlib.suppress(FileExistsError):
            path.write_whole(content, exclusive=exclusive)
        return
    with atomic_file(path, exclusive=exclusive, sync=sync) as file:
        file.write(content)


@contextlib.contextmanager
def atomic_file(path: Path, *, exclusive: bool = False, sync: bool = True) -> Iterator[IO[bytes]]:
    """Open a local file that is renamed to `path` after the block. With `exclusive`, an existing file is kept.

    Without `sync` it survives a kill, but after a power cut it may be missing or have other bytes.
    """
    handle, temporary = tempfile.mkstemp(prefix=".new-", dir=path.parent)
    try:
        with naming(path), os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            if sync:
                os.fsync(file.fileno())
        Path(temporary).chmod(0o644)
        if exclusive:
            # A hard link fails if the name exists, so one of two processes wins, with a complete file.
            with contextlib.suppress(FileExistsError):
                _link(temporary, path)
        else:
            Path(temporary).replace(path)
    finally:
        Path(temporary).unlink(missing_ok=True)
    if sync:
        sync_folder(path.parent)


def remove_folder(folder: Place) -> None:
    """Delete a folder and the files in it, unless another process does."""
    if isinstance(folder, RemotePath):
        for path in folder.iterdir():
            path.unlink(missing_ok=True)
    else:
        shutil.rmtree(folder, ignore_errors=True)


def open_own(path: Path, flags: int) -> int:
    """Open a regular file for writing, created if it does not exist. Raise OSError for links and special files."""
    handle = os.open(path, flags | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o644)
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise OSError(errno.EINVAL, "it is not a regular file", str(path))
    return handle


def move_whole(scratch: Path, target: Place, before: Callable[[], None]) -> None:
    """Move a complete, synced file to its final name, which may be an address.

    `before` is called before each change of the target, and may raise to prevent it.
    """
    before()
    if not isinstance(target, RemotePath):
        scratch.replace(target)
        sync_folder(target.parent)
        return

    def kept() -> bool:
        # What is there is from a killed process, or from this one if the answer was lost. It is deleted, never
        # overwritten: a delayed upload of a process that has lost its lock then fails at the new file.
        before()
        return False

    add_whole(scratch, target, None, kept)


def add_whole(scratch: Path, target: Place, sha256: str | None, kept: Callable[[], bool]) -> bool:
    """Move a complete, synced file to its final name. Return False if another process's file there is `kept`.

    A file there with this SHA-256 is this one. Another one that is not kept was left by a killed process, and is
    replaced; with None any.
    """
    for _ in range(_ATTEMPTS):
        try:
            if isinstance(target, RemotePath):
                target.upload(scratch, exclusive=True)
            else:
                _link(scratch, target)
        except FileNotFoundError:  # another process has finished the run, and removed this file
            if not kept():
                raise
            return False
        except FileExistsError:
            if kept():
                scratch.unlink(missing_ok=True)
                return False
            if sha256 is None or _sha256_of(target) != sha256:
                target.unlink(missing_ok=True)
                continue
        scratch.unlink(missing_ok=True)
        sync_folder(target.parent)
        return True
    raise StorageError(f"Another process keeps writing {target}. Stop it, then run the command again.")


def _link(source: Path | str, target: Path) -> None:
    """Create a hard link. Raise `StorageError` if the file system has none, such as FAT or a mounted bucket."""
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        raise StorageError(
            f"{target} cannot be created: its file system has no hard links ({error.strerror}). Write to a folder on "
            "another file system, and copy it afterwards."
        ) from error


def _sha256_of(path: Place) -> str | None:
    with contextlib.suppress(FileNotFoundError), path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
    return None


def sync_folder(folder: Place) -> None:
    """Sync a folder, so that a rename in it survives a power cut. Do nothing at an address."""
    if isinstance(folder, RemotePath):
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
