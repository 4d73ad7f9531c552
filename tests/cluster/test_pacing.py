"""Pacing against simulated servers: number in flight, request size and queue. No clock and no threads."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest

from sparse_ingest.cluster.pacing import Attempt, Pace

MB = 1 << 20


@dataclass
class Server:
    """Processes `workers` requests at a time at `bytes_per_s` each, and rejects more than `queue` waiting ones."""

    workers: int = 2
    bytes_per_s: Callable[[float], float] = lambda now_s: 4e6
    queue: int = 1000
    refused: int = 0
    free_at_s: list[float] = field(default_factory=list)

    def answer_s(self, size: int, now_s: float) -> float | None:
        """Return the time of the response, or None for a request that is rejected immediately."""
        self.free_at_s = self.free_at_s or [0.0] * self.workers
        busy = [at_s for at_s in self.free_at_s if at_s > now_s]
        if len(busy) == self.workers and len(self.waiting(now_s)) >= self.queue:
            self.refused += 1
            return None
        begin_s = max(now_s, heapq.heappop(self.free_at_s))
        heapq.heappush(self.free_at_s, begin_s + size / self.bytes_per_s(begin_s))
        self.begins_s.append(begin_s)
        return begin_s + size / self.bytes_per_s(begin_s)

    begins_s: list[float] = field(default_factory=list)

    def waiting(self, now_s: float) -> list[float]:
        return [at_s for at_s in self.begins_s[-100:] if at_s > now_s]


def run(pace: Pace, server: Server, seconds: float, start_s: float = 0.0) -> tuple[list[int], int]:
    """Send for `seconds`. Return the number in flight at each response, and the bytes accepted."""
    now_s, taken, seen = start_s, 0, []
    in_flight: list[tuple[float, int, Attempt]] = []
    number = 0
    while now_s < start_s + seconds:
        while len(in_flight) < pace.in_flight:
            size = pace.max_bytes()
            attempt = pace.begin(size, size // 2000, now_s)
            answer_s = server.answer_s(size, now_s)
            if answer_s is None:
                pace.overloaded(attempt)
                now_s += 0.05
                continue
            number += 1
            heapq.heappush(in_flight, (answer_s, number, attempt))
        now_s, _, attempt = heapq.heappop(in_flight)
        pace.answered(attempt, now_s)
        taken += attempt.size
        seen.append(len(in_flight) + 1)
    return seen, taken


def test_a_server_without_queueing_gets_the_maximum() -> None:
    pace = Pace(max_in_flight=8)
    run(pace, Server(workers=100), 60)
    assert pace.in_flight >= 7
    assert pace.max_bytes() == 8 * MB


@pytest.mark.parametrize("workers", [1, 2, 4])
def test_a_server_stays_busy_with_a_short_queue_for_hours(workers: int) -> None:
    pace = Pace(max_in_flight=16)
    server = Server(workers)
    run(pace, server, 60)
    seen, taken = run(pace, server, 7200, 60)
    assert max(seen) <= workers + 4
    assert taken >= 0.99 * workers * 4e6 * 7200


def test_overload_halves_the_pace_and_recovery_is_gradual() -> None:
    pace = Pace(max_in_flight=8)
    server = Server(workers=100)
    run(pace, server, 60)
    before = pace.max_bytes()
    pace.overloaded(pace.begin(before, 4000, 60))
    assert pace.in_flight == 4
    assert pace.max_bytes() == before // 2
    sizes = []
    for start_s in range(61, 100):
        run(pace, server, 1, start_s)
        sizes.append(pace.max_bytes())
    assert sizes == sorted(sizes)
    assert sizes[-1] == before
    assert max(after - size for size, after in zip(sizes, sizes[1:], strict=False)) <= 2 * MB
    assert pace.in_flight == 8


def test_requests_sent_before_a_reduction_do_not_reduce_again() -> None:
    pace = Pace(max_in_flight=8)
    run(pace, Server(workers=100), 60)
    together = [pace.begin(MB, 500, 60) for _ in range(8)]
    for attempt in together:
        pace.overloaded(attempt)
    assert pace.in_flight == 4
    pace.overloaded(pace.begin(MB, 500, 61))
    assert pace.in_flight == 2


def test_the_minimum_is_one_small_request_at_a_time() -> None:
    pace = Pace()
    for _ in range(20):
        pace.overloaded(pace.begin(MB, 500, 0))
    assert pace.in_flight == 1
    assert 64 << 10 <= pace.max_bytes() <= 256 << 10


def test_a_short_queue_is_used_with_few_rejections() -> None:
    server = Server(workers=2, queue=1)
    seen, taken = run(Pace(max_in_flight=8), server, 600)
    assert server.refused <= len(seen) / 20
    assert taken >= 0.85 * 2 * 4e6 * 600


def test_the_pace_drops_while_other_clients_slow_the_cluster() -> None:
    pace = Pace(max_in_flight=8)
    run(pace, Server(workers=100), 60)
    slow = Server(workers=100, bytes_per_s=lambda now_s: 4e6 if now_s > 120 else 1e6)
    run(pace, slow, 60, 60)
    assert pace.in_flight <= 4
    run(pace, slow, 120, 120)
    assert pace.in_flight == 8


def test_small_requests_do_not_change_the_speed_estimate() -> None:
    pace = Pace(max_in_flight=8)
    run(pace, Server(workers=100), 60)
    before = pace.in_flight
    for _ in range(100):
        pace.answered(pace.begin(1000, 1, 60), 62)
        pace.answered(pace.begin(8 * MB, 4000, 60), 62.1)
    assert pace.in_flight >= before - 1


def test_a_size_that_the_server_rejected_is_not_sent_again() -> None:
    pace = Pace()
    run(pace, Server(workers=100), 30)
    pace.too_large(pace.begin(6 * MB, 3000, 30))
    run(pace, Server(workers=100), 60, 30)
    assert pace.max_bytes() == 3 * MB


def test_a_rate_spreads_documents_over_time() -> None:
    pace = Pace(max_rate=1000)
    assert pace.wait_s(500, 10) == 0
    assert pace.wait_s(500, 10) == pytest.approx(0.5)
    assert pace.wait_s(500, 10.2) == pytest.approx(0.8)
    # Unused capacity does not accumulate.
    assert pace.wait_s(500, 99) == 0
    assert pace.wait_s(500, 99) == pytest.approx(0.5)


def test_with_a_rate_a_request_has_about_one_second_of_documents() -> None:
    pace = Pace(max_rate=100)
    assert pace.max_bytes() <= 256 << 10
    pace.answered(pace.begin(20_000, 10, 0), 0.1)
    assert pace.max_bytes() == 200_000


def test_without_a_rate_nothing_waits() -> None:
    pace = Pace()
    assert [pace.wait_s(5000, 0) for _ in range(3)] == [0, 0, 0]
