"""Options of `evaluate`: one frozen dataclass for the command line and the Python API."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from sparse_ingest.pipeline import HybridSettings, option


@dataclass(frozen=True, kw_only=True)
class QueriesOptions(HybridSettings):
    """Options of stages that read files of queries and search an index with them."""

    quoting: Literal["rfc4180", "none"] | None = option(
        None, "Quoting of csv queries and qrels; none: quotes are ordinary characters  [default: rfc4180]"
    )
    allow_partial: bool = option(
        False, "With --index: accept partial results of failed shards and timeouts, with a warning"
    )


@dataclass(frozen=True)
class EvaluateOptions(QueriesOptions):
    """Options of `evaluate`. The four `hybrid` options override [query]."""

    stored: bool = option(False, "With --run: use 9-bit weights, as in an index")
    measures: tuple[str, ...] = option(
        (), "Additional measure of ir-measures, such as Success@1; may be repeated", metavar="NAME",
        flags="--measure",
    )  # fmt: skip
    k: int | None = option(None, "Number of hits per query  [default: 100, or the largest cutoff]", flags="-k --size")
    ignore_identical_ids: bool = option(False, "Omit hits with the id of the query, as in BEIR (ArguAna, Quora)")
    bm25: bool | None = option(
        None, "Also evaluate BM25 (for a run: on its texts, in memory)  [default: with an index]",
        flags="--bm25/--no-bm25",
    )  # fmt: skip
    cost: bool = option(
        True, "Count the documents of every token, for the cost of a query; in a large index that takes about 20 s",
        flags="--cost/--no-cost",
    )  # fmt: skip
    concurrency: int | None = option(None, "With --index: number of requests in flight  [default: 1]")
    trec_run: Path | str | None = option(None, "Write the rankings as a TREC run file", metavar="FILE")
    compare: Path | str | None = option(
        None,
        "Compare with this TREC run file, or JSON of evaluate --per-query: wins, losses and two paired tests",
        metavar="RUNFILE",
    )
