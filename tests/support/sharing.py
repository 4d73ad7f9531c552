"""One server for all workers of a test session, which are processes without a common parent fixture."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path


@contextmanager
def shared(folder: Path, start: Callable[[], AbstractContextManager[str]]) -> Iterator[str]:
    """Yield the address of the server that the first worker starts; that worker ends it when no other one uses it.

    Args:
        folder: The folder of the session, which the workers have in common.
        start: Starts a server, and yields its address.
    """
    folder.mkdir(exist_ok=True)
    address = folder / "address"
    with (folder / "changing.lock").open("w") as changing, (folder / "used.lock").open("w") as used:
        fcntl.flock(changing, fcntl.LOCK_EX)
        if address.exists():
            fcntl.flock(used, fcntl.LOCK_SH)
            fcntl.flock(changing, fcntl.LOCK_UN)
            yield address.read_text()
            return
        with start() as url:
            address.write_text(url)
            fcntl.flock(changing, fcntl.LOCK_UN)
            yield url
            fcntl.flock(changing, fcntl.LOCK_EX)
            fcntl.flock(used, fcntl.LOCK_EX)
            address.unlink()


def session_folder(basetemp: Path) -> Path:
    """Return the folder that the workers of pytest-xdist have in common, or that of the only process."""
    return basetemp.parent if "PYTEST_XDIST_WORKER" in os.environ else basetemp
