"""What an evaluation is asked for: one frozen dataclass for the command line and the Python API."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from sparse_ingest.pipeline import option


@dataclass(frozen=True)
class EvaluateOptions:
    """Options of `evaluate`."""

    stored: bool = option(False, "With --run: keep 9 bits of each weight, as an index does")
    measures: tuple[str, ...] = option(
        (), "Measure of ir-measures beside the usual five, such as Success@1; may be repeated", metavar="NAME",
        flags="--measure",
    )  # fmt: skip
    k: int | None = option(
        None, "How many documents to find  [default: 100, or the largest cut-off]", flags="-k --size"
    )
    ignore_identical_ids: bool = option(
        False, "Omit the document whose id is that of the query, as BEIR does (ArguAna, Quora)"
    )
    bm25: bool | None = option(
        None, "Add a row of BM25 (a run: over its texts, in memory)  [default: with an index]",
        flags="--bm25/--no-bm25",
    )  # fmt: skip
    quoting: Literal["rfc4180", "none"] | None = option(
        None, "Quotes in csv queries and qrels; none: a quote is a character like any other  [default: rfc4180]"
    )
    concurrency: int | None = option(None, "Requests to an index in flight  [default: 1]")
    allow_partial: bool = option(False, "With --index: accept searches in which shards fail or time runs out, and warn")
    trec_run: Path | str | None = option(None, "Write what was found as a run file of trec_eval", metavar="FILE")
    compare: Path | str | None = option(
        None, "Test against this run file of trec_eval: paired t-test and randomisation", metavar="RUNFILE"
    )
