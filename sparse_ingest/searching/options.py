"""Options of a search: one frozen dataclass for the command line and the Python API."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sparse_ingest.pipeline import HybridSettings, option, refuse_options


@dataclass(frozen=True)
class SearchOptions(HybridSettings):
    """Options of a search. `filter`, `hybrid` and `allow_partial` need an index.

    The four `hybrid` options override [query].

    Documents without the field `collapse` count as sharing one value. `stored` searches a run with 9-bit weights, as in
    an index. `concurrency` is for many queries on an index. Without `allow_partial`, a failed shard or a timeout is an
    error.
    """

    k: int = option(10, "Number of documents to find", flags="-k --size")
    filter: Mapping[str, Any] | None = option(None, "Query that hits must match, or @FILE", metavar="JSON")
    collapse: str | None = option(
        None, "Return only the best document for each value of FIELD, such as parent of passages", metavar="FIELD"
    )
    stored: bool = False
    allow_partial: bool = option(False, "Accept partial results of failed shards and timeouts, with a warning")
    concurrency: int = option(1, "With --queries: number of requests in flight")


def for_one_document(options: SearchOptions) -> SearchOptions:
    """Refuse options that would have no effect on the explanation of one document."""
    refuse_options(options, ("collapse", "hybrid"), "cannot be combined with the explanation of one document")
    return options
