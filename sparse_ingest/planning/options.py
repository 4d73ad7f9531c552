"""What a plan is asked for: one frozen dataclass for the command line and the Python API."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from sparse_ingest.pipeline import option

SAMPLE = 200  # queries
LOSS = 0.01  # share of the quality


@dataclass(frozen=True)
class PlanOptions:
    """Options of `plan`."""

    qrels: Path | str | Mapping[str, Mapping[str, int]] | None = (
        None  # quality is nDCG@10 then, otherwise the share of the ten best documents
    )
    loss: float = option(LOSS, range=(0, 1))  # share of the quality that may be lost
    sample: int = SAMPLE  # queries to plan with
    out: Path | str | None = None  # folder for plan.json, plan.png, plan.html and pipeline.toml
