"""How hard to press a cluster: requests in flight, their size, documents a second.

In: what became of each attempt, and when. Out: the limits for the next ones. Both limits grow by a step with each round
of answers and are halved, once a round, when the cluster is overloaded (429, 503, a timeout, a lost connection). Before
that, waiting tells: an answer's time per byte, compared with the best of late, says how many requests only queue (as in
TCP Vegas). More of them are sent only while none does, and fewer when a third do, so a cluster that becomes slow
because another client needs it is left alone. No clock and no thread in here: the caller says what time it is.
Not covered: pauses before one and the same request is sent again (sending.py).
"""

from __future__ import annotations

from collections import deque
from threading import Lock
from typing import NamedTuple

from sparse_ingest.cluster.bulk_bodies import MAX_BYTES

MAX_IN_FLIGHT = 8
_FIRST_IN_FLIGHT = 2
_FIRST_BYTES = 2 << 20
FEWEST_BYTES = 128 << 10
_STEP_BYTES = 1 << 20
# Rounds that "the best of late" looks back on, and after how many two are made with half the requests, to see anew how
# fast an answer comes when few queue. Without them constant pressure would become the best that is remembered.
_REMEMBERED_ROUNDS = 128
_PROBE_ROUNDS = 64


class Attempt(NamedTuple):
    """A request on its way: when it began, its bytes and documents, and the number of reductions until then."""

    began_s: float
    size: int
    documents: int
    reductions: int


class Pace:
    """The limits of one load. Safe to use from several threads.

    Args:
        max_in_flight: requests in flight at most.
        max_rate: documents a second at most.
    """

    def __init__(self, *, max_in_flight: int = MAX_IN_FLIGHT, max_rate: float | None = None) -> None:
        self._lock = Lock()
        self._most_in_flight = max_in_flight
        self._most_bytes = MAX_BYTES  # of a request; lowered for good when the server says that one is too large
        self._max_rate = max_rate
        self._in_flight = min(_FIRST_IN_FLIGHT, max_in_flight)
        self._bytes = _FIRST_BYTES
        self._reductions = 0
        self._free_at_s = 0.0
        self._document_bytes = 0.0
        self._rounds = 0
        self._round: list[tuple[float, int]] = []
        self._typical_size = 0.0
        self._best: deque[float] = deque(maxlen=_REMEMBERED_ROUNDS)

    @property
    def in_flight(self) -> int:
        """How many requests may be in flight now."""
        return max(1, self._in_flight // 2) if self._probes else self._in_flight

    @property
    def ceiling(self) -> int:
        """The upper limit of bytes per request, at any pace; lowered when the server refuses such a size."""
        return self._most_bytes

    def max_bytes(self) -> int:
        """How large the next request may be; with a rate, about what a second allows."""
        if self._max_rate is None:
            return self._bytes
        # How many documents the first request will hold is unknown.
        allowed = int(self._max_rate * self._document_bytes) if self._document_bytes else FEWEST_BYTES
        return max(1, min(self._bytes, allowed))

    def wait_s(self, documents: int, now_s: float) -> float:
        """How long the rate makes these documents wait; they are counted as sent after that."""
        if self._max_rate is None:
            return 0.0
        with self._lock:
            begin_s = max(self._free_at_s, now_s)
            self._free_at_s = begin_s + documents / self._max_rate
            return begin_s - now_s

    def begin(self, size: int, documents: int, now_s: float) -> Attempt:
        """Note that a request is sent now."""
        return Attempt(now_s, size, documents, self._reductions)

    def answered(self, attempt: Attempt, now_s: float) -> None:
        """An answer came, and the cluster took what it was sent."""
        with self._lock:
            self._document_bytes = attempt.size / max(1, attempt.documents)
            self._typical_size = self._typical_size * 0.75 + attempt.size * 0.25 if self._typical_size else attempt.size
            # What a small request takes says little about bytes, and what began before a reduction is no news.
            if attempt.size * 2 < self._typical_size or attempt.reductions != self._reductions:
                return
            self._round.append((max(now_s - attempt.began_s, 1e-6), attempt.size))
            if len(self._round) >= self.in_flight:
                self._end_round()

    def overloaded(self, attempt: Attempt) -> None:
        """The cluster could not take it. What began before the last reduction does not reduce again."""
        with self._lock:
            if attempt.reductions != self._reductions:
                return
            self._reductions += 1
            self._in_flight = max(1, self._in_flight // 2)
            self._bytes = max(min(FEWEST_BYTES, self._most_bytes), self._bytes // 2)
            self._round.clear()

    def too_large(self, attempt: Attempt) -> None:
        """The server takes no request of this size, now or later."""
        with self._lock:
            self._most_bytes = max(1, min(self._most_bytes, attempt.size // 2))
            self._bytes = min(self._bytes, self._most_bytes)

    @property
    def _probes(self) -> bool:
        return self._rounds % _PROBE_ROUNDS >= _PROBE_ROUNDS - 2

    def _end_round(self) -> None:
        time_per_byte = sum(seconds for seconds, _ in self._round) / sum(size for _, size in self._round)
        self._round.clear()
        probed = self._probes
        self._rounds += 1
        # The first answers are slow for other reasons: a connection is made, the server compiles.
        if self._rounds == 1:
            return
        self._best.append(time_per_byte)
        self._bytes = min(self._most_bytes, self._bytes + _STEP_BYTES)
        if probed:
            return
        queued = self._in_flight * (1 - min(self._best) / time_per_byte)
        if queued < 0.5:
            self._in_flight = min(self._most_in_flight, self._in_flight + 1)
        elif queued > max(1.2, self._in_flight / 3):
            self._in_flight -= 1
