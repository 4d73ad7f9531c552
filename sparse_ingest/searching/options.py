"""What a search is asked for: one frozen dataclass for the command line and the Python API."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class SearchOptions:
    """Options of a search.

    Attributes:
        k: How many documents to find.
        filter: A query of OpenSearch: documents that it does not match are no hits. Needs an index.
        collapse: A field: of the documents that share its value, only the best is a hit. Documents without the field
            count as sharing one.
        hybrid: Combine with BM25 on title and text, on the server. Hits have no terms then. Needs an index.
        stored: Search a run with the 9 bits that an index keeps of each weight.
        concurrency: Requests in flight, for many queries on an index.
    """

    k: int = 10
    filter: Mapping[str, Any] | None = None
    collapse: str | None = None
    hybrid: bool = False
    stored: bool = False
    concurrency: int = 1
