"""A local OpenSearch for tests: its home, its port, and how it is started.

Not in conftest.py: with more than one of those on the path, `import conftest` is a matter of luck.
"""

from __future__ import annotations

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
    """Set environment variables, and put back what was there."""
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
    """A SPARSE_INGEST_HOME of one's own that shares the unpacked distribution and Java with the user's cache.

    Its name is not ASCII, as the home of a user may be. Not under tmp_path: as root the server runs as `nobody`, who
    cannot enter pytest's folders (mode 700).
    """
    download.ensure_distribution(SILENT)
    download.ensure_java(folders.server_account(), SILENT)
    home = Path(tempfile.mkdtemp(prefix="sparse-ingest-tést-"))
    home.chmod(0o755)
    try:
        for folder in (download.distribution_folder(), *folders.cache_home().glob("java-*")):
            if "unfinished" not in folder.name:
                (home / folder.name).symlink_to(folder)
        yield home
    finally:
        shutil.rmtree(home, ignore_errors=True)


def random_free_port() -> int:
    """A free port away from the default ones: other test sessions may look for theirs at the same time."""
    return process.free_port(random.randrange(20_000, 30_000))


class Running(NamedTuple):
    """A started server, and what it was started with."""

    home: Path
    data: Path
    port: int
    pid: int
    url: str


def start_program(home: Path, port: int, data: Path) -> subprocess.Popen[str]:
    """Run `server start` in its own process, with an empty PATH."""
    kept = {name: value for name, value in os.environ.items() if "JAVA" not in name}
    # The quick one of the JVM's two compilers is enough for minutes: a start takes 10.5 s instead of 12.3 s.
    program = (
        "from sparse_ingest.local_server import launch; launch._JVM_OPTIONS += ('-XX:TieredStopAtLevel=1',); "
        "from sparse_ingest.cli.server import server; server()"
    )
    return subprocess.Popen(
        [sys.executable, "-c", program, "start", "--port", str(port), "--heap", "512m", "--data", str(data), "--json"],
        env={**kept, "SPARSE_INGEST_HOME": str(home), "PATH": str(home)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
