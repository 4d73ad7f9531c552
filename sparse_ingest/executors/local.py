"""Run one task in several processes of this machine, each with a device of its own.

In: devices, an importable task (`package.module:function`) and its arguments. Each process calls
`task(worker, *arguments, reporter)`; the processes share the work by the locks of the run, and one returns when all of
it is done, whoever did it. Out: the progress of all in one reporter. The others start when the first has begun the
run, so that what is decided once is decided by one. When a process dies, its last message is shown and the others do
what it left; an error that a user can fix ends all, as in one process.

Processes are started anew, since CUDA does not survive a fork, and in a session of their own: Ctrl-C reaches this
process alone. Each has a pipe to this one. What is sent down asks it to stop after its shard, and when the pipe closes
it ends at once, so none outlives this process. CPUs share their cores. Not covered: what a task does, and its locks.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from importlib import import_module
from multiprocessing.connection import Connection, Pipe, wait
from typing import Any, NamedTuple

from sparse_ingest import errors
from sparse_ingest.errors import Interrupted, RunError, SparseIngestError, first_line
from sparse_ingest.reporting import Reporter, SilentReporter
from sparse_ingest.runs.run import RunLike, is_begun

LOOK_S = 0.2  # between looks at stop requests, and at whether the run has begun
REPORT_S = 0.1  # between two messages about batches
BEAT_S = 2.0  # between two signs of life of a process
SILENT_S = 10.0  # without one, before it is reported and between reports
END_S = 20.0  # for a process to end before it is killed
_WORK = "import sys; from sparse_ingest.executors.local import work; work(int(sys.argv[1]))"


class Worker(NamedTuple):
    """One of several processes: its device, its number from 0, and how many processes there are."""

    device: str
    number: int = 0
    processes: int = 1


def run_on_devices(
    devices: Sequence[str], task: str, arguments: Sequence[Any], *, out: RunLike, reporter: Reporter
) -> None:
    """Run a task that completes the run `out` in a process for each device, until one of them returns.

    Raises:
        SparseIngestError: of a process, with its message; or all of them died.
        Interrupted: `reporter` asked to stop.
    """
    team = _Team(task, arguments, out, reporter)
    try:
        team.finish(devices)
    finally:
        team.end()


class _Team:
    """The processes of one run."""

    def __init__(self, task: str, arguments: Sequence[Any], out: RunLike, reporter: Reporter) -> None:
        self._task, self._arguments, self._out, self._reporter = task, arguments, out, reporter
        self._children: list[_Child] = []  # those that have not ended
        self._shown: set[str] = set()  # notes, which all processes give alike
        self._reasons: list[str] = []  # of those that died
        self._stopped = self._complete = False

    def finish(self, devices: Sequence[str]) -> None:
        """Start a process on each device, and hear them until all have ended."""
        cores = sorted(os.sched_getaffinity(0))
        waiting = [(device, cores[place :: len(devices)] or cores) for place, device in enumerate(devices)]
        while waiting or self._children:
            if waiting and (not self._children or is_begun(self._out)):
                device, share = waiting.pop(0)
                worker = Worker(device, len(devices) - len(waiting) - 1, len(devices))
                self._children.append(_Child(worker, share, self._task, self._arguments))
            for ready in wait([child.connection for child in self._children], LOOK_S):
                self._hear(next(child for child in self._children if child.connection is ready))
            for child in self._children:
                if silence := child.silence():
                    self._reporter.warn(silence)
            if self._stopped or self._reporter.stop_requested():
                self._stop()
            if self._stopped or self._complete:
                waiting.clear()
        if self._complete:
            return
        if self._stopped:
            raise Interrupted(
                f"Stopped on request after a whole shard; {self._out} keeps what is done. Start again to go on."
            )
        raise RunError(
            f"No process is left: {'; '.join(self._reasons)}. {self._out} keeps what is done. Start again to go on."
        )

    def end(self) -> None:
        """End those that are left, immediately."""
        for child in self._children:
            child.connection.close()
        for child in self._children:
            child.wait(END_S)
        self._children.clear()

    def _stop(self) -> None:
        """Ask each to stop after its shard."""
        for child in self._children:
            if not child.told_to_stop:
                child.told_to_stop = True
                with contextlib.suppress(OSError):
                    child.connection.send("stop")
        self._stopped = True

    def _hear(self, child: _Child) -> None:
        """Act on one message of a process, or on its end."""
        child.heard = child.said = time.monotonic()
        try:
            name, *given = child.connection.recv()
        except (EOFError, OSError):
            self._children.remove(child)
            child.connection.close()
            child.wait(END_S)
            if not child.finished:
                self._report_death(child)
            return
        if name == "ended":  # none does before the run is complete
            child.finished = self._complete = True
        elif name == "failed":
            child.finished = True
            kind, arguments = given
            if kind is not Interrupted:
                # Past the constructor, which may take more than a message.
                raise kind.__new__(kind, *arguments) if issubclass(kind, SparseIngestError) else kind(*arguments)
            self._stopped = True
        elif name == "died":
            child.reason = given[0]
        elif name != "alive":
            self._show(child, name, given)

    def _show(self, child: _Child, name: str, given: Sequence[Any]) -> None:
        """Pass the progress of a process on as if it were this one's; a note that all give only once."""
        if name == "advance":
            count, tokens, detail = given
            detail = f"{child.device} {detail}" if detail else ""
            self._reporter.advance(count, tokens=tokens, detail=detail)
        elif name not in ("note", "warn"):
            getattr(self._reporter, name)(*given)
        elif given[0] not in self._shown:
            self._shown.add(given[0])
            getattr(self._reporter, name)(given[0])

    def _report_death(self, child: _Child) -> None:
        reason = f"the process on {child.device} died: {child.reason or child.signal()}"
        self._reasons.append(reason)
        others = " The others go on, and make what it leaves." if self._children else ""
        self._reporter.warn(f"{reason[0].upper()}{reason[1:]}.{others}")


