"""The result of a plan: points, their Pareto frontier, the choice, and the report.

The loss of a point is relative to the mean quality of unpruned vectors. One half of the queries chooses, the other half
confirms: on both, the interval of the loss must end within the limit. A point that is not confirmed is skipped, and the
next one is tested with the same queries. Test j has the error rate 5% / (j (j + 1)), which sums to 5% over all tests.
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
from sparse_ingest.planning.options import MOST_QUERIES
from sparse_ingest.planning.sweep import PruningRule

MISSES = 0.05  # error rate of the interval, over all plans
HALVES = (slice(0, None, 2), slice(1, None, 2))  # queries that choose, and queries that confirm
Values = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Point:
    """Pruning rules and an engine, with quality and cost; None is not measured.

    `overlap_10` and `overlap_100` are the shares of the ten and hundred best documents of unpruned vectors that it
    finds. `terms` is the mean per document, `visited` the postings that an exact search reads per query, `bytes` the
    predicted size of all postings, `index_bytes` the size of the index. `tied` queries have equal scores for the tenth
    and eleventh document, and an index may return either. `per_query` is the quality of each query; plan.json
    lacks it.
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
    index_bytes: int | None = None
    visited: float | None = None
    tied: int
    latency_p50_ms: float | None = None
    latency_p95_ms: float | None = None
    loss: float
    per_query: Values = field(default_factory=lambda: np.empty(0), repr=False, compare=False)

    @property
    def is_lossless(self) -> bool:
        """Whether nothing is pruned and the search is exact, so nothing is lost."""
        return not self.documents and not self.query and self.engine == "exact" and not self.loss

    def as_json(self) -> dict[str, Any]:
        """Return all fields but `per_query`."""
        return {name: value for name, value in asdict(self).items() if name != "per_query"}


class Choice(NamedTuple):
    """The chosen point. `loss` is measured on the confirming half of the queries, with its 95% `interval`.

    `chosen_by` is the loss on the other half; `passed_over` cheaper points were not confirmed.
    """

    point: Point
    loss: float
    interval: tuple[float, float]
    chosen_by: float
    passed_over: int


class Unsettled(NamedTuple):
    """A point that is cheaper than the choice, with a mean loss within the limit but too wide an interval.

    `loss` is the larger loss of the two halves, with its 95% `interval`. About `sample` queries would settle it, if
    they have the same mean and spread.
    """

    point: Point
    loss: float
    interval: tuple[float, float]
    sample: int


@dataclass(frozen=True)
class PlanReport:
    """Result of a plan; `--json` prints these keys.

    `points` are pruning rules on the run, `settings` engine settings on the index, each with its frontier (positions in
    the list). In a hybrid plan, whose settings are `hybrid`, `settings` and `full_quality` are measured in hybrid
    search, `points` without it. `index_bytes` is the current size. `pipeline` has the chosen settings. `written` are
    the files of `out`.
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
    hybrid: dict[str, Any] | None
    choice: Choice | None
    unsettled: Unsettled | None
    load_flags: str
    pipeline: Pipeline
    written: Sequence[Path] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return what `--json` prints."""
        return {
            **{name: value for name, value in vars(self).items() if name not in ("pipeline", "written")},
            "points": [point.as_json() for point in self.points],
            "settings": [point.as_json() for point in self.settings],
            **{
                name: {**one._asdict(), "point": one.point.as_json()} if one else None
                for name, one in (("choice", self.choice), ("unsettled", self.unsettled))
            },
            "pipeline": asdict(self.pipeline),
        }


def loss_of(values: Values, full: Values) -> float:
    """Return the relative loss of mean quality."""
    return 1.0 - float(values.mean() / full.mean())


