"""The result of a plan: points, their Pareto frontier, the chosen one, and the report.

In: points with the quality of every query. A point's loss is the share of the unpruned vectors' mean quality that it
lacks. One half of the queries chooses, the other half must confirm: on both, the interval of the loss must end within
the limit. The predicted quality is the mean of the confirming half. A point that is not confirmed is skipped, and the
next one is tested with the same queries. So test j may fail in 5% / (j (j + 1)) of all plans, which is 5% over all
tests: the interval gets wider with each skipped point.
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
from sparse_ingest.planning.options import MOST_QUERIES
from sparse_ingest.planning.rules import PruningRule

MISSES = 0.05  # of all plans may predict an interval that does not hold
HALVES = (slice(0, None, 2), slice(1, None, 2))  # the queries that choose, and those that confirm
Values = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Point:
    """One way to prune and to search, what it finds and what it costs; None is what was not measured.

    `overlap_10` and `overlap_100` are the shares of the ten and hundred best documents of the unpruned vectors that it
    finds. `terms` are those of a document, `visited` the postings that an exact search of a query reads, `bytes` the
    predicted size of all postings, `index_bytes` that of the index with them. `tied` queries have an eleventh document
    with the score of the tenth; which of these an index returns cannot be predicted. `per_query` is the quality of each
    query.
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
    per_query: Values = field(repr=False, compare=False)

    @property
    def megabytes(self) -> float | None:
        """`bytes` as a table shows them."""
        return None if self.bytes is None else self.bytes / 1e6

    @property
    def index_megabytes(self) -> float | None:
        """`index_bytes` as a table shows them."""
        return None if self.index_bytes is None else self.index_bytes / 1e6

    @property
    def is_whole(self) -> bool:
        """Whether nothing is pruned and the search is exact, so nothing is lost."""
        return not self.documents and not self.query and self.engine == "exact" and not self.loss

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


class Unsettled(NamedTuple):
    """A point that is cheaper than the choice and loses little enough on average, but not for certain.

    `loss` is the larger one of the two halves of the queries, with its 95% `interval`. A plan with about `sample`
    queries would settle it, if their mean and spread are those of these queries.
    """

    point: Point
    loss: float
    interval: tuple[float, float]
    sample: int


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
    """The share of the mean quality that is lacking."""
    return 1.0 - float(values.mean() / full.mean())


def choose(points: Sequence[Point], full: Values, *, loss: float, cost: Callable[[Point], float]) -> Choice | None:
    """Return the cheapest point of the frontier that loses at most `loss` for certain, or None.

    It is certain if on each half of the queries the interval of the loss ends at `loss` or below. `full` is the
    quality of each query with unpruned vectors. Every other query chooses; the caller shuffles them.
    """
    for look, point in enumerate(candidates(frontier(points), full, loss=loss, cost=cost), start=1):
        chosen_by, found = (loss_of(point.per_query[half], full[half]) for half in HALVES)
        interval = _interval(found, point.per_query, full, MISSES / (look * (look + 1)))
        if point.is_whole:
            interval = (0.0, 0.0)
        if interval[1] <= loss:
            return Choice(point, found, interval, chosen_by, look - 1)
    return None


def unsettled(
    points: Sequence[Point], full: Values, choice: Choice | None, *, loss: float, cost: Callable[[Point], float]
) -> Unsettled | None:
    """Return a point of the frontier that is cheaper than the choice and has a mean loss below `loss`, or None.

    It is the cheapest that `MOST_QUERIES` can settle; if there is none, the one that needs the fewest queries.
    """
    found = []
    for point in frontier(points):
        if point.loss < loss and not point.is_whole and not (choice and cost(point) >= cost(choice.point)):
            doubtful = max(loss_of(point.per_query[half], full[half]) for half in HALVES)
            interval = _interval(doubtful, point.per_query, full)
            # As if it were the first point to be confirmed.
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
    """Yield the points that lose at most `loss` for certain on the half that chooses, the cheapest first."""
    chosen_by = HALVES[0]
    for point in sorted(points, key=lambda point: (cost(point), loss_of(point.per_query[chosen_by], full[chosen_by]))):
        found = loss_of(point.per_query[chosen_by], full[chosen_by])
        if point.is_whole or _interval(found, point.per_query, full)[1] <= loss:
            yield point


def frontier(points: Sequence[Point]) -> list[Point]:
    """Return the Pareto frontier, the smallest loss first.

    Points are compared by loss, bytes of postings (or their number), postings visited and latency, as far as these are
    known for all points.
    """
    names = ["bytes" if all(point.bytes is not None for point in points) else "postings", "visited", "latency_p50_ms"]
    names = [name for name in names if all(getattr(point, name) is not None for point in points)]
    # Sums of the same values in another order differ in their last digits.
    costs = np.array([[round(point.loss, 9), *(getattr(point, name) for name in names)] for point in points])
    kept = {
        tuple(own): point
        for own, point in reversed(list(zip(costs, points, strict=True)))  # of equal points the first is kept
        if not ((costs <= own).all(axis=1) & (costs < own).any(axis=1)).any()
    }
    return [kept[own] for own in sorted(kept)]


def _interval(found: float, values: Values, full: Values, misses: float = MISSES) -> tuple[float, float]:
    """Return the interval of the loss over all such queries, given `found` on one half; `misses` is its error rate."""
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
    """The quantile of Student's t, by the first terms of its expansion around the normal one."""
    z = NormalDist().inv_cdf(share)
    return z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)
