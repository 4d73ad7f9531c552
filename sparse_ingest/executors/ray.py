"""Make the shards of a run with Ray: one task for each group of shards, on a cluster or on this machine.

In: a function that builds a maker in a process, its arguments, and groups of shards. The first task only builds a maker
and so creates the run; then there are as many tasks as workers, and each process keeps its maker (ray_task.py). A task
whose process or node died, or whose storage failed, is started again; one that is late or silent gets a second copy,
and the first one that ends counts. An error that a user can fix ends the run.

Ray's own retries are off: with them the driver could neither report a death nor count how often a group failed.
"""

from __future__ import annotations

import math
import pickle
import statistics
import sys
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import (
    NodeDiedError,
    OutOfMemoryError,
    RayError,
    RayTaskError,
    RuntimeEnvSetupError,
    TaskCancelledError,
    TaskUnschedulableError,
    WorkerCrashedError,
)
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from sparse_ingest.errors import Interrupted, RunError, StorageError, counted, first_line
from sparse_ingest.executors.carrying import Counts, Forwarder, log_level, raise_carried
from sparse_ingest.executors.ray_cluster import Pool
from sparse_ingest.executors.ray_task import Beat, Mailbox, Outcome, Work, make_group
from sparse_ingest.reporting import Reporter

LOOK_S = 0.2  # between checks for stop requests and late tasks
MAIL_S = 1.0  # between two looks into the mailbox
SILENT_S = 20.0  # without a beat until a task counts as frozen
START_S = 30.0  # for a task to send its first beat, until it may get a second copy
LATE_S, LATE = 10.0, 4  # a task is late after this time, and this multiple of the median
QUICK_S = 1.0  # groups that take less wait in the queues of Ray
MOST_FAILURES = 5  # of one group: a process died, or storage failed
WAIT_S = 2.0  # after a storage error; doubled each time


def run_on(
    pool: Pool,
    does: str,
    kept: str,
    reporter: Reporter,
    build: Callable[..., Callable[[range], object]],
    arguments: Sequence[Any],
    groups: Callable[[], Sequence[range]],
    done: Callable[[Any], None] | None = None,
) -> None:
    """Run one step in tasks of Ray: make all groups of shards.

    Args:
        pool: The workers.
        does: What a worker does to its shards, for messages: "makes".
        kept: What a stop leaves and what to do next, for messages.
        reporter: Receives the progress of all workers.
        build: A function of a module, called once per process with a `Worker`, `arguments` and a `Reporter`; it returns
            the function that makes a group.
        arguments: Its arguments, which can be pickled.
        groups: Called once, after the first process has built its maker.
        done: Called with what the maker returned for each group, once for each.

    Raises:
        SparseIngestError: the error of a worker, with its message; or a group failed too often.
        Interrupted: `reporter` requested a stop.
    """
    work = Work(
        token=uuid.uuid4().hex,
        build=build,
        arguments=tuple(arguments),
        workers=pool.workers,
        cpus=pool.cpus,
        device="cuda:0" if pool.gpus else "cpu",
        folder=str(Path.cwd()),
        imports_folder=bool({"", str(Path.cwd())}.intersection(sys.path)),
        level=log_level(),
    )
    driver = _Driver(pool, work, does, kept, reporter, done)
    try:
        driver.make([None], 1)
        driver.make(groups(), pool.workers)
    finally:
        driver.end()


@dataclass(eq=False)
class _Group:
    """A group of shards, or None to build a maker only."""

    shards: range | None
    attempts: list[_Attempt] = field(default_factory=list)  # that run
    failures: int = 0
    not_before: float = 0.0
    counts: Counts = Counts()  # the most that any attempt reported
    done: bool = False


@dataclass(eq=False)
class _Attempt:
    """A task that makes a group."""

    number: int
    group: _Group
    task: ray.ObjectRef[Any]
    submitted: float
    heard: float | None = None  # its last beat
    making_since: float | None = None
    node: str = ""


