"""Several devices: one process for each, which share a run by its shards as any two processes of `encode` do.

In: what `encode` was asked for, and the devices. Out: the progress of all in one, and a run that is complete. The first
process makes the run before the others start, so that what `auto` stands for is decided once. A process that dies is
named with what it said last, and the others make the shards that it left; an error that the user can mend ends all, as
in one process. Each process walks the corpus by itself and passes over what others hold.

Processes are started anew, since CUDA does not survive a fork, and in a session of their own: Ctrl-C reaches this
process alone. Each has a pipe to this one. What is sent down asks it to stop after its shard, and when the pipe closes
it ends at once: so none outlives this process. CPUs share their cores. Not covered: shards and locks (encode.py).
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib.util import find_spec
from multiprocessing.connection import Connection, Pipe, wait
from typing import TYPE_CHECKING, Any

from sparse_ingest import errors
from sparse_ingest.corpora.sources import Corpus, Position
from sparse_ingest.errors import Interrupted, RunError, SparseIngestError, UsageError, first_line
from sparse_ingest.runs.run import has_manifest, open_run
from sparse_ingest.storage.places import Place

if TYPE_CHECKING:
    from sparse_ingest.encoding.shard_maker import Progress

LOOK_S = 0.2  # between looks at the wish to stop, and at whether the run is there
TOLD_S = 0.1  # between two messages about batches
END_S = 20.0  # for a process to end by itself
_WORK = "import sys; from sparse_ingest.executors.local import work; work(int(sys.argv[1]))"


def devices_of(asked: str, corpus: Corpus, out: Place, note: Callable[[str], None]) -> list[str]:
    """The devices that `--device` names; one where several would be of no use.

    Raises:
        UsageError: a device is unknown or not there, or several are to read standard input.
    """
    several = "," in asked
    # What is complete, or one device by name, needs no torch; where that is missing, the job says so.
    if not (several or asked in ("auto", "cuda")) or not find_spec("torch"):
        return [asked]
    if not several and has_manifest(out) and open_run(out).complete():
        return [asked]
    from sparse_ingest.models.documents import choose_devices

    devices = choose_devices(asked)
    if len(devices) > 1 and not corpus.rereadable:
        if several:
            raise UsageError(
                f"--device {asked}: standard input can be read by one process only, and each device has one. Name one "
                "device, or give the corpus as a file."
            )
        note(f"Standard input can be read by one process only: encoding on {devices[0]}, of {len(devices)} GPUs.")
        return devices[:1]
    return devices


def encode_on(
    devices: Sequence[str], out: Place, work: Sequence[Any], progress: Progress, stopping: Callable[[], bool]
) -> None:
    """Make a run complete with a process for each device; `work` is what `encode` was given: corpus, pipeline, options.

    Raises:
        SparseIngestError: of a process, with its sentence; or all of them died.
    """
    if has_manifest(out):
        progress.earlier(_rows_done(out))
    team = _Team(out, work, progress, stopping)
    try:
        team.finish(devices)
    finally:
        team.end()


class _Team:
    """The processes of one run."""

    def __init__(self, out: Place, work: Sequence[Any], progress: Progress, stopping: Callable[[], bool]) -> None:
        self._out, self._work, self._progress, self._stopping = out, work, progress, stopping
        self._children: list[_Child] = []  # those that have not ended
        self._said: set[str] = set()  # notes, and that there was an estimate
        self._reasons: list[str] = []  # of those that died
        self._stopped = self._complete = False

    def finish(self, devices: Sequence[str]) -> None:
        """Start a process on each device, and hear them until all have ended."""
        cores = sorted(os.sched_getaffinity(0))
        waiting = [(device, cores[place :: len(devices)] or cores) for place, device in enumerate(devices)]
        while waiting or self._children:
            if waiting and (not self._children or self._is_begun()):
                device, share = waiting.pop(0)
                self._children.append(_Child(device, share, len(devices), (*self._work, self._out)))
            for ready in wait([child.connection for child in self._children], LOOK_S):
                self._hear(next(child for child in self._children if child.connection is ready))
            if self._stopped or self._stopping():
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
        """End those that are left, at once."""
        for child in self._children:
            child.connection.close()
        for child in self._children:
            child.wait(END_S)
        self._children.clear()

    def _is_begun(self) -> bool:
        return has_manifest(self._out) and open_run(self._out).has_vocabulary()

    def _stop(self) -> None:
        """Ask each to stop after its shard."""
        for child in self._children:
            if not child.asked:
                child.asked = True
                with contextlib.suppress(OSError):
                    child.connection.send("stop")
        self._stopped = True

    def _hear(self, child: _Child) -> None:
        """Do what a process says, or see that it has ended."""
        try:
            name, *given = child.connection.recv()
        except (EOFError, OSError):
            self._children.remove(child)
            child.connection.close()
            child.wait(END_S)
            if not child.finished:
                self._mourn(child)
            return
        if name == "ended":  # none does before the run is complete
            child.finished = self._complete = True
        elif name == "failed":
            child.finished = True
            kind, arguments = given
            if kind is not Interrupted:
                # Past the constructor, which may want more than a sentence.
                raise kind.__new__(kind, *arguments) if issubclass(kind, SparseIngestError) else kind(*arguments)
            self._stopped = True
        elif name == "died":
            child.reason = given[0]
        else:
            self._show(child, name, given)

    def _show(self, child: _Child, name: str, given: Sequence[Any]) -> None:
        """Tell the progress of a process as if it were this one's; once what they all say alike."""
        if name in ("note", "estimate"):
            once = given[0] if name == "note" else name
            if once in self._said:
                return
            self._said.add(once)
        if name == "slowest":
            text = f"{child.device} {given[0]}" if given[0] else ""
            self._progress.stages(lambda: text)
        else:
            getattr(self._progress, name)(*given)

    def _mourn(self, child: _Child) -> None:
        reason = f"the process on {child.device} died: {child.reason or child.signal()}"
        self._reasons.append(reason)
        others = " The others go on, and make what it leaves." if self._children else ""
        self._progress.note(f"{reason[0].upper()}{reason[1:]}.{others}")


