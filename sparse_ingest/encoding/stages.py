"""The stages of an encode: each in a thread of its own, one window ahead of the next, and how long each is busy.

`read` parses and hashes rows, `tokenise` tokenizes their texts, `encode` computes vectors, and `write` prunes
them and makes row groups, until the shard has its final name. Not covered: what the stages do (shard_maker.py).
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from queue import SimpleQueue
from threading import Semaphore, Thread
from typing import Generic, NamedTuple, TypeVar

T = TypeVar("T")
STAGES = ("read", "tokenise", "encode", "write")
WALL = "wall"


class Stopped(Exception):
    """A stage ends early because a later one has ended."""


class _End(NamedTuple):
    error: BaseException | None


class Ahead(Generic[T]):
    """The same items, made in a thread of its own: the next one while the one before is in use, and no further.

    What they raise is raised where they are used, in its turn. `close` waits for the thread, which ends after its item.
    """

    def __init__(self, items: Iterable[T]) -> None:
        self._made: SimpleQueue[T | _End] = SimpleQueue()
        self._taken = Semaphore(0)
        self._closed = False
        self._thread = Thread(target=self._make, args=(items,))

    def __iter__(self) -> Iterator[T]:
        # Not before: one who is interrupted here already knows what to close.
        self._thread.start()
        while not isinstance(item := self._made.get(), _End):
            self._taken.release()
            yield item
            del item  # else it stays in memory until the next one is there
        if error := item.error:
            try:
                raise error
            finally:
                del error, item  # which would hold this frame, and it them

    def close(self) -> None:
        """End the thread."""
        self._closed = True
        self._taken.release()
        if self._thread.is_alive():
            self._thread.join()

    def _make(self, items: Iterable[T]) -> None:
        end = _End(None)
        try:
            for item in items:
                self._made.put(item)
                del item
                self._taken.acquire()
                if self._closed:
                    break
        except BaseException as error:
            end = _End(error)
        self._made.put(end)


class Stages:
    """How long each stage was busy in the shards that this process made, and how long these took: `wall`.

    A stage is busy unless it waits for another one. Where there are fewer cores than busy stages, that includes the
    time in which the other stages had them.
    """

    def __init__(self) -> None:
        self._seconds = dict.fromkeys((*STAGES, WALL), 0.0)
        self._since: dict[str, float] = {}

    def seconds(self) -> dict[str, float]:
        """The seconds of each stage so far, also of one that is busy now."""
        now = time.monotonic()
        return {stage: known + now - self._since.get(stage, now) for stage, known in self._seconds.items()}

    def slowest(self) -> str:
        """The slowest stage, and how much of the time it was busy; "" before the first window."""
        seconds = self.seconds()
        stage = max(STAGES, key=lambda stage: seconds[stage])
        return f"slowest: {stage} ({100 * seconds[stage] / seconds[WALL]:.0f} % busy)" if seconds[WALL] else ""

    def since(self, before: Mapping[str, float]) -> dict[str, float]:
        """What was added to an earlier answer of `seconds`."""
        return {stage: seconds - before[stage] for stage, seconds in self.seconds().items()}

    @contextmanager
    def busy(self, stage: str) -> Iterator[None]:
        """A stage is busy in this block."""
        self._since[stage] = time.monotonic()
        try:
            yield
        finally:
            self._pause(stage)

    def making(self, stage: str, items: Iterable[T]) -> Iterator[T]:
        """The same items; the stage is busy while each of them is made."""
        left = iter(items)
        while True:
            with self.busy(stage):
                try:
                    item = next(left)
                except StopIteration:
                    return
            yield item
            del item

    def waiting(self, stage: str, items: Iterable[T]) -> Iterator[T]:
        """The same items, for a stage that is busy: it is not while it waits for one of them."""
        left = iter(items)
        while True:
            self._pause(stage)
            try:
                item = next(left)
            except StopIteration:
                return
            finally:
                self._since[stage] = time.monotonic()
            yield item
            del item

    def _pause(self, stage: str) -> None:
        now = time.monotonic()
        # It has paused already where Ctrl-C comes between two lines of `waiting`.
        self._seconds[stage] += now - self._since.pop(stage, now)
