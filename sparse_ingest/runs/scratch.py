"""Folders of this machine for what is made before it goes to a run in a store, and for what a web run cannot keep.

A scratch folder belongs to a process that holds a lock in it; one whose process was killed is removed by the next
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

_PREFIX = "sparse-ingest-run-"


class ScratchFolder:
    """A new folder, removed with this object or at the end of the process."""

    def __init__(self) -> None:
        home = Path(tempfile.gettempdir())
        for other in home.glob(f"{_PREFIX}{os.getuid()}-*"):
            _remove_abandoned(other)
        self.path = Path(tempfile.mkdtemp(prefix=f"{_PREFIX}{os.getuid()}-"))
        self._lock = (self.path / "lock").open("w")
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        self._end = weakref.finalize(self, _remove, self.path)


def state_folder() -> Path:
    """Where this user's state lies: SPARSE_INGEST_HOME, else the user's state folder."""
    if own := os.environ.get("SPARSE_INGEST_HOME"):
        return Path(own).absolute()
    base = os.environ.get("XDG_STATE_HOME")
    return (Path(base) if base else Path.home() / ".local" / "state") / "sparse-ingest"


def _remove(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)


def _remove_abandoned(folder: Path) -> None:
    # A folder without a lock file is being made right now, or its maker died in that instant: a few bytes.
    with contextlib.suppress(OSError), (folder / "lock").open("r+") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        _remove(folder)