class _Child:
    """A process on a device, with what is known of it."""

    def __init__(self, device: str, cores: Sequence[int], processes: int, work: Sequence[Any]) -> None:
        self.device = device
        self.asked = self.finished = False
        self.reason = ""
        self.connection, theirs = Pipe()
        # Found as here, wherever this package lies; nothing else of the folder that we happen to be in.
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        command = [sys.executable, "-P", "-c", _WORK, str(theirs.fileno())]
        with theirs:
            self._process = subprocess.Popen(
                command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, env=environment, start_new_session=True
            )
        with contextlib.suppress(OSError):  # it died meanwhile, which its end of the pipe tells
            self.connection.send((device, cores, processes))
            self.connection.send(work)

    def wait(self, seconds: float) -> None:
        """Wait for its end, and bring it about after so many seconds."""
        try:
            self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def signal(self) -> str:
        """How it ended, where it said nothing."""
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
    told = _Told(connection)
    try:
        last = _encoded(connection, stopping, told)
    except (KeyboardInterrupt, EOFError):
        sys.exit(Interrupted.exit_code)
    finally:
        # The other end may hang up from here on, and the listener would interrupt what is over.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    told.say(*last)


def _encoded(connection: Connection[Any, Any], stopping: threading.Event, told: _Told) -> Sequence[Any]:
    """Encode what comes through the pipe; the last message."""
    try:
        device, cores, processes = connection.recv()
        if device == "cpu":
            os.sched_setaffinity(0, cores)  # before a library looks how many there are
        corpus, pipeline, options, out = connection.recv()
        threading.Thread(target=_listen, args=(connection, stopping), daemon=True).start()
        from sparse_ingest.encoding.encode import encode

        alone = replace(options, device=device, processes=processes)
        encode(corpus, out, pipeline=pipeline, options=alone, progress=told, stopping=stopping.is_set)
        told.flush()
        return ("ended",)
    except SparseIngestError as error:
        # Its class of errors.py: what others add to that is not needed any more.
        kind = next(one for one in type(error).__mro__ if one.__module__ == errors.__name__)
        return "failed", kind, (str(error),)
    except OSError as error:
        return "failed", OSError, (error.errno, error.strerror or str(error), error.filename)
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        told.say("died", f"{type(error).__name__}: {first_line(error)}")
        raise


def _listen(connection: Connection[Any, Any], stopping: threading.Event) -> None:
    """Hear the wish to stop; end this process when nobody is there any more."""
    try:
        while connection.recv() == "stop":
            stopping.set()
    except (EOFError, OSError):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(END_S)  # a call that never comes back, as into a GPU that hangs, sees no signal
        os._exit(Interrupted.exit_code)


class _Told:
    """The progress of a process, told through its pipe; from any of its threads."""

    def __init__(self, connection: Connection[Any, Any]) -> None:
        self._connection, self._lock = connection, threading.Lock()
        self._documents = self._tokens = 0
        self._slowest: Callable[[], str] = str
        self._last = 0.0

    def say(self, name: str, *given: object) -> None:
        """Send one message. One that nobody hears any more is left out: the listener ends the process then."""
        with self._lock, contextlib.suppress(OSError):
            self._connection.send((name, *given))

    def stages(self, slowest: Callable[[], str]) -> None:
        """`slowest` tells at any time which stage holds up the others."""
        self._slowest = slowest

    def note(self, message: str) -> None:
        """Say one sentence."""
        self.say("note", message)

    def estimate(self, sentence: str) -> None:
        """Say what the run will cost."""
        self.say("estimate", sentence)

    def read(self, rows: int, share: float | None) -> None:
        """`rows` of the corpus have been read."""
        self.say("read", rows, share)

    def earlier(self, rows: int) -> None:
        """Not told: it may be the work of another process of these, and what was there before has been counted."""

    def copied(self, documents: int) -> None:
        """Vectors of so many documents were copied."""
        self.say("copied", documents)

    def encoded(self, documents: int, tokens: int) -> None:
        """A batch is done; a fast device has thousands of them a second, which are told together."""
        self._documents += documents
        self._tokens += tokens
        if time.monotonic() - self._last >= TOLD_S:
            self.flush()

    def flush(self) -> None:
        """Tell what has not been told yet."""
        documents, tokens, self._documents, self._tokens = self._documents, self._tokens, 0, 0
        self._last = time.monotonic()
        self.say("encoded", documents, tokens)
        self.say("slowest", self._slowest())


def _rows_done(out: Place) -> int:
    """Rows of the shards that are done."""
    run = open_run(out)
    records = (record for shard in run.done_shards() if (record := run.done(shard)))
    return sum(Position(*record["next"]).row - record["first_row"] for record in records)
