"""Options of `plan`: one frozen dataclass for the command line and the Python API."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from sparse_ingest.evaluation.options import QueriesOptions
from sparse_ingest.pipeline import option

MOST_QUERIES = 2000


@dataclass(frozen=True)
class PlanOptions(QueriesOptions):
    """Options of `plan`. The four `hybrid` options override [query]."""

    qrels: Path | str | Mapping[str, Mapping[str, int]] | None = option(
        None, "Relevance judgments: measure nDCG@10 instead of the overlap of the ten best documents", metavar="F"
    )
    loss: float = option(0.01, "Allowed loss of quality, as a share", range=(0, 1))
    sample: int = option(200, "Number of queries to plan with")
    out: Path | str | None = option(None, "Write plan.json, plan.png, plan.html and pipeline.toml here", metavar="DIR")