class _Child:
    """A process on a device, with what is known of it."""

    def __init__(self, worker: Worker, cores: Sequence[int], task: str, arguments: Sequence[Any]) -> None:
        self.device = worker.device
        self.told_to_stop = self.finished = False
        self.reason = ""
        self.heard = self.said = time.monotonic()
        self.connection, theirs = Pipe()
        # The package is found as here, wherever it is; nothing else of the current folder is.
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        command = [sys.executable, "-P", "-c", _WORK, str(theirs.fileno())]
        with theirs:
            self._process = subprocess.Popen(
                command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, env=environment, start_new_session=True
            )
        with contextlib.suppress(OSError):  # it has died, which the end of its pipe shows
            self.connection.send((worker, cores))
            self.connection.send((task, arguments))

    def silence(self) -> str | None:
        """Return for how long it has given no sign of life, if that is to be reported now."""
        now = time.monotonic()
        if now - self.said < SILENT_S:
            return None
        self.said = now
        return (
            f"The process on {self.device} (pid {self._process.pid}) has not reported for {now - self.heard:.0f} s. "
            f"If it was stopped, `kill -CONT {self._process.pid}` lets it continue."
        )

    def wait(self, seconds: float) -> None:
        """Wait for its end, and kill it after this time."""
        try:
            self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def signal(self) -> str:
        """How it ended, where it sent no reason."""
        code = self._process.returncode
        if code >= 0:
            return f"it ended with exit code {code}"
        name = signal.Signals(-code).name
        return f"{name} ended it" + (", as the system does where memory runs out" if name == "SIGKILL" else "")


def work(descriptor: int) -> None:
    """What a process does: the work that comes through its pipe."""
    connection: Connection[Any, Any] = Connection(descriptor)
    stopping = threading.Event()
    signal.signal(signal.SIGTERM, lambda number, frame: stopping.set())
    # What a shell starts in the background ignores it, and so would we; the listener needs it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    reporter = _PipeReporter(connection, stopping)
    threading.Thread(target=_beat, args=(reporter,), daemon=True).start()
    try:
        last = _done(connection, reporter)
    except (KeyboardInterrupt, EOFError):
        sys.exit(Interrupted.exit_code)
    finally:
        # The other end may hang up from here on, and the listener would interrupt what is over.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    reporter.send(*last)


def _done(connection: Connection[Any, Any], reporter: _PipeReporter) -> Sequence[Any]:
    """Do the task that comes through the pipe, and return the last message."""
    try:
        worker, cores = connection.recv()
        if worker.device == "cpu":
            os.sched_setaffinity(0, cores)  # before a library looks how many there are
        task, arguments = connection.recv()
        threading.Thread(target=_listen, args=(connection, reporter.stopping), daemon=True).start()
        module, _, function = task.partition(":")
        getattr(import_module(module), function)(worker, *arguments, reporter)
        reporter.flush()
        return ("ended",)
    except SparseIngestError as error:
        # Its class of errors.py: what a subclass adds is not needed any more.
        kind = next(one for one in type(error).__mro__ if one.__module__ == errors.__name__)
        return "failed", kind, (str(error),)
    except OSError as error:
        return "failed", OSError, (error.errno, error.strerror or str(error), error.filename)
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        reporter.send("died", f"{type(error).__name__}: {first_line(error)}")
        raise


def _beat(reporter: _PipeReporter) -> None:
    """Send signs of life: a batch, or loading a model, may take long."""
    while True:
        reporter.send("alive")
        time.sleep(BEAT_S)


def _listen(connection: Connection[Any, Any], stopping: threading.Event) -> None:
    """Receive stop requests; end this process when the other end of the pipe is gone."""
    try:
        while connection.recv() == "stop":
            stopping.set()
    except (EOFError, OSError):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(END_S)  # a call that never comes back, as into a GPU that hangs, sees no signal
        os._exit(Interrupted.exit_code)


class _PipeReporter(SilentReporter):
    """The progress of a process, sent through its pipe from any of its threads."""

    def __init__(self, connection: Connection[Any, Any], stopping: threading.Event) -> None:
        self._connection, self._lock = connection, threading.Lock()
        self.stopping = stopping
        self._count = self._tokens = 0
        self._detail = ""
        self._last = 0.0

    def send(self, name: str, *given: object) -> None:
        """Send one message. When the other end is gone it is dropped: the listener ends the process then."""
        with self._lock, contextlib.suppress(OSError):
            self._connection.send((name, *given))

    def expect(self, total: int) -> None:  # noqa: D102 - see Reporter
        self.send("expect", total)

    def earlier(self, count: int) -> None:  # noqa: D102
        self.send("earlier", count)

    def note(self, message: str) -> None:  # noqa: D102
        self.send("note", message)

    def warn(self, message: str) -> None:  # noqa: D102
        self.send("warn", message)

    def stop_requested(self) -> bool:  # noqa: D102
        return self.stopping.is_set()

    def advance(self, count: int, *, tokens: int = 0, detail: str = "") -> None:
        """A fast device finishes thousands of batches/s, which are sent together."""
        self._count += count
        self._tokens += tokens
        self._detail = detail
        if time.monotonic() - self._last >= REPORT_S:
            self.flush()

    def flush(self) -> None:
        """Send what has not been sent yet."""
        count, tokens, self._count, self._tokens = self._count, self._tokens, 0, 0
        self._last = time.monotonic()
        self.send("advance", count, tokens, self._detail)
