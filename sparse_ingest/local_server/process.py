"""Start, find and stop a local OpenSearch on loopback: a single node without security.

An instance is a port and a data folder. Its record is `instances/PORT/state.json` in the state folder, next to its
configuration and log. A process is ours if its command line has the random token of the record, which survives reused
pids, reboots and changed clocks. Other servers get no requests and no signals.
"""

from __future__ import annotations

import importlib
import json
import secrets
import socket
import subprocess
import time
import urllib.request
from collections import deque
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from sparse_ingest.errors import LocalServerError, needs_extra
from sparse_ingest.local_server import folders
from sparse_ingest.local_server.download import OPENSEARCH_VERSION, ensure_distribution, ensure_java
from sparse_ingest.local_server.launch import CLUSTER_NAME, TOKEN, heap_bytes, java_command, spawn, write_configuration
from sparse_ingest.reporting import SILENT, Reporter
from sparse_ingest.storage.durable import write_atomic
from sparse_ingest.storage.foreign_json import MAX_BYTES, checked, parse_json, read_json

DEFAULT_PORT = 9200
STOP_GRACE_S = 30.0
_RED_S = 5.0  # a red index is reported after this time without recovery
_RECOVERING = ("initializing_shards", "number_of_pending_tasks", "number_of_in_flight_fetch")


@dataclass(frozen=True)
class Instance:
    """The record of a local OpenSearch."""

    url: str
    port: int
    pid: int
    data: Path
    heap: str
    log: Path
    version: str
    started: str
    token: str
    with_ml: bool = False
    already_running: bool = False


def start(
    port: int = DEFAULT_PORT,
    *,
    data: Path | None = None,
    heap: str = "1g",
    with_ml: bool = False,
    timeout_s: float = 120,
    reporter: Reporter = SILENT,
) -> Instance:
    """Start OpenSearch on `port`, unless it is already running, and return when it is healthy.

    `data` is the parent of the data folder sparse-ingest-opensearch, by default the instance's own folder. With
    `with_ml` the server has the machine-learning plugin; one that is running must have it. Raise `LocalServerError` if
    it is not healthy after `timeout_s`; the message has its last log lines.
    """
    heap_bytes(heap)  # refuse a wrong value before downloading
    _psutil()
    account = folders.server_account()
    home, busy = _instance_folder(port), f"Waiting for another process that is starting a server on port {port}"
    with folders.locked(home / "lock", reporter, busy):
        running = _find(port)
        if running is not None:
            return _reuse(running, data, with_ml, timeout_s, reporter)
        if _state_file(port).exists():
            reporter.note(f"The server recorded for port {port} no longer runs; starting a new one")
            _state_file(port).unlink()
        if not _is_free(port):
            raise LocalServerError(
                f"Port {port} is in use by a server that sparse-ingest did not start. Port {free_port(port + 1)} is "
                "free: pass it with --port."
            )
        folder = _data_folder(port, data)
        if other := next((one for one in instances() if one.data == folder), None):
            raise LocalServerError(
                f"The data folder {folder} is in use by the local server on port {other.port}. "
                "Use that one, stop it, or give another --data."
            )
        distribution = ensure_distribution(reporter, with_ml)
        java = ensure_java(account, reporter)
        folders.require_reachable(distribution, account)
        write_configuration(home, port, folder, with_ml=with_ml)
        for path in (home / "config", home / "tmp", folder):
            folders.hand_over(path, account)
        reporter.note(f"Starting OpenSearch {OPENSEARCH_VERSION} on port {port}, data in {folder}")
        token, log = secrets.token_hex(16), home / "logs" / "server.log"
        command = java_command(java, home, distribution, heap=heap, token=token)
        child = spawn(command, distribution, account, log)
        instance = Instance(
            f"http://127.0.0.1:{port}", port, child.pid, folder, heap, log, OPENSEARCH_VERSION,
            started=time.strftime("%Y-%m-%dT%H:%M:%S%z"), token=token, with_ml=with_ml,
        )  # fmt: skip
        return _record(instance, child, timeout_s, reporter)


def stop(port: int | None = None) -> Instance | None:
    """Stop our server on `port`, or the only one. Return it, or None if none is running. Its data is kept."""
    running = [one for one in instances() if port in (None, one.port)]
    if len(running) > 1:
        ports = ", ".join(str(one.port) for one in running)
        raise LocalServerError(f"{len(running)} local servers are running, on ports {ports}. Name one with --port.")
    for instance in running:
        _end(instance)
    return running[0] if running else None


def instances() -> list[Instance]:
    """Return our running servers, by port."""
    names = (path.parent.name for path in (folders.state_home() / "instances").glob("*/state.json"))
    found = map(_find, sorted(int(name) for name in names if name.isdecimal()))
    return [instance for instance in found if instance is not None]


def is_running(port: int) -> bool:
    """Return whether our server is running on `port`."""
    return _find(port) is not None


def free_port(start: int = DEFAULT_PORT) -> int:
    """Return the first free loopback port from `start` on."""
    for port in range(start, 65536):
        if _is_free(port):
            return port
    raise LocalServerError(f"No port from {start} on is free. Stop a server, or give a lower one with --port.")


def health(instance: Instance) -> str:
    """Return the cluster's health (green, yellow or red), or `unreachable`."""
    answer = _ask(instance, "/_cluster/health")
    return str(answer.get("status")) if answer else "unreachable"


def document_count(instance: Instance) -> int | None:
    """Return the number of documents in its indexes; None if it, or a shard, does not answer."""
    answer = _ask(instance, "/_count")
    return int(answer["count"]) if answer and answer["_shards"]["successful"] == answer["_shards"]["total"] else None


