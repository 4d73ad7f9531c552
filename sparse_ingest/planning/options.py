"""What a plan is asked for: one frozen dataclass for the command line and the Python API."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from sparse_ingest.pipeline import option

MOST_QUERIES = 2000


@dataclass(frozen=True)
class PlanOptions:
    """Options of `plan`."""

    qrels: Path | str | Mapping[str, Mapping[str, int]] | None = option(
        None, "Judgments: quality is nDCG@10 then, else the share of the ten best documents", metavar="F"
    )
    quoting: Literal["rfc4180", "none"] | None = option(
        None, "Quotes in csv queries and qrels; none: a quote is a character like any other  [default: rfc4180]"
    )
    loss: float = option(0.01, "Share of the quality that may be lost", range=(0, 1))
    sample: int = option(200, "Queries to plan with")
    allow_partial: bool = option(False, "With --index: accept searches in which shards fail or time runs out, and warn")
    out: Path | str | None = option(None, "Write plan.json, plan.png, plan.html and pipeline.toml here", metavar="DIR")
