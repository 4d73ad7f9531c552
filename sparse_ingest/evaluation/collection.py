"""A collection to evaluate on: queries and relevance judgments (qrels), read from files or folders.

Queries without judgments are skipped. Judged queries that are not in the file are excluded from all means.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from sparse_ingest.corpora.collections import read_qrels, read_queries
from sparse_ingest.corpora.text_formats import Quoting
from sparse_ingest.errors import CorpusError, UsageError
from sparse_ingest.evaluation.measures import Qrels
from sparse_ingest.records import Query

logger = logging.getLogger(__name__)


class Collection(NamedTuple):
    """Queries and their qrels; `judged` queries of the file have judgments."""

    path: Path
    qrels: Qrels
    judged: int
    quoting: Quoting | None = None  # of the queries

    def queries(self) -> Iterator[Query]:
        """Read the judged queries from the file."""
        return (query for query in read_queries(self.path, self.quoting) if query.id in self.qrels)

    def judged_documents(self) -> set[str]:
        """Return the ids of all documents with a relevance judgment for a query of the file."""
        return {doc_id for query in self.queries() for doc_id in self.qrels[query.id]}


def collection_of(queries: Path | str | None, qrels: Path | str | None, quoting: Quoting | None = None) -> Collection:
    """Return the collection of two files, or of the folder in BEIR's or MTEB's layout with both.

    Raises:
        UsageError: neither is given, or one file is given for both.
        CorpusError: a file cannot be read, or no query has a relevance judgment.
    """
    first, second = Path(queries or qrels or ""), Path(qrels or queries or "")
    if not (queries or qrels) or (first == second and not first.is_dir()):
        raise UsageError("Give --queries F and --qrels F, or --queries FOLDER with both in it.")
    judged = read_qrels(second, quoting)
    if not judged:
        raise CorpusError(f"{second} has no relevance judgments. Expected lines of query, document and score.")
    ids = [query.id for query in read_queries(first, quoting)]
    asked = sum(query_id in judged for query_id in ids)
    if not asked:
        found = f"{first} has {ids[0]!r}" if ids else f"{first} has no queries"
        raise CorpusError(
            f"The relevance judgments in {second} are for other queries: they name {next(iter(judged))!r}, "
            f"and {found}. Give queries and qrels of the same collection."
        )
    if asked < len(ids):
        logger.warning("%d of %d queries have no relevance judgments and are skipped.", len(ids) - asked, len(ids))
    if missing := len(judged) - asked:
        logger.warning(
            "%d of %d judged queries are not in %s: the results are for the other %d.",
            missing, len(judged), first, asked,
        )  # fmt: skip
    return Collection(first, judged, asked, quoting)


def has_judged_passages(judged: set[str], known: int, parents: int, place: str) -> bool:
    """Return whether a run or index has the judged documents as passages, or raise `CorpusError` if it has none.

    Of the `judged` documents it has `known`, and passages of `parents`. `place` names it in messages.
    """
    found = known or parents
    if not found:
        raise CorpusError(
            f"{place} has none of the {len(judged):,} judged documents, such as {min(judged)!r}. "
            "Give the qrels of the corpus that was encoded."
        )
    if not known:
        logger.warning("The qrels name documents, and passages are searched: the best passage counts for its document.")
    if found < len(judged):
        logger.warning("%s has %d of the %d judged documents: the rest cannot be found.", place, found, len(judged))
    return not known
