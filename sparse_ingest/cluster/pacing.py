"""The pace of a load: requests in flight, their size, documents/s.

Both limits grow by a step with each round of answers and are halved, once per round, when the cluster is overloaded
(429, 503, a timeout, a lost connection). An answer's time per byte, compared with the recent best, shows how many
requests only queue (as in TCP Vegas): their number grows while none does and shrinks when a third do, so a cluster that
another client needs is spared. The caller passes the time. Not covered: pauses before retries (sending.py).
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
_REMEMBERED_ROUNDS = 128  # of the recent best
# Every 64 rounds, two have half the requests and measure the time without a queue; otherwise the recent best would
# always be measured under pressure.
_PROBE_ROUNDS = 64


class Attempt(NamedTuple):
    """A request in flight: its start, bytes and documents, and the number of reductions before it."""

    began_s: float
    size: int
    documents: int
    reductions: int


class Pace:
    """The limits of one load: at most `max_rate` documents/s. Safe to use from several threads."""

    def __init__(self, *, max_in_flight: int = MAX_IN_FLIGHT, max_rate: float | None = None) -> None:
        self._lock = Lock()
        self._most_in_flight = max_in_flight
        self._most_bytes = MAX_BYTES  # of a request; reduced permanently after 413
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
        """The maximum of requests in flight now."""
        return max(1, self._in_flight // 2) if self._probes else self._in_flight

    @property
    def ceiling(self) -> int:
        """The maximum of bytes per request at any pace; reduced when the server refuses a size."""
        return self._most_bytes

    def max_bytes(self) -> int:
        """Return the maximum of bytes of the next request; with a rate, about a second's worth."""
        if self._max_rate is None:
            return self._bytes
        # The size of documents is unknown before the first request.
        allowed = int(self._max_rate * self._document_bytes) if self._document_bytes else FEWEST_BYTES
        return max(1, min(self._bytes, allowed))

    def wait_s(self, documents: int, now_s: float) -> float:
        """Return how long these documents must wait for the rate; they count as sent after that."""
        if self._max_rate is None:
            return 0.0
        with self._lock:
            begin_s = max(self._free_at_s, now_s)
            self._free_at_s = begin_s + documents / self._max_rate
            return begin_s - now_s

    def begin(self, size: int, documents: int, now_s: float) -> Attempt:
        """Record that a request is sent now."""
        return Attempt(now_s, size, documents, self._reductions)

    def answered(self, attempt: Attempt, now_s: float) -> None:
        """Record that the cluster accepted a request."""
        with self._lock:
            self._document_bytes = attempt.size / max(1, attempt.documents)
            self._typical_size = self._typical_size * 0.75 + attempt.size * 0.25 if self._typical_size else attempt.size
            # The time of a small request depends little on its bytes, and older requests precede the reduction.
            if attempt.size * 2 < self._typical_size or attempt.reductions != self._reductions:
                return
            self._round.append((max(now_s - attempt.began_s, 1e-6), attempt.size))
            if len(self._round) >= self.in_flight:
                self._end_round()

    def overloaded(self, attempt: Attempt) -> None:
        """Record an overload. Requests from before the last reduction do not reduce the limits again."""
        with self._lock:
            if attempt.reductions != self._reductions:
                return
            self._reductions += 1
            self._in_flight = max(1, self._in_flight // 2)
            self._bytes = max(min(FEWEST_BYTES, self._most_bytes), self._bytes // 2)
            self._round.clear()

    def too_large(self, attempt: Attempt) -> None:
        """Record that the server refuses requests of this size."""
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
        # The first answers are slow for other reasons: new connections, compilation in the server.
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
