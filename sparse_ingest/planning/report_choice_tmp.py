"""Which point of a plan is the cheapest that keeps the quality: points, their frontier, the choice.

In: points with the quality of every query. Out: those that no other beats in everything, and the one to take. A loss is
the share of the mean quality that a point lacks against the whole vectors. The choice is made on one half of the
queries; the other half must confirm it, and its mean is what the plan predicts. A point that it does not confirm is
passed over, and the next one is looked at with the same queries. So look j may miss in 5% / (j (j + 1)) of all plans,
which is 5% over all looks together: an interval is wider the more points were passed over before it.
Not covered: where the qualities come from (sweep.py, engines.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from statistics import NormalDist

import numpy as np

from sparse_ingest.planning.report import Choice, Point, Values

MISSES = 0.05  # of all plans may predict an interval that does not hold


def loss_of(values: Values, full: Values) -> float:
    """The share of the mean quality that is lacking."""
    return 1.0 - float(values.mean() / full.mean())


def choose(points: Sequence[Point], full: Values, *, loss: float, cost: Callable[[Point], float]) -> Choice | None:
    """The cheapest point whose loss is at most `loss` on both halves of the queries, None when there is none.

    `full` is the quality of each query with whole vectors. Every other query chooses; the caller shuffles them.
    """
    for look, point in enumerate(candidates(points, full, loss=loss, cost=cost), start=1):
        found = loss_of(point.per_query[1::2], full[1::2])
        if found <= loss:
            chosen_by = loss_of(point.per_query[::2], full[::2])
            return Choice(point, found, _interval(found, point.per_query, full, look), chosen_by, look - 1)
    return None


def candidates(
    points: Sequence[Point], full: Values, *, loss: float, cost: Callable[[Point], float]
) -> Iterator[Point]:
    """The points whose loss is at most `loss` on the half that chooses, the cheapest first."""
    for point in sorted(points, key=lambda point: (cost(point), loss_of(point.per_query[::2], full[::2]))):
        if loss_of(point.per_query[::2], full[::2]) <= loss:
            yield point


def frontier(points: Sequence[Point]) -> list[Point]:
    """The points that no other one of them beats: at least as good in every respect, and better in one."""
    if not points:
        return []
    costs = np.array([_costs(point) for point in points])
    kept = []
    for number, point in enumerate(points):
        as_good = (costs <= costs[number]).all(axis=1)
        better = (costs < costs[number]).any(axis=1)
        if not (as_good & better).any():
            kept.append(point)
    return sorted(kept, key=lambda point: (point.loss, _costs(point)[1:]))


def _costs(point: Point) -> tuple[float, ...]:
    """Everything that should be small; what was not measured of any point counts for none."""
    numbers = (point.loss, point.postings, point.bytes, point.visited, point.latency_p50_ms)
    return tuple(0.0 if number is None else float(number) for number in numbers)


def _interval(found: float, values: Values, full: Values, look: int) -> tuple[float, float]:
    """Where the loss over all queries of this kind lies, for a point that was the look-th to be looked at.

    `found` is the loss on the half that confirmed. The spread is that of all queries, and of one more that loses a
    tenth: where no query loses anything, a next one may.
    """
    lacking = np.append((1 - found) * full - values, full.mean() / 10)
    spread = math.sqrt(float((lacking**2).sum()) / len(full)) / float(full.mean())
    count = len(full[1::2])
    reach = spread / math.sqrt(count) * _student(1 - MISSES / (look * (look + 1)) / 2, count - 1)
    return found - reach, found + reach


def _student(share: float, freedom: int) -> float:
    """The quantile of Student's t, by the first terms of its expansion around the normal one."""
    z = NormalDist().inv_cdf(share)
    return z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)
