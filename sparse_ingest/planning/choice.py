"""Which point of a plan is the cheapest that keeps the quality: points, their frontier, the choice.

In: points with the quality of every query. Out: those that no other beats in everything, and the one to take. A loss is
the share of the mean quality that a point lacks against the whole vectors. The choice is made on one half of the
queries; the other half must confirm it, and its mean is what the plan predicts. A point that it does not confirm is
passed over, and counted: the more there are, the more the prediction flatters, and its interval does not know of them.
Not covered: where the qualities come from (sweep.py, engines.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from sparse_ingest.planning.rules import Rule

RESAMPLES = 4000
SEED = 0

Values = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Point:
    """One way to prune and to search, what it finds and what it costs; None is what was not measured.

    `overlap_10` and `overlap_100` are the shares of the ten and hundred best documents of the whole vectors that it
    finds. `terms` are those of a document, `visited` the postings that an exact search of a query reads, `bytes` the
    predicted size of all postings. `per_query` is the quality of each query.
    """

    documents: Rule
    query: Rule
    engine: str
    parameters: Mapping[str, Any]
    overlap_10: float
    overlap_100: float | None
    ndcg_10: float | None
    terms: float
    postings: int
    emptied: int
    bytes: int | None
    visited: float | None
    latency_p50_ms: float | None
    latency_p95_ms: float | None
    loss: float
    per_query: Values = field(repr=False, compare=False)

    def as_json(self) -> dict[str, Any]:
        """Everything but the single queries."""
        return {name: value for name, value in asdict(self).items() if name != "per_query"}


class Choice(NamedTuple):
    """The point to take. `loss` is that of the half of the queries that confirmed it, within `interval` (95%).

    `chosen_by` is the loss on the half that chose it; `passed_over` points were cheaper, but not confirmed.
    """

    point: Point
    loss: float
    interval: tuple[float, float]
    chosen_by: float
    passed_over: int

    def as_json(self) -> dict[str, Any]:
        """As `--json` prints it."""
        return {**self._asdict(), "point": self.point.as_json()}


def loss_of(values: Values, full: Values) -> float:
    """The share of the mean quality that is lacking."""
    return 1.0 - float(values.mean() / full.mean())


def choose(points: Sequence[Point], full: Values, *, loss: float, cost: Callable[[Point], float]) -> Choice | None:
    """The cheapest point whose loss is at most `loss` on both halves of the queries, None when there is none.

    `full` is the quality of each query with whole vectors. Every other query chooses; the caller shuffles them.
    """
    choosing = np.arange(len(full)) % 2 == 0
    passed_over = 0
    for point in sorted(points, key=lambda point: (cost(point), point.loss)):
        chosen_by = loss_of(point.per_query[choosing], full[choosing])
        if chosen_by > loss:
            continue
        found = loss_of(point.per_query[~choosing], full[~choosing])
        if found > loss:
            passed_over += 1
            continue
        return Choice(point, found, _interval(point.per_query[~choosing], full[~choosing]), chosen_by, passed_over)
    return None


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


def _interval(values: Values, full: Values) -> tuple[float, float]:
    """Where the loss lies when the queries are drawn again, 95 of 100 times."""
    random = np.random.default_rng(SEED)
    drawn = random.integers(0, len(full), (RESAMPLES, len(full)))
    means = full[drawn].mean(axis=1)
    losses = 1.0 - values[drawn].mean(axis=1)[means > 0] / means[means > 0]
    low, high = np.quantile(losses, [0.025, 0.975])
    return float(low), float(high)
