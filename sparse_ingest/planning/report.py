"""What a plan finds: points, the frontier of those that no other beats, the one to take, and the report of them all.

In: points with the quality of every query. A loss is the share of the mean quality that a point lacks against the whole
vectors. The choice is made on one half of the queries; the other half must confirm it, and its mean is what the plan
predicts. A point that it does not confirm is skipped, and the next one is tested with the same queries. So test j may
miss in 5% / (j (j + 1)) of all plans, which is 5% over all tests together: an interval is wider the more points were
skipped before it.
Not covered: where the qualities come from (sweep.py, engines.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import NormalDist
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from sparse_ingest.pipeline import EngineName, Pipeline
from sparse_ingest.planning.rules import PruningRule

MISSES = 0.05  # of all plans may predict an interval that does not hold
Values = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Point:
    """One way to prune and to search, what it finds and what it costs; None is what was not measured.

    `overlap_10` and `overlap_100` are the shares of the ten and hundred best documents of the whole vectors that it
    finds. `terms` are those of a document, `visited` the postings that an exact search of a query reads, `bytes` the
    predicted size of all postings. `tied` queries have an eleventh document with the score of the tenth: which of such
    documents an index gives, nobody can predict. `per_query` is the quality of each query.
    """

    documents: PruningRule
    query: PruningRule
    engine: EngineName = "exact"
    parameters: Mapping[str, Any] = field(default_factory=dict)
    overlap_10: float
    overlap_100: float | None = None
    ndcg_10: float | None = None
    terms: float
    postings: int
    emptied: int
    bytes: int | None = None
    visited: float | None = None
    tied: int
    latency_p50_ms: float | None = None
    latency_p95_ms: float | None = None
    loss: float
    per_query: Values = field(repr=False, compare=False)

    @property
    def megabytes(self) -> float | None:
        """`bytes` as a table shows them."""
        return None if self.bytes is None else self.bytes / 1e6

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


@dataclass(frozen=True)
class PlanReport:
    """What a plan found; `--json` prints these keys.

    `points` are rules on the run, `settings` those of an index, each with its frontier (places in the list).
    `index_bytes` is the size of the index as it is. `pipeline` has the chosen settings. `written` are the files of
    `out`.
    """

    run: str
    run_id: str
    documents: int
    queries: int
    quality: str
    full_quality: float
    allowed_loss: float
    points: list[Point]
    frontier: list[int]
    index: str | None
    index_bytes: int | None
    settings: list[Point]
    settings_frontier: list[int]
    choice: Choice | None
    load_flags: str
    pipeline: Pipeline
    written: Sequence[Path] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return what `--json` prints."""
        return {
            **{name: value for name, value in vars(self).items() if name not in ("pipeline", "choice", "written")},
            "points": [point.as_json() for point in self.points],
            "settings": [point.as_json() for point in self.settings],
            "choice": {**self.choice._asdict(), "point": self.choice.point.as_json()} if self.choice else None,
            "pipeline": asdict(self.pipeline),
        }


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
    costs = np.array([_costs(point) for point in points])
    kept = [
        point
        for point, own in zip(points, costs, strict=True)
        if not ((costs <= own).all(axis=1) & (costs < own).any(axis=1)).any()
    ]
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
