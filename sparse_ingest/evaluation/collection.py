"""A collection to evaluate on: its queries and its relevance judgments (qrels), read from files or folders.

Queries without judgments are not asked. Judged queries that the file lacks have no part in any mean.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from sparse_ingest.corpora.collections import read_qrels, read_queries
from sparse_ingest.errors import CorpusError, UsageError
from sparse_ingest.evaluation.measures import Qrels
from sparse_ingest.records import Query

logger = logging.getLogger(__name__)


class Collection(NamedTuple):
    """Queries and their qrels: `asked` queries of the file are judged, `unjudged` are not.

    `missing` counts the judged queries that the file lacks.
    """

    path: Path
    qrels: Qrels
    asked: int
    unjudged: int
    missing: int

    def queries(self) -> Iterator[Query]:
        """The judged queries, read again each time."""
        return (query for query in read_queries(self.path) if query.id in self.qrels)

    def judged_documents(self) -> set[str]:
        """The ids of all documents that a query of the file has a judgement for."""
        return {doc_id for query in self.queries() for doc_id in self.qrels[query.id]}


def collection_of(queries: Path | str | None, qrels: Path | str | None) -> Collection:
    """Return the collection of two files, or of the folder that holds both.

    Raises:
        UsageError: neither is given, or one file is to be both.
        CorpusError: see `read_collection`.
    """
    first, second = queries or qrels, qrels or queries
    if first is None or second is None or not (Path(first).is_dir() or first != second):
        raise UsageError("Give --queries F and --qrels F, or the folder that holds both.")
    return read_collection(Path(first), Path(second))


def read_collection(queries: Path, qrels: Path) -> Collection:
    """Read the judgements, and look which queries they are for; either path may be a folder of BEIR's or MTEB's layout.

    Raises:
        CorpusError: a file cannot be read, or no query has a judgement.
    """
    judgements = read_qrels(qrels)
    if not judgements:
        raise CorpusError(f"{qrels} holds no judgement. Give lines of query, document and score.")
    asked = unjudged = 0
    example = None
    for query in read_queries(queries):
        example = example or query.id
        if query.id in judgements:
            asked += 1
        else:
            unjudged += 1
    if not asked:
        found = f"{queries} has {example!r}" if example else f"{queries} holds no query"
        raise CorpusError(
            f"The judgements in {qrels} are for no query there is: they name {next(iter(judgements))!r}, and {found}. "
            "Give the queries and the judgements of one collection."
        )
    collection = Collection(queries, judgements, asked, unjudged, len(judgements) - asked)
    if unjudged:
        logger.warning("%d of %d queries have no judgement and are not asked.", unjudged, asked + unjudged)
    if collection.missing:
        logger.warning(
            "%d of %d judged queries are not in %s: the figures are those of the other %d.",
            collection.missing,
            len(judgements),
            queries,
            asked,
        )
    return collection


def check_judged(collection: Collection, known: int, place: str) -> None:
    """Refuse a place that has none of the judged documents; warn when some are missing."""
    judged = collection.judged_documents()
    if not known:
        raise CorpusError(
            f"{place} has none of the {len(judged):,} judged documents, such as {min(judged)!r}. "
            "Give the judgements of the corpus that was encoded."
        )
    if known < len(judged):
        logger.warning(
            "%s has %d of the %d judged documents: the others can never be found.", place, known, len(judged)
        )
