"""Encode queries of several threads: those that wait for a masked LM at the same time are one batch.

No query waits for others to arrive. A masked LM is called by one thread of its own, because each thread that uses torch
keeps about 30 MB of buffers; only a long batch is divided among the cores. The weights of the last queries are kept for
the other requests of the same search page. A weight table is looked up by all threads at the same time.
"""

from __future__ import annotations

import os
from collections import Counter, deque
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Lock
from weakref import WeakSet

from sparse_ingest.models.query_encoders import QueryEncoder, query_encoder
from sparse_ingest.pipeline import ModelSettings
from sparse_ingest.queries.weight_table import QueryWeights, WeightTable

QUERIES_AT_ONCE = 32  # texts per batch
KEPT = 64  # queries whose weights a masked LM keeps
_ENCODERS: WeakSet[BatchedEncoder] = WeakSet()  # of this process


class BatchedEncoder:
    """The query encoder of a model, built for the first text. Thread-safe.

    Attributes:
        batches: How many batches had 1, 2, ... queries.
    """

    def __init__(self, model: ModelSettings) -> None:
        self.model = model
        self.batches: Counter[int] = Counter()
        self._built: QueryEncoder | None = None
        self._begin()
        _ENCODERS.add(self)

    def _begin(self) -> None:
        self._lock = Lock()
        self._kept: dict[str, Future[QueryWeights]] = {}
        self._waiting: deque[tuple[str, Future[QueryWeights]]] = deque()
        self._thread = ThreadPoolExecutor(1, "queries")

    def encode(self, texts: list[str]) -> list[QueryWeights]:
        """Return the weights of the distinct tokens of each text, heaviest first."""
        if isinstance(self._encoder(), WeightTable):
            return self._counted(texts)
        return self._thread.submit(self._counted, texts).result()

    def encode_one(self, text: str) -> QueryWeights:
        """Return the weights of one text, encoded with those of other threads that wait now."""
        if isinstance(self._encoder(), WeightTable):
            return self._counted([text])[0]
        with self._lock:
            answer = self._kept.pop(text, None)
            if answer is None or (answer.done() and answer.exception() is not None):
                answer = Future()
                self._waiting.append((text, answer))
                self._thread.submit(self._encode_waiting)
            self._kept[text] = answer
            if len(self._kept) > KEPT:
                del self._kept[next(iter(self._kept))]  # the least recently used
        return dict(answer.result())

    def _encode_waiting(self) -> None:
        """Encode the first waiting texts, unless an earlier call has encoded all."""
        asked = [self._waiting.popleft() for _ in range(min(len(self._waiting), QUERIES_AT_ONCE))]
        if not asked:
            return
        try:
            for (_, answer), weights in zip(asked, self._counted([text for text, _ in asked]), strict=True):
                answer.set_result(weights)
        except Exception:
            for text, answer in asked:  # the error may be of one text
                try:
                    answer.set_result(self._counted([text])[0])
                except Exception as error:
                    answer.set_exception(error)

    def _counted(self, texts: list[str]) -> list[QueryWeights]:
        with self._lock:
            self.batches[len(texts)] += 1
        return self._encoder().encode(texts)

    def _encoder(self) -> QueryEncoder:
        if self._built is None:
            with self._lock:
                self._built = self._built or query_encoder(self.model)
        return self._built


def _begin_again() -> None:
    """Give each encoder of a forked process a new thread and a new lock: its old ones are in the other process."""
    for encoder in _ENCODERS:
        encoder._begin()


os.register_at_fork(after_in_child=_begin_again)
