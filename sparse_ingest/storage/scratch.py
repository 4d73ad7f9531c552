"""Folders of this machine for what is made before it goes to a store, and for what a run on the web cannot keep.

A scratch folder belongs to the process that holds a lock on it; one whose process was killed is removed by the next
process that makes one.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
import weakref
from pathlib import Path

_PREFIX = "sparse-ingest-scratch-"


class ScratchFolder:
    """A new folder, removed with this object or at the end of the process."""

    def __init__(self) -> None:
        prefix = f"{_PREFIX}{os.getuid()}-"
        for other in Path(tempfile.gettempdir()).glob(f"{prefix}*"):
            _remove_abandoned(other)
        while True:
            self.path = Path(tempfile.mkdtemp(prefix=prefix))
            lock = _locked(self.path)
            # Another process may have removed it before it had its lock.
            if lock is not None and self.path.exists():
                break
        self._end = weakref.finalize(self, _remove_own, self.path, lock, os.getpid())

    def remove(self) -> None:
        """Remove it now."""
        self._end()


def state_folder() -> Path:
    """Where this user's state lies: SPARSE_INGEST_HOME, else the user's state folder."""
    if own := os.environ.get("SPARSE_INGEST_HOME"):
        return Path(own).absolute()
    base = os.environ.get("XDG_STATE_HOME")
    return (Path(base) if base else Path.home() / ".local" / "state") / "sparse-ingest"


def _locked(folder: Path) -> int | None:
    """A folder opened and locked; None where another process has locked it, or it is gone."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except (FileNotFoundError, PermissionError):
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        return None
    return handle


def _remove_own(folder: Path, lock: int, owner: int) -> None:
    # A forked child holds a copy of the object; the folder belongs to its parent.
    if os.getpid() == owner:
        _remove(folder, lock)


def _remove(folder: Path, lock: int) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    with contextlib.suppress(OSError):
        os.close(lock)


def _remove_abandoned(folder: Path) -> None:
    if (lock := _locked(folder)) is not None:
        _remove(folder, lock)
