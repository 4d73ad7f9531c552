"""Connect to a Ray cluster, or start Ray on this machine; find how many workers it has and what each needs.

A Ray of this machine listens on the loopback interface only, requires a token, and ends with this process.
"""

from __future__ import annotations

import atexit
import os
import secrets
import signal
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, wait
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray
from ray._private import ray_constants

from sparse_ingest.errors import RunError, UsageError, first_line
from sparse_ingest.executors.options import RayOptions
from sparse_ingest.reporting import Reporter
from sparse_ingest.storage.waiting import in_thread, left_behind

STORE_BYTES = 100_000_000  # of the shared memory of a local Ray: results are small
CHECK_S = 5.0  # between two requests to the control service
LOST_S = 30.0  # without its answer until the run ends; Ray aborts the process after 60 s
END_S = 15.0  # for Ray to end
LOOPBACK = "127.0.0.1"


@dataclass
class Pool:
    """The workers of a run, and the state of the cluster."""

    workers: int
    cpus: int
    gpus: int
    accelerator: str | None
    logs: Path
    _nodes: dict[str, str] = field(default_factory=dict)  # address by id
    _pending: Future[Any] | None = None
    _answered: float = field(default_factory=time.monotonic)
    _asked: float = 0.0
    lost: bool = False

    def check(self) -> None:
        """Raise `RunError` if the control service (GCS) of Ray has not answered for `LOST_S`."""
        now = time.monotonic()
        if self._pending is None and now - self._asked >= CHECK_S:
            self._asked, self._pending = now, in_thread(ray.nodes, "nodes of Ray")
        if self._pending is not None and self._pending.done():
            with suppress(Exception):  # as if it had not answered
                self._nodes.update({one["NodeID"]: one["NodeManagerAddress"] for one in self._pending.result()})
                self._answered = now
            self._pending = None
        if now - self._answered > LOST_S:
            self.lost = True
            raise RunError(
                f"The control service of Ray (GCS) has not answered for {LOST_S:.0f} s. What is finished is kept. "
                "Start the cluster again if you started it, then run the same command again."
            )

    def where(self, node: str) -> str:
        """Return where a node is, for messages; nothing if it is unknown, or this machine is the only one."""
        address = self._nodes.get(node)
        return f" on {address}" if address and len(self._nodes) > 1 else ""


@contextmanager
def connected(options: RayOptions, reporter: Reporter) -> Iterator[Pool]:
    """Use the Ray that this process is connected to, or connect to one, or start one, and end that at the end."""
    if ray.is_initialized():
        yield _pool(options, reporter)
        return
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # The driver reports what its workers say and which of them die; Ray would print that on standard output.
    ray._private.worker._worker_logs_enabled = False
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    try:
        if options.address:
            ray.init(address=options.address, **quiet)
        else:
            _start(quiet)
    except (ConnectionError, RuntimeError, ValueError, OSError) as error:
        where = f"connect to {options.address}" if options.address else "start"
        raise RunError(
            f"Ray could not {where}: {first_line(error)}. --address needs a cluster with the same Ray and Python that "
            "this machine is a node of. Without --address Ray runs on this machine only."
        ) from error
    finally:
        _restore(handlers)
    pool = None
    try:
        pool = _pool(options, reporter)
        yield pool
    finally:
        _end(answering=pool is None or not pool.lost)
        _restore(handlers)


def _start(quiet: dict[str, Any]) -> None:
    """Start Ray on this machine."""
    # Otherwise Ray listens on all interfaces. It reads the variable when it is imported, and its processes read it too.
    os.environ[ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR] = "0"
    ray_constants.ENABLE_RAY_CLUSTER = False
    if not (Path.home() / ".ray" / "auth_token").exists():  # Ray would write it
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    cores = len(os.sched_getaffinity(0))
    with _import_path():
        ray.init(address="local", num_cpus=cores, include_dashboard=False, object_store_memory=STORE_BYTES, **quiet)
    if any(node["NodeManagerAddress"] != LOOPBACK for node in ray.nodes()):
        ray.shutdown()
        raise RunError(
            "Ray listens on other interfaces than loopback. Install another version: pip install ray==2.60.0."
        )


@contextmanager
def _import_path() -> Iterator[None]:
    """Let processes started in the block find packages as this process does."""
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    try:
        yield
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before


def _end(*, answering: bool) -> None:
    """End the connection, and a Ray that was started. Without its control service that may take forever."""
    ending = in_thread(ray.shutdown, "end of Ray")
    if wait([ending], END_S if answering else 1.0).not_done or not answering:
        atexit.unregister(ray.shutdown)  # it would wait again
        left_behind.set()


def _restore(handlers: dict[signal.Signals, Any]) -> None:
    """Set the handlers of signals again: Ray replaces that of SIGTERM."""
    if threading.current_thread() is threading.main_thread():
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _pool(options: RayOptions, reporter: Reporter) -> Pool:
    """Return the number of workers and their needs: a GPU each, or a node each where there are none."""
    nodes = [one for one in ray.nodes() if one["Alive"]]
    sizes = [(int(one["Resources"].get("CPU", 0)), int(one["Resources"].get("GPU", 0))) for one in nodes]
    all_gpus = sum(gpus for _, gpus in sizes)
    gpus = options.worker_gpus if options.worker_gpus is not None else min(1, all_gpus)
    usable = [(each_cpus, each_gpus) for each_cpus, each_gpus in sizes if each_cpus and each_gpus >= gpus]
    if gpus:
        workers = options.workers or max(1, sum(each_gpus // gpus for _, each_gpus in usable))
    elif options.worker_cpus:
        workers = options.workers or max(1, sum(each_cpus // options.worker_cpus for each_cpus, _ in usable))
    else:
        workers = options.workers or max(1, len(usable))
    on_node = -(-workers // max(1, len(usable)))
    shares = [each_cpus // max(each_gpus // gpus if gpus else 1, on_node) for each_cpus, each_gpus in usable]
    cpus = options.worker_cpus or max(1, min(shares, default=1))
    if not any(each_cpus >= cpus for each_cpus, _ in usable):
        found = ", ".join(f"{each_cpus} CPUs and {each_gpus} GPUs" for each_cpus, each_gpus in sorted(set(sizes)))
        message = f"No node has the {cpus} CPUs and {gpus} GPUs of a worker (found: {found or 'no node'})"
        if not options.address:
            raise UsageError(f"{message}. Lower --worker-cpus or --worker-gpus.")
        reporter.warn(f"{message}. The run waits until the cluster adds one.")
    logs = Path(ray._private.worker._global_node.get_logs_dir_path())
    found_nodes = {one["NodeID"]: one["NodeManagerAddress"] for one in nodes}
    return Pool(workers, cpus, gpus, options.accelerator, logs, found_nodes)
