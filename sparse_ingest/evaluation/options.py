"""What an evaluation is asked for: one frozen dataclass for the command line and the Python API."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from sparse_ingest.pipeline import option


@dataclass(frozen=True)
class EvaluateOptions:
    """Options of `evaluate`."""

    stored: bool = option(False, "With --run: keep 9 bits of each weight, as an index does")
    measures: tuple[str, ...] = ()  # of ir-measures, beside the usual five
    k: int | None = None  # documents to find; None: 100, or the largest cut-off of a measure
    bm25: bool | None = None  # a row of BM25; None: with an index
    concurrency: int | None = option(None, "Requests to an index in flight  [default: 1]")
    trec_run: Path | str | None = None  # write what was found as a run file of trec_eval
    compare: Path | str | None = None  # test against this run file of trec_eval
