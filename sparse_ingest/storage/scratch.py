"""Local folders: scratch space for files before their upload, and the state of read-only runs.

A scratch folder belongs to the process that has locked it. The next process that creates one deletes the folders
of killed processes.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
import weakref
from pathlib import Path
from typing import IO, Any

_PREFIX = "sparse-ingest-scratch-"


class ScratchFolder:
    """A new folder, deleted with this object or at the end of the process."""

    def __init__(self) -> None:
        prefix = f"{_PREFIX}{os.getuid()}-"
        for other in Path(tempfile.gettempdir()).glob(f"{prefix}*"):
            with contextlib.suppress(OSError):  # not a folder, or another user's
                if (abandoned := _locked(other)) is not None:
                    _remove(other, abandoned, os.getpid())
        while True:
            self.path = Path(tempfile.mkdtemp(prefix=prefix))
            # Another process may delete it before it is locked.
            with contextlib.suppress(FileNotFoundError):
                if (lock := _locked(self.path)) is not None and self.path.exists():
                    break
        self._end = weakref.finalize(self, _remove, self.path, lock, os.getpid())

    def close(self) -> None:
        """Delete the folder."""
        self._end()


def try_lock(file: int | IO[Any]) -> bool:
    """Lock an open file or folder until it is closed. Return False if another process has locked it."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def user_folder(variable: str = "XDG_STATE_HOME", in_home: str = ".local/state") -> Path:
    """Return SPARSE_INGEST_HOME, otherwise `sparse-ingest` in the folder of `variable`, or in `in_home` below home."""
    if own := os.environ.get("SPARSE_INGEST_HOME"):
        return Path(own).absolute()
    base = os.environ.get(variable)
    return (Path(base) if base else Path.home() / in_home) / "sparse-ingest"


def _locked(folder: Path) -> int | None:
    """Open and lock a folder of this user, and return its handle; None if another process has the lock.

    Links are not followed, because every user may create names in the folder for temporary files.
    """
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    if os.fstat(handle).st_uid == os.getuid() and try_lock(handle):
        return handle
    os.close(handle)
    return None


def _remove(folder: Path, lock: int, owner: int) -> None:
    # A forked child holds a copy of the object; the folder belongs to its parent.
    if os.getpid() == owner:
        shutil.rmtree(folder, ignore_errors=True)
        with contextlib.suppress(OSError):
            os.close(lock)
