"""Encode queries of several threads: those that wait for a masked LM at the same time are one batch.

No query waits for others to arrive. A weight table is looked up by all threads at the same time.
"""

from __future__ import annotations

from collections import Counter, deque
from concurrent.futures import Future
from threading import Lock
from typing import NamedTuple

from sparse_ingest.models.query_encoders import QueryEncoder, query_encoder
from sparse_ingest.pipeline import ModelSettings
from sparse_ingest.queries.weight_table import QueryWeights, WeightTable

QUERIES_AT_ONCE = 32  # texts per batch


class _Asked(NamedTuple):
    """A text, and its weights; None: its own thread must encode the next batch."""

    text: str
    answer: Future[QueryWeights | None]


class BatchedEncoder:
    """The query encoder of a model, built for the first text. Thread-safe.

    Attributes:
        batches: How many batches had 1, 2, ... queries.
    """

    def __init__(self, model: ModelSettings) -> None:
        self.model = model
        self.batches: Counter[int] = Counter()
        self._built: QueryEncoder | None = None
        self._building, self._lock = Lock(), Lock()
        self._asked: deque[_Asked] = deque()
        self._busy = False  # a thread encodes, and will wake the next one

    def encode(self, texts: list[str]) -> list[QueryWeights]:
        """Return the weights of the distinct tokens of each text, heaviest first."""
        with self._lock:
            self.batches[len(texts)] += 1
        return self._encoder().encode(texts)

    def encode_one(self, text: str) -> QueryWeights:
        """Return the weights of one text, encoded with those of other threads that wait now."""
        if isinstance(self._encoder(), WeightTable):
            return self.encode([text])[0]
        mine = _Asked(text, Future())
        with self._lock:
            self._asked.append(mine)
            leads, self._busy = not self._busy, True
        weights = None if leads else mine.answer.result()
        return self._encode_waiting() if weights is None else weights

    def _encode_waiting(self) -> QueryWeights:
        """Encode the first waiting texts, of which this thread's is the first, and wake the thread of the next one."""
        with self._lock:
            mine, *others = (self._asked.popleft() for _ in range(min(len(self._asked), QUERIES_AT_ONCE)))
        try:
            own, *found = self.encode([mine.text, *(one.text for one in others)])
            for one, weights in zip(others, found, strict=True):
                one.answer.set_result(weights)
            return own
        except Exception:
            for one in others:  # the error may be of one text
                self._answer_alone(one)
            return self.encode([mine.text])[0]
        finally:
            with self._lock:
                following = self._asked[0] if self._asked else None
                self._busy = following is not None
            if following:
                following.answer.set_result(None)

    def _answer_alone(self, one: _Asked) -> None:
        try:
            one.answer.set_result(self.encode([one.text])[0])
        except Exception as error:
            one.answer.set_exception(error)

    def _encoder(self) -> QueryEncoder:
        if self._built is None:
            with self._building:
                self._built = self._built or query_encoder(self.model)
        return self._built
