"""What runs in the worker processes of Ray: a task that makes one group of shards, and the mailbox of the run.

A process builds its maker (and loads the model) for its first group, and keeps it for the next ones. While it
works it sends its progress and messages to the mailbox every second; the answer says whether to stop. The driver
(ray.py) empties the mailbox.
"""

from __future__ import annotations

import fcntl
import os
import pickle
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, NamedTuple

from sparse_ingest.errors import SparseIngestError, first_line
from sparse_ingest.executors.carrying import Collected, Collector, Counts, carried
from sparse_ingest.executors.local import Worker

BEAT_S = 1.0  # between two beats of a process
ANSWER_S = 10.0  # for the mailbox to answer
_held: list[IO[str]] = []  # locks of the cores of this process
_kept: _Kept | None = None


class Beat(NamedTuple):
    """What a process reports of an attempt. `making`: the maker is built."""

    attempt: int
    node: str
    making: bool
    collected: Collected


class Outcome(NamedTuple):
    """How an attempt ended.

    `made` with a result; `failed` with an exception (carrying.py); `died` with a reason; `unfit` with the reason why
    the process cannot read what the driver sent.
    """

    kind: str
    value: Any
    seconds: float  # without building the maker
    last: Beat


@dataclass(frozen=True)
class Work:
    """What all tasks of a run share, sent once."""

    token: str  # of the run: another one means another maker
    build: Callable[..., Callable[[range], object]]
    arguments: tuple[Any, ...]
    workers: int
    cpus: int
    device: str
    folder: str  # the driver's, for relative paths
    imports_folder: bool
    level: int  # of the log records to send


@dataclass
class _Kept:
    token: str
    reporter: TaskReporter
    make: Callable[[range], object]


@dataclass
class Mailbox:
    """An actor that keeps the latest beat of each attempt until the driver fetches them."""

    _beats: dict[int, Beat] = field(default_factory=dict)
    _stopping: set[int] | None = field(default_factory=set)

    def send(self, beat: Beat) -> bool:
        """Keep a beat. Return whether the attempt should stop."""
        if earlier := self._beats.get(beat.attempt):
            beat.collected.messages[:0] = earlier.collected.messages
        self._beats[beat.attempt] = beat
        return self._stopping is None or beat.attempt in self._stopping

    def receive(self, stopping: set[int] | None) -> list[Beat]:
        """Return the beats since the last call. `stopping` has the attempts that should stop; None means all."""
        self._stopping = stopping
        beats, self._beats = list(self._beats.values()), {}
        return beats


def make_group(work: list[Any], group: range | None, attempt: int, mailbox: Any) -> Outcome:
    """Make a group of shards: the task. With None, only build the maker.

    `work` has the reference of a pickled `Work`, in a list so that Ray does not send it again to a process that has it.
    """
    import ray

    global _kept
    reporter = _kept.reporter if _kept else TaskReporter()
    reporter.start(attempt, ray.get_runtime_context().get_node_id(), mailbox)
    began, value = time.monotonic(), None
    try:
        shared: Work = pickle.loads(ray.get(work[0]))
    except (ImportError, AttributeError) as error:
        return Outcome("unfit", first_line(error), 0.0, reporter.end())
    try:
        if _kept is None or _kept.token != shared.token:
            _kept = None  # frees the memory of the other model
            _kept = _Kept(shared.token, reporter, _built(shared, reporter))
        reporter.making, began = True, time.monotonic()
        if group is not None:
            value = _kept.make(group)
        kind = "made"
    except (SparseIngestError, OSError) as error:
        kind, value, _kept = "failed", carried(error), None  # the maker may be in the middle of a shard
    except BaseException as error:  # also what ray.cancel raises; the maker may be broken
        traceback.print_exc()  # into the logs of Ray
        kind, value, _kept = "died", f"{type(error).__name__}: {first_line(error)}", None
    return Outcome(kind, value, time.monotonic() - began, reporter.end())


def _built(work: Work, reporter: TaskReporter) -> Callable[[range], object]:
    if not work.imports_folder:  # Ray adds the folder of the driver; the command does not import from it either
        sys.path[:] = [path for path in sys.path if path != work.folder]
    with suppress(OSError):  # another machine need not have it
        os.chdir(work.folder)
    reporter.collect_log(work.level)
    if work.device == "cpu":
        _claim_cores(work.cpus)
    return work.build(Worker(work.device, 0, work.workers), *work.arguments, reporter)


def _claim_cores(count: int) -> None:
    """Run on `count` cores that no other worker of this machine has: Ray counts CPUs, but assigns none.

    A core is claimed by locking its file; the system unlocks it when the process ends.
    """
    cores = sorted(os.sched_getaffinity(0))
    if _held or len(cores) <= count:
        return
    folder = Path(tempfile.gettempdir()) / f"sparse-ingest-cores-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    claimed = []
    for core in cores:
        file = (folder / str(core)).open("a")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.close()
            continue
        _held.append(file)
        claimed.append(core)
        if len(claimed) == count:
            break
    unclaimed = [core for core in cores if core not in claimed]
    os.sched_setaffinity(0, [*claimed, *unclaimed[: count - len(claimed)]])  # before a library counts them


class TaskReporter(Collector):
    """The progress of the current attempt, sent to the mailbox every second."""

    def __init__(self) -> None:
        super().__init__()
        self._attempt = -1
        self._node = ""
        self._mailbox: Any = None
        self._working = threading.Event()
        self.making = False
        threading.Thread(target=self._send_beats, daemon=True).start()

    def start(self, attempt: int, node: str, mailbox: Any) -> None:
        """Count from zero for another attempt."""
        with self._lock:
            self._attempt, self._node, self._mailbox = attempt, node, mailbox
            self._counts, self._detail, self._messages = Counts(), "", []
            self.making = False
        self.stopping.clear()
        self._working.set()

    def end(self) -> Beat:
        """Send no more beats of the attempt, and return the last one."""
        self._working.clear()
        return self._beat()

    def _beat(self) -> Beat:
        return Beat(self._attempt, self._node, self.making, self.take())

    def _send_beats(self) -> None:
        import ray

        while True:
            time.sleep(BEAT_S)
            self._working.wait()
            beat = self._beat()
            try:
                stop = ray.get(self._mailbox.send.remote(beat), timeout=ANSWER_S)
            except Exception:  # the mailbox is being restarted, or this process ends
                with self._lock:
                    if beat.attempt == self._attempt:
                        self._messages = [*beat.collected.messages, *self._messages]
            else:
                if stop and beat.attempt == self._attempt:
                    self.stopping.set()