class _Driver:
    """The tasks of one run."""

    def __init__(
        self, pool: Pool, work: Work, does: str, kept: str, reporter: Reporter, done: Callable[[Any], None] | None
    ) -> None:
        self._pool, self._does, self._kept, self._reporter, self._done = pool, does, kept, reporter, done
        self._work = [ray.put(pickle.dumps(work))]  # Ray would make its arrays read-only
        needs: dict[str, Any] = {"num_cpus": pool.cpus, "num_gpus": pool.gpus, "max_retries": 0}
        if pool.accelerator:
            needs["accelerator_type"] = pool.accelerator
        # With max_calls=0 a process that used a GPU keeps its model for the next task.
        self._task = ray.remote(max_calls=0, **needs)(make_group)
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
        self._mailbox = ray.remote(num_cpus=0, max_restarts=-1, scheduling_strategy=here)(Mailbox).remote()
        self._mail: ray.ObjectRef[Any] | None = None
        self._mailed = time.monotonic()  # when the mailbox answered last
        self._attempts: dict[ray.ObjectRef[Any], _Attempt] = {}  # running, also of groups that are done
        self._waiting: deque[_Group] = deque()
        self._open: set[_Group] = set()  # not done
        self._seconds: deque[float] = deque(maxlen=101)  # of the last groups
        self._forwarder = Forwarder(reporter)
        self._live_node = ""  # where a task reported or ended last
        self._number = 0
        self._stopped = False

    def make(self, groups: Iterable[range | None], slots: int) -> None:
        """Make groups, `slots` at a time, until all are done."""
        self._waiting.extend(map(_Group, groups))
        self._open.update(self._waiting)
        while self._open and not (self._stopped and not self._running()):
            if not self._stopped and self._reporter.stop_requested():
                self._stop()
            if self._stopped:
                self._cancel_unplaced()
            # Ray keeps a worker for tasks that already wait; for short ones asking for another takes most of the time.
            self._submit(2 * slots if self._median() < QUICK_S else slots)
            self._pool.check()
            self._receive()
        if self._open:
            raise Interrupted(f"Stopped on request; {self._kept}")

    def end(self) -> None:
        """End the tasks that still run: copies of finished groups, or all after an error."""
        for task in self._attempts:
            ray.cancel(task, force=True)

    def _running(self) -> list[_Attempt]:
        """Return the attempts that are not frozen; their slots are not free."""
        return [one for one in self._attempts.values() if not self._silent(one)]

    def _silent(self, attempt: _Attempt) -> bool:
        return attempt.heard is not None and self._mailed - attempt.heard > SILENT_S

    def _submit(self, slots: int) -> None:
        """Start tasks for free slots: first of waiting groups, then second copies of late ones."""
        free = slots - len(self._running())
        now = time.monotonic()
        for group in [one for one in self._waiting if one.not_before <= now][: max(0, free)]:
            self._waiting.remove(group)
            self._start(group)
            free -= 1
        if free > 0 and not self._stopped:
            for attempt in [one for one in self._attempts.values() if self._late(one, now)][:free]:
                self._start(attempt.group, self._live_node)

    def _late(self, attempt: _Attempt, now: float) -> bool:
        """Return whether the group of an attempt should get a second copy."""
        group = attempt.group
        if group.done or (len(group.attempts) > 1 and not all(map(self._silent, group.attempts))):
            return False
        if attempt.heard is None:
            return now - attempt.submitted > START_S
        if self._silent(attempt):
            return True
        return attempt.making_since is not None and now - attempt.making_since > max(LATE_S, LATE * self._median())

    def _median(self) -> float:
        return statistics.median(self._seconds) if self._seconds else math.inf

    def _start(self, group: _Group, node: str = "") -> None:
        """Start a task; a node is preferred for a second copy, since Ray may not know yet that another is frozen."""
        task = self._task
        if node:
            task = task.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=True))
        self._number += 1
        reference = task.remote(self._work, group.shards, self._number, self._mailbox)
        attempt = _Attempt(self._number, group, reference, time.monotonic())
        self._attempts[reference] = attempt
        group.attempts.append(attempt)

    def _stop(self) -> None:
        """Ask the workers to stop, and start no other task."""
        self._stopped = True
        self._waiting.clear()
        self._mail = None  # ask again, with the request

    def _cancel_unplaced(self) -> None:
        """Cancel tasks that wait for a free node."""
        for attempt in self._attempts.values():
            if attempt.heard is None and time.monotonic() - attempt.submitted > START_S:
                ray.cancel(attempt.task)

    def _receive(self) -> None:
        """Wait a moment for the mailbox and for tasks that end, and act on them."""
        if self._mail is None and (self._stopped or time.monotonic() - self._mailed >= MAIL_S):
            obsolete = {one.number for one in self._attempts.values() if one.group.done}
            self._mail = self._mailbox.receive.remote(None if self._stopped else obsolete)
        waited = [*self._attempts, *([self._mail] if self._mail else [])]
        if not waited:
            time.sleep(LOOK_S)
            return
        ready, rest = ray.wait(waited, timeout=LOOK_S)
        if ready and rest:
            ready += ray.wait(rest, num_returns=len(rest), timeout=0)[0]
        for reference in ready:
            if reference is self._mail:
                self._read_mail()
            else:
                self._ended(self._attempts.pop(reference))

    def _read_mail(self) -> None:
        reference, self._mail = self._mail, None
        try:
            beats: list[Beat] = ray.get(reference)
        except RayError:  # it is being restarted
            time.sleep(LOOK_S)
            return
        self._mailed = time.monotonic()
        attempts = {one.number: one for one in self._attempts.values()}
        for beat in beats:
            if attempt := attempts.get(beat.attempt):
                attempt.heard, attempt.node = self._mailed, beat.node
                self._live_node = beat.node
                if beat.making and attempt.making_since is None:
                    attempt.making_since = self._mailed
                self._show(attempt, beat)

    def _show(self, attempt: _Attempt, beat: Beat) -> None:
        """Report progress. What a second attempt repeats is not counted again."""
        attempt.group.counts = self._forwarder.show(attempt.group.counts, beat.collected)

    def _ended(self, attempt: _Attempt) -> None:
        """Act on the end of a task."""
        group = attempt.group
        group.attempts.remove(attempt)
        try:
            outcome: Outcome = ray.get(attempt.task)
        except RayError as error:
            if not group.done:
                self._died(attempt, error)
            return
        self._live_node = attempt.node = outcome.last.node
        if group.done:
            return
        self._show(attempt, outcome.last)
        if outcome.kind == "made":
            self._made(group, outcome)
        elif outcome.kind == "failed":
            kind, arguments = outcome.value
            if kind is Interrupted:  # the worker was asked to end, or the run
                self._again(group)
            elif kind in (StorageError, OSError):
                group.failures += 1
                group.not_before = time.monotonic() + WAIT_S * 2 ** (group.failures - 1)
                if group.failures >= MOST_FAILURES:
                    raise_carried(kind, arguments)
                self._again(group)
            else:
                raise_carried(kind, arguments)
        elif outcome.kind == "unfit":
            raise _unfit(outcome.value)
        else:
            where = self._pool.where(attempt.node)
            self._failed(attempt, f"A task{where} died ({outcome.value})")

    def _made(self, group: _Group, outcome: Outcome) -> None:
        group.done = True
        self._open.remove(group)
        if group in self._waiting:
            self._waiting.remove(group)
        for other in group.attempts:
            if other.heard is None:
                ray.cancel(other.task)  # it waits for a free node
        if group.shards is not None:
            self._seconds.append(outcome.seconds)
            if self._done:
                self._done(outcome.value)

    def _died(self, attempt: _Attempt, error: RayError) -> None:
        """Start a task again whose process or node died. What another process could not do either ends the run."""
        if isinstance(error, (RayTaskError, RuntimeEnvSetupError)):
            raise _unfit(_reason(error)) from error
        if isinstance(error, TaskUnschedulableError):
            raise RunError(f"Ray cannot place a task: {_reason(error)}. Change --workers or --worker-cpus.") from error
        if self._stopped and isinstance(error, TaskCancelledError):
            return None
        where = self._pool.where(attempt.node)
        if isinstance(error, OutOfMemoryError):
            return self._failed(attempt, f"Memory ran out{where}, and Ray ended a worker")
        if isinstance(error, WorkerCrashedError):
            return self._failed(attempt, f"A worker{where} died")
        what = "its node died" if isinstance(error, NodeDiedError) else type(error).__name__
        self._warn_again(f"A worker{where} was lost ({what})")
        return self._again(attempt.group)

    def _failed(self, attempt: _Attempt, message: str) -> None:
        group = attempt.group
        group.failures += 1
        if group.failures >= MOST_FAILURES:
            raise RunError(
                f"{message}; {_shards(group)} failed {group.failures} times (the logs of Ray say more: "
                f"{self._pool.logs}); {self._kept}"
            )
        self._warn_again(message)
        self._again(group)

    def _again(self, group: _Group) -> None:
        """Make a group again, unless another attempt runs or the run stops."""
        if not (self._stopped or group.attempts):
            self._waiting.appendleft(group)

    def _warn_again(self, message: str) -> None:
        self._reporter.warn(f"{message}." + ("" if self._stopped else f" Another worker {self._does} its shards."))


def _unfit(reason: str) -> RunError:
    return RunError(
        f"A worker of Ray could not start a task: {reason}. Install the same sparse-ingest and Ray on all nodes, then "
        "run the same command again."
    )


def _reason(error: RayError) -> str:
    """Return the last line of an error, which has the cause; the first ones say where it happened."""
    cause = getattr(error, "cause", None)
    return first_line(cause) if cause else str(error).strip().splitlines()[-1].rstrip(".")


def _shards(group: _Group) -> str:
    if group.shards is None:
        return "the start"
    return f"{counted(len(group.shards), 'shard')} from number {group.shards.start}"
