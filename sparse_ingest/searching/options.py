"""What a search is asked for: one frozen dataclass for the command line and the Python API."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sparse_ingest.pipeline import option


@dataclass(frozen=True)
class SearchOptions:
    """Options of a search. `filter` and `hybrid` need an index; a hit of a hybrid search has no terms.

    Documents without the field `collapse` count as sharing one value. `stored` searches a run with the 9 bits that an
    index keeps of each weight. `concurrency` is for many queries on an index. Without `allow_partial` it is an error
    when a shard fails or time runs out.
    """

    k: int = option(10, "How many documents to find", flags="-k --size")
    filter: Mapping[str, Any] | None = option(None, "Find only what this query matches; @FILE reads it", metavar="JSON")
    collapse: str | None = option(
        None, "Find only the best document of each value of FIELD, such as parent of passages", metavar="FIELD"
    )
    hybrid: bool = option(False, "Beside BM25 on title and text; the server brings both scores together")
    stored: bool = False
    allow_partial: bool = option(False, "Accept a search in which shards fail or time runs out, and warn")
    concurrency: int = option(1, "With --queries: requests in flight")
