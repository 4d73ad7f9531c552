"""Make the shards of a run in several processes of this machine, one per device.

In: devices, a function that builds a `Maker` in a process, and groups of shards. The first process builds its maker
alone, since it creates the run; then each one makes the next group as soon as it is free. Progress of all goes to one
reporter. If a process dies, it is reported and another one makes its group; an error that a user can fix ends all.

Processes are spawned, because CUDA does not survive a fork, and have their own session, so that Ctrl-C reaches this
process only. Each has a pipe: a message asks it to stop after its window, and when the pipe closes it ends immediately.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, Pipe, wait
from multiprocessing.reduction import ForkingPickler
from queue import SimpleQueue
from typing import Any, NamedTuple, TypeAlias

from sparse_ingest.errors import Interrupted, RunError, SparseIngestError, counted, first_line
from sparse_ingest.executors.carrying import Collector, Counts, Forwarder, carried, log_level, raise_carried
from sparse_ingest.reporting import Reporter
from sparse_ingest.runs.run import RunLike

LOOK_S = 0.2  # between checks for stop requests
BEAT_S = 0.1  # between two messages about the progress of a process
SILENT_S = 10.0  # without a message until it is reported, and between reports
END_S = 20.0  # for a process to end before it is killed
_WORK = "import sys; from sparse_ingest.executors.local import work; work(int(sys.argv[1]))"
Maker: TypeAlias = Callable[[range], None]  # makes consecutive shards
Build: TypeAlias = Callable[..., Maker]  # a function of a module, called with a Worker, the arguments, and a Reporter


class Worker(NamedTuple):
    """One of several processes: its device, its number from 0, and how many processes there are."""

    device: str
    number: int = 0
    processes: int = 1


def run_on_devices(
    devices: Sequence[str],
    build: Build,
    arguments: Sequence[Any],
    groups: Callable[[], Sequence[range]],
    *,
    out: RunLike,
    reporter: Reporter,
) -> None:
    """Make all groups of shards of the run `out` in one process per device.

    `groups` is called once, after the first process has built its maker and so created the run.

    Raises:
        SparseIngestError: the error of a process, with its message; or all processes died.
        Interrupted: `reporter` requested a stop.
    """
    team = _Team(build, arguments, out, reporter)
    try:
        team.finish(devices, groups)
    finally:
        team.end()


class _Team:
    """The processes of one run."""

    def __init__(self, build: Build, arguments: Sequence[Any], out: RunLike, reporter: Reporter) -> None:
        # Pickled before `groups` opens files of the corpus.
        self._work = ForkingPickler.dumps((build, arguments))
        self._out, self._reporter = out, reporter
        self._children: list[_Child] = []  # running processes
        self._forwarder = Forwarder(reporter)
        self._reasons: list[str] = []  # of the processes that died
        self._stopped = False
        self._waiting: deque[range] | None = None  # groups that no process makes yet; None before the run is created

    def finish(self, devices: Sequence[str], groups: Callable[[], Sequence[range]]) -> None:
        """Start a process on each device, and give them groups until all are made."""
        workers = deque(Worker(device, number, len(devices)) for number, device in enumerate(devices))
        while (workers or self._children) and not self._made_all():
            if self._waiting is None and any(child.built for child in self._children):
                self._waiting = deque(groups())
                self._note_idle(len(devices))
            self._give(workers)
            for ready in wait([child.connection for child in self._children], LOOK_S):
                self._hear(next(child for child in self._children if child.connection is ready))
            for child in self._children:
                if silence := child.silence():
                    self._reporter.warn(silence)
            if self._stopped or self._reporter.stop_requested():
                self._stop()
                workers.clear()
        if self._made_all():
            return
        kept = f"{self._out} keeps the finished shards and windows. Run the same command again to continue."
        if self._stopped:
            raise Interrupted(f"Stopped on request; {kept}")
        raise RunError(f"No process is left: {'; '.join(self._reasons)}; {kept}")

    def _give(self, workers: deque[Worker]) -> None:
        """Give groups to the processes that have none; start the next process if groups are left for it."""
        if workers and (not self._children or len(self._waiting or ()) > len(self._children)):
            worker = workers.popleft()
            cores = sorted(os.sched_getaffinity(0))
            share = cores[worker.number :: worker.processes] or cores
            self._children.append(_Child(worker, share, self._work))
        for child in self._children:
            if self._waiting and child.built and child.group is None and not self._stopped:
                child.make(self._waiting.popleft())

    def _made_all(self) -> bool:
        return self._waiting is not None and not self._waiting and all(one.group is None for one in self._children)

    def _note_idle(self, devices: int) -> None:
        if self._waiting is not None and len(self._waiting) < devices:
            self._reporter.note(
                f"Only {counted(len(self._waiting), 'shard')} for {devices} devices: some have nothing to do. Smaller "
                "shards (--shard-rows, in a new run) would keep them busy."
            )

    def end(self) -> None:
        """End the remaining processes immediately."""
        for child in self._children:
            child.connection.close()
        for child in self._children:
            child.wait(END_S)
        self._children.clear()

    def _stop(self) -> None:
        """Ask each to stop after its window (encoding/spool.py)."""
        for child in self._children:
            if not child.stop_sent:
                child.stop_sent = True
                with contextlib.suppress(OSError):
                    child.connection.send("stop")
        self._stopped = True

    def _hear(self, child: _Child) -> None:
        """Act on one message of a process, or on its end."""
        child.heard = child.reported = time.monotonic()
        try:
            name, given, collected = child.connection.recv()
        except (EOFError, OSError):
            self._ended(child)
            return
        if collected.detail:
            collected = collected._replace(detail=f"{child.device} {collected.detail}")
        child.counts = self._forwarder.show(child.counts, collected)
        if name == "built":
            child.built = True
        elif name == "made":
            child.group = None
        elif name == "stopped":
            child.finished = True
        elif name == "failed":
            child.finished = True
            kind, arguments = given
            if kind is not Interrupted:
                raise_carried(kind, arguments)
            self._stopped = True
        elif name == "died":
            child.reason = given[0]

    def _ended(self, child: _Child) -> None:
        """Clean up after a process; another one makes what it had in hand."""
        self._children.remove(child)
        child.connection.close()
        child.wait(END_S)
        if child.group is not None and self._waiting is not None:
            self._waiting.appendleft(child.group)
        if not child.finished:
            self._report_death(child)

    def _report_death(self, child: _Child) -> None:
        reason = f"the process on {child.device} died: {child.reason or child.signal()}"
        self._reasons.append(reason)
        remaining = " The remaining processes encode its shards." if self._children else ""
        self._reporter.warn(f"{reason[0].upper()}{reason[1:]}.{remaining}")


class _Child:
    """A process on a device, and the state of its messages."""

    def __init__(self, worker: Worker, cores: Sequence[int], work: memoryview) -> None:
        """`work` has the function that builds a maker, and its arguments, pickled."""
        self.device = worker.device
        self.stop_sent = self.finished = self.built = False
        self.group: range | None = None  # which it makes
        self.reason = ""
        self.counts = Counts()
        self.heard = self.reported = time.monotonic()
        self.connection, theirs = Pipe()
        # It finds the package as this process does, but does not import from the current folder.
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        command = [sys.executable, "-P", "-c", _WORK, str(theirs.fileno())]
        with theirs:
            self._process = subprocess.Popen(
                command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, env=environment, start_new_session=True
            )
        with contextlib.suppress(OSError):  # it has died, and its pipe is closed
            self.connection.send((worker, cores, log_level()))
            self.connection.send_bytes(work)

    def make(self, group: range) -> None:
        """Send it a group to make."""
        self.group = group
        with contextlib.suppress(OSError):  # it has died; its pipe reports that
            self.connection.send(group)

    def silence(self) -> str | None:
        """Return a message about missing heartbeats, if it is time for one."""
        now = time.monotonic()
        if now - self.reported < SILENT_S:
            return None
        self.reported = now
        return (
            f"The process on {self.device} (pid {self._process.pid}) has not reported for {now - self.heard:.0f} s. "
            f"If it was stopped, `kill -CONT {self._process.pid}` lets it continue."
        )

    def wait(self, seconds: float) -> None:
        """Wait for its end, and kill it after some seconds."""
        try:
            self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def signal(self) -> str:
        """Return how it ended, if it sent no reason."""
        code = self._process.returncode
        if code >= 0:
            return f"it ended with exit code {code}"
        name = signal.Signals(-code).name
        return f"{name} ended it" + (", as the system does where memory runs out" if name == "SIGKILL" else "")


def work(descriptor: int) -> None:
    """Make the groups received through a pipe: the main function of a process."""
    connection: Connection[Any, Any] = Connection(descriptor)
    reporter = _PipeReporter(connection)
    signal.signal(signal.SIGTERM, lambda number, frame: reporter.stopping.set())
    # A shell starts background processes with SIGINT ignored, but the listener needs it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    threading.Thread(target=_beat, args=(reporter,), daemon=True).start()
    try:
        last = _done(connection, reporter)
    except (KeyboardInterrupt, EOFError):
        sys.exit(Interrupted.exit_code)
    finally:
        # If the other end closes now, the listener must not interrupt a finished task.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    reporter.send(*last)


def _done(connection: Connection[Any, Any], reporter: _PipeReporter) -> Sequence[Any]:
    """Build a maker, and make groups until there is no other one; return the last message to send."""
    try:
        worker, cores, level = connection.recv()
        reporter.collect_log(level)
        if worker.device == "cpu":
            os.sched_setaffinity(0, cores)  # before a library counts them
        build, arguments = connection.recv()
        groups: SimpleQueue[range | None] = SimpleQueue()  # None: stop
        threading.Thread(target=_listen, args=(connection, reporter.stopping, groups), daemon=True).start()
        maker = build(worker, *arguments, reporter)
        reporter.send("built")
        while (group := groups.get()) is not None:
            maker(group)
            reporter.send("made")
        return ("stopped",)
    except (SparseIngestError, OSError) as error:
        return "failed", *carried(error)
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        reporter.send("died", f"{type(error).__name__}: {first_line(error)}")
        raise


def _beat(reporter: _PipeReporter) -> None:
    """Send progress, and show that the process runs: a batch, or loading a model, may take long."""
    while True:
        reporter.send("alive")
        time.sleep(BEAT_S)


def _listen(connection: Connection[Any, Any], stopping: threading.Event, groups: SimpleQueue[range | None]) -> None:
    """Receive groups and stop requests; end this process when the other end of the pipe is closed."""
    try:
        while True:
            if (received := connection.recv()) == "stop":
                stopping.set()
                groups.put(None)
            else:
                groups.put(received)
    except (EOFError, OSError):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(END_S)  # a call that never returns, as into a GPU that hangs, does not see the signal
        os._exit(Interrupted.exit_code)


class _PipeReporter(Collector):
    """The progress of a process, sent through its pipe with each message."""

    def __init__(self, connection: Connection[Any, Any]) -> None:
        super().__init__()
        self._connection, self._sending = connection, threading.Lock()

    def send(self, name: str, *given: object) -> None:
        """Send a message. If the other end is closed it is dropped, and the listener ends the process."""
        with self._sending, contextlib.suppress(OSError):
            self._connection.send((name, given, self.take()))