def choose(points: Sequence[Point], full: Values, *, loss: float, cost: Callable[[Point], float]) -> Choice | None:
    """Return the cheapest point whose loss is certain to be at most `loss`, or None.

    It is certain if on each half of the queries the interval of the loss ends at `loss` or below. `full` is the
    quality of each query with unpruned vectors. The caller shuffles the queries.
    """
    for look, point in enumerate(candidates(frontier(points), full, loss=loss, cost=cost), start=1):
        chosen_by, found = (loss_of(point.per_query[half], full[half]) for half in HALVES)
        interval = _interval(found, point.per_query, full, MISSES / (look * (look + 1)))
        if point.is_lossless:
            interval = (0.0, 0.0)
        if interval[1] <= loss:
            return Choice(point, found, interval, chosen_by, look - 1)
    return None


def unsettled(
    points: Sequence[Point], full: Values, choice: Choice | None, *, loss: float, cost: Callable[[Point], float]
) -> Unsettled | None:
    """Return a point of the frontier that is cheaper than the choice and has a mean loss below `loss`, or None.

    It is the cheapest that `MOST_QUERIES` can settle, otherwise the one that needs the fewest queries.
    """
    found = []
    for point in frontier(points):
        if point.loss < loss and not point.is_lossless and not (choice and cost(point) >= cost(choice.point)):
            doubtful = max(loss_of(point.per_query[half], full[half]) for half in HALVES)
            interval = _interval(doubtful, point.per_query, full)
            # Computed as for the first point to confirm.
            reach = NormalDist().inv_cdf(1 - MISSES / 4) * _spread(point.loss, point.per_query, full)
            sample = max(2 * (reach / (loss - point.loss)) ** 2, 1.5 * len(full))
            step = 10 ** (math.floor(math.log10(sample)) - 1)  # two digits
            found.append(Unsettled(point, doubtful, interval, math.ceil(sample / step) * step))
    return min(
        found,
        key=lambda one: (0, cost(one.point)) if one.sample <= MOST_QUERIES else (one.sample, cost(one.point)),
        default=None,
    )


def candidates(
    points: Sequence[Point], full: Values, *, loss: float, cost: Callable[[Point], float]
) -> Iterator[Point]:
    """Yield the points whose loss on the choosing half is certain to be at most `loss`, cheapest first."""
    chosen_by = HALVES[0]
    for point in sorted(points, key=lambda point: (cost(point), loss_of(point.per_query[chosen_by], full[chosen_by]))):
        found = loss_of(point.per_query[chosen_by], full[chosen_by])
        if point.is_lossless or _interval(found, point.per_query, full)[1] <= loss:
            yield point


def frontier(points: Sequence[Point]) -> list[Point]:
    """Return the Pareto frontier, the smallest loss first.

    Points are compared by loss, bytes (or number) of postings, postings visited and latency, if known for all points.
    """
    names = ["bytes" if all(point.bytes is not None for point in points) else "postings", "visited", "latency_p50_ms"]
    names = [name for name in names if all(getattr(point, name) is not None for point in points)]
    # Sums in another order differ in their last digits.
    costs = np.array([[round(point.loss, 9), *(getattr(point, name) for name in names)] for point in points])
    kept = {
        tuple(own): point
        for own, point in reversed(list(zip(costs, points, strict=True)))  # the first of equal points is kept
        if not ((costs <= own).all(axis=1) & (costs < own).any(axis=1)).any()
    }
    return [kept[own] for own in sorted(kept)]


def _interval(found: float, values: Values, full: Values, misses: float = MISSES) -> tuple[float, float]:
    """Return the confidence interval of the loss `found` on one half of the queries; `misses` is its error rate."""
    count = len(full) // 2
    reach = _spread(found, values, full) / math.sqrt(count) * _student(1 - misses / 2, count - 1)
    return found - reach, found + reach


def _spread(found: float, values: Values, full: Values) -> float:
    """Return the standard deviation of the loss of a query, with one added query that loses a tenth.

    The added query is for samples in which no query loses anything.
    """
    lacking = np.append((1 - found) * full - values, full.mean() / 10)
    return math.sqrt(float((lacking**2).sum()) / len(full)) / float(full.mean())


def _student(share: float, freedom: int) -> float:
    """Return the quantile of Student's t, by the first terms of its expansion around the normal quantile."""
    z = NormalDist().inv_cdf(share)
    return z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)
