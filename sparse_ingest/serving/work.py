"""Run blocking work in a fixed number of threads, and refuse more than a fixed number of pieces at a time."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from threading import BoundedSemaphore
from typing import TypeVar

from sparse_ingest.serving.inputs import RefusedError

THREADS = 32  # as many as a client keeps connections to a cluster
T = TypeVar("T")


class Work:
    """Threads for blocking work. A piece whose request ended counts until its thread is free.

    Work with a document model has one thread of its own: each thread of torch keeps buffers, and searches need not wait
    for it.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._free = BoundedSemaphore(most)
        self._pool = ThreadPoolExecutor(min(THREADS, most), "request")
        self._documents = ThreadPoolExecutor(1, "documents")

    async def do(self, piece: Callable[[], T], *, encodes_documents: bool = False) -> T:
        """Return the result of a piece of work. Raise `RefusedError` 503 if too many are in progress."""
        if not self._free.acquire(blocking=False):
            raise RefusedError(503, f"{self._most} requests are in progress, the most that are accepted. Try again.")
        future = (self._documents if encodes_documents else self._pool).submit(piece)
        future.add_done_callback(self._done)
        return await asyncio.wrap_future(future)

    def _done(self, _: Future[T]) -> None:
        self._free.release()
