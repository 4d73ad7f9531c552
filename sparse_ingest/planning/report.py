"""What a plan finds: points, the one to take, and the report that holds them all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from sparse_ingest.pipeline import EngineName, Pipeline
from sparse_ingest.planning.rules import PruningRule

Values = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Point:
    """One way to prune and to search, what it finds and what it costs; None is what was not measured.

    `overlap_10` and `overlap_100` are the shares of the ten and hundred best documents of the whole vectors that it
    finds. `terms` are those of a document, `visited` the postings that an exact search of a query reads, `bytes` the
    predicted size of all postings. `tied` queries have an eleventh document with the score of the tenth: which of such
    documents an index gives, nobody can predict. `per_query` is the quality of each query.
    """

    documents: PruningRule
    query: PruningRule
    engine: EngineName
    parameters: Mapping[str, Any]
    overlap_10: float
    overlap_100: float | None
    ndcg_10: float | None
    terms: float
    postings: int
    emptied: int
    bytes: int | None
    visited: float | None
    tied: int
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
            "choice": self.choice.as_json() if self.choice else None,
            "pipeline": asdict(self.pipeline),
        }
