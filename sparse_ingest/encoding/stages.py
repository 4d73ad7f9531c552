"""The stages of an encode: each in its own thread, one window ahead of the next, with the time that each is busy.

`read` parses and hashes rows, `tokenise` tokenizes their texts, `encode` computes vectors, and `write` prunes them and
writes row groups, until the shard has its final name (shard_maker.py).
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from queue import SimpleQueue
from threading import Semaphore, Thread
from typing import Generic, NamedTuple, TypeVar

from sparse_ingest.runs.files import STAGE_LABELS

T = TypeVar("T")
STAGES = ("read", "tokenise", "encode", "write")
WALL = "wall"


class Stopped(Exception):
    """Raised in a stage to end it because a later stage has ended."""


class _End(NamedTuple):
    error: BaseException | None


class Ahead(Generic[T]):
    """The same items, produced in another thread, at most one ahead of the one in use.

    An exception is raised at its place among the items. `close` waits for the thread, which ends after its item.
    """

    def __init__(self, items: Iterable[T]) -> None:
        self._made: SimpleQueue[T | _End] = SimpleQueue()
        self._taken = Semaphore(0)
        self._closed = False
        self._thread = Thread(target=self._make, args=(items,))

    def __iter__(self) -> Iterator[T]:
        # Started here, when the caller can already close it after Ctrl-C.
        self._thread.start()
        while not isinstance(item := self._made.get(), _End):
            self._taken.release()
            yield item
            del item  # otherwise it stays in memory until the next one arrives
        if error := item.error:
            try:
                raise error
            finally:
                del error, item  # breaks the reference cycle with this frame

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
    """The seconds that each stage was busy in the shards of this process, and their duration, `wall`.

    A stage is busy unless it waits for another stage; waiting for a core counts as busy.
    """

    def __init__(self) -> None:
        self._seconds = dict.fromkeys((*STAGES, WALL), 0.0)
        self._since: dict[str, float] = {}

    def seconds(self) -> dict[str, float]:
        """Return the seconds of each stage so far, including stages that are still busy."""
        now = time.monotonic()
        return {stage: known + now - self._since.get(stage, now) for stage, known in self._seconds.items()}

    def slowest(self) -> str:
        """Return the slowest stage and its share of busy time, for a message; "" before the first window."""
        seconds = self.seconds()
        stage = max(STAGES, key=lambda stage: seconds[stage])
        if not seconds[WALL]:
            return ""
        return f"slowest: {STAGE_LABELS.get(stage, stage)} ({100 * seconds[stage] / seconds[WALL]:.0f} % busy)"

    def since(self, before: Mapping[str, float]) -> dict[str, float]:
        """Return the seconds since an earlier result of `seconds`."""
        return {stage: seconds - before[stage] for stage, seconds in self.seconds().items()}

    @contextmanager
    def busy(self, stage: str) -> Iterator[None]:
        """Count the time of the block for a stage."""
        self._since[stage] = time.monotonic()
        try:
            yield
        finally:
            self._pause(stage)

    def making(self, stage: str, items: Iterable[T]) -> Iterator[T]:
        """Yield the same items; the stage is busy while it produces each of them."""
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
        """Yield the same items to a busy stage, which is not busy while it waits for one of them."""
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
        # It is already paused if Ctrl-C came between two lines of `waiting`.
        self._seconds[stage] += now - self._since.pop(stage, now)
