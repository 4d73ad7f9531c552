"""Start a local OpenSearch for tests, with its own home and port.

Not in conftest.py: with several of those on the path, `import conftest` may import any of them.
"""

from __future__ import annotations

import functools
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from sparse_ingest.local_server import download, folders, process
from sparse_ingest.reporting import SILENT


@contextmanager
def environment(**values: str) -> Iterator[None]:
    """Set environment variables, and restore them afterwards."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@contextmanager
def server_home() -> Iterator[Path]:
    """Create a new SPARSE_INGEST_HOME that shares the unpacked distribution and Java with the user's cache.

    Its name is not ASCII, as a user's home may be. Not under tmp_path: as root the server runs as `nobody`, which
    cannot enter pytest's folders (mode 700).
    """
    _ensure_unpacked(folders.cache_home())
    home = Path(tempfile.mkdtemp(prefix="sparse-ingest-tést-"))
    home.chmod(0o755)
    try:
        for folder in (download.distribution_folder(), *folders.cache_home().glob("java-*")):
            if "unfinished" not in folder.name:
                (home / folder.name).symlink_to(folder)
        yield home
    finally:
        shutil.rmtree(home, ignore_errors=True)


@functools.cache
def _ensure_unpacked(_: Path) -> None:
    """Only once for each home: the check reads the sizes of all files and starts Java."""
    download.ensure_distribution(SILENT)
    download.ensure_java(folders.server_account(), SILENT)


@contextmanager
def data_folder() -> Iterator[Path]:
    """Create a folder for the data of a server: in memory if there is room, where an fsync takes 0.03 ms, not 4 ms."""
    memory = Path("/dev/shm")  # noqa: S108
    has_room = os.access(memory, os.W_OK) and shutil.disk_usage(memory).free > 4 << 30
    folder = Path(tempfile.mkdtemp(prefix="sparse-ingest-data-", dir=memory if has_room else None))
    folder.chmod(0o755)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def random_free_port() -> int:
    """Return a free port away from the default ones, which other test sessions may look for at the same time."""
    return process.free_port(random.randrange(20_000, 30_000))


class Running(NamedTuple):
    """A started server and its settings."""

    home: Path
    data: Path
    port: int
    pid: int
    url: str


def start_program(home: Path, port: int, data: Path) -> subprocess.Popen[str]:
    """Run `server start` in its own process with an empty PATH."""
    kept = {name: value for name, value in os.environ.items() if "JAVA" not in name}
    # The JVM's first-tier compiler is enough for a short session: a start takes 10.5 s instead of 12.3 s.
    program = (
        "from sparse_ingest.local_server import launch; launch._JVM_OPTIONS += ('-XX:TieredStopAtLevel=1',); "
        "from sparse_ingest.cli.main import main; main()"
    )
    return subprocess.Popen(
        [
            sys.executable,
            "-c",
            program,
            "server",
            "start",
            "--port",
            str(port),
            "--heap",
            "512m",
            "--data",
            str(data),
            "--json",
        ],
        env={**kept, "SPARSE_INGEST_HOME": str(home), "PATH": str(home)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )  # fmt: skip