def _instance_folder(port: int) -> Path:
    return folders.state_home() / "instances" / str(port)


def _state_file(port: int) -> Path:
    return _instance_folder(port) / "state.json"


def _is_free(port: int) -> bool:
    try:
        # It sets SO_REUSEADDR, so lingering connections of a stopped server do not count.
        socket.create_server(("127.0.0.1", port)).close()
    except OSError:
        return False
    return True


def _psutil() -> Any:
    with needs_extra("local", "The local OpenSearch"):
        return importlib.import_module("psutil")


def _find(port: int) -> Instance | None:
    """Return our running server on `port`; None if its process has ended or its pid was reused."""
    try:
        instance = read_json(_state_file(port), Instance)
    except (OSError, ValueError):
        return None
    return instance if instance.port == port and _process(instance) is not None else None


def _process(instance: Instance) -> Any:
    """Return the instance's `psutil.Process`; None if it has ended or the pid was reused."""
    psutil = _psutil()
    try:
        process = psutil.Process(instance.pid)
        ours = process.status() != psutil.STATUS_ZOMBIE and TOKEN + instance.token in process.cmdline()
    except (psutil.Error, ValueError, OverflowError):  # the last two for invalid pids
        return None
    return process if ours else None


def _data_folder(port: int, data: Path | None) -> Path:
    return _instance_folder(port) / "data" if data is None else data.absolute() / "sparse-ingest-opensearch"


def _reuse(instance: Instance, data: Path | None, with_ml: bool, timeout_s: float, reporter: Reporter) -> Instance:
    if data is not None and _data_folder(instance.port, data) != instance.data:
        raise LocalServerError(
            f"The local server on port {instance.port} runs with the data folder {instance.data}, not "
            f"{_data_folder(instance.port, data)}. Stop it first, or pass another --port."
        )
    if with_ml and not instance.with_ml:
        raise LocalServerError(
            f"The local server on port {instance.port} runs without the machine-learning plugin. Stop it first "
            f"(`sparse-ingest server stop --port {instance.port}`; its data is kept), or pass another --port."
        )
    reporter.note(f"The local server on port {instance.port} is already running")
    _wait(instance, None, timeout_s, reporter)
    return replace(instance, already_running=True)


def _record(instance: Instance, child: subprocess.Popen[bytes], timeout_s: float, reporter: Reporter) -> Instance:
    """Write the record of a new server, and wait until it is healthy."""
    try:
        write_atomic(_state_file(instance.port), json.dumps(asdict(instance), indent=2, default=str).encode())
        _wait(instance, child, timeout_s, reporter)
    except BaseException:
        # Also on Ctrl-C: a server without a record could not be stopped.
        _end(instance)
        child.wait()
        raise
    # The server outlives us: with a return code, Popen does not warn about it.
    child.returncode = 0
    return instance


def _wait(instance: Instance, child: subprocess.Popen[bytes] | None, timeout_s: float, reporter: Reporter) -> None:
    """Wait until the cluster is yellow or green, or red without recovery; then report the red indexes.

    `child` is None if another process started the server. Raise `LocalServerError` if the server exited, or is not
    ready after `timeout_s`.
    """
    deadline = time.monotonic() + timeout_s
    recovering = time.monotonic()
    while True:
        # A child that is ending has no command line before it has an exit code, so of a child only the code counts.
        code = child.poll() if child is not None else None
        if code is not None or (child is None and _process(instance) is None):
            reason = "it ended" if code is None else f"it ended with exit code {code}"
            break
        answer = _ask(instance, "/_cluster/health?level=indices") or {}
        ours = answer.get("cluster_name") == CLUSTER_NAME
        if ours and answer["status"] != "red":
            return
        red = sorted(name for name, one in answer.get("indices", {}).items() if ours and one["status"] == "red")
        if not red or any(answer[count] for count in _RECOVERING):
            recovering = time.monotonic()
        elif time.monotonic() - recovering > _RED_S:
            reporter.warn(
                f"OpenSearch runs at {instance.url}, but shards of {len(red)} of its indexes are missing (red): "
                f"{', '.join(red)}. GET /_cluster/allocation/explain and {instance.log} have the reason. Delete with "
                f"`sparse-ingest index drop --index {red[0]} --force --url {instance.url}`, then load again."
            )
            return
        if time.monotonic() > deadline:
            reason = f"it was not healthy after {timeout_s:g} s"
            break
        time.sleep(0.2)
    with instance.log.open(errors="replace") as lines:
        last = "".join(deque(lines, maxlen=20)).rstrip() or "(the log is empty)"
    raise LocalServerError(
        f"OpenSearch at {instance.url} did not start: {reason}. The last lines of its log ({instance.log}):\n{last}"
    )


def _ask(instance: Instance, path: str) -> Any:
    """Return the JSON response to a GET, or None on an error."""
    # Without the proxies of the environment.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(instance.url + path, timeout=10) as answer:
            return checked(parse_json(answer.read(MAX_BYTES)), dict[str, Any])
    except (OSError, ValueError):
        return None


def _end(instance: Instance) -> None:
    """Stop the process if it is still ours, and delete its record."""
    psutil = _psutil()
    process = _process(instance)
    if process is not None:
        try:
            process.terminate()
            for _ in psutil.wait_procs([process], STOP_GRACE_S)[1]:
                process.kill()
                process.wait(STOP_GRACE_S)
        except psutil.NoSuchProcess:
            pass
        except psutil.Error as error:
            raise LocalServerError(
                f"The local server on port {instance.port} (pid {instance.pid}) cannot be stopped: {error}. "
                "Stop it as the user that started it."
            ) from error
    _state_file(instance.port).unlink(missing_ok=True)
