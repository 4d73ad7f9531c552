"""Options of a search: one frozen dataclass for the command line and the Python API."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from sparse_ingest.errors import UsageError, short_repr
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

    def __post_init__(self) -> None:
        """Raise `UsageError` for a filter that is not one query."""
        if self.filter is not None and not (isinstance(self.filter, Mapping) and len(self.filter) == 1):
            raise UsageError(
                'filter must be one query, an object with one key, such as {"term": {"lang": "en"}}. Omit it to search '
                "without a filter."
            )


def check_ids(doc_ids: Iterable[object]) -> None:
    """Raise `UsageError` unless the ids of documents are strings with at least one character."""
    for one in doc_ids:
        if not isinstance(one, str) or not one:
            raise UsageError(f"The document id is {short_repr(one)}; expected a string that is not empty.")


def for_one_document(options: SearchOptions, doc_id: str) -> SearchOptions:
    """Refuse an invalid id, and options that would have no effect on the explanation of one document."""
    check_ids([doc_id])
    refuse_options(options, ("collapse", "hybrid"), "cannot be combined with the explanation of one document")
    return options
