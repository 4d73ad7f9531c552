"""Relevance judgments of the served documents, and nDCG@10 of every target for each judged query.

The targets are evaluated once in a thread, when a request first needs it, and again after an index has changed.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from threading import Lock
from typing import Any

from sparse_ingest.corpora.text_formats import Quoting
from sparse_ingest.evaluation.collection import collection_of
from sparse_ingest.evaluation.evaluate import evaluate
from sparse_ingest.evaluation.measures import parse_measures
from sparse_ingest.reporting import SilentReporter
from sparse_ingest.serving.targets import BM25, Target
from sparse_ingest.storage.waiting import in_thread

MEASURE = "nDCG@10"
Values = list[dict[str, float]]  # of each target: value by query id


class _Counting(SilentReporter):
    """Counts the queries that were searched."""

    done = 0

    def advance(self, count: int, **_: object) -> None:
        self.done += count


class Judgments:
    """The queries and qrels of a collection, in memory.

    Raises:
        CorpusError: a file cannot be read.
        UsageError: a file is missing.
        MissingExtraError: ir-measures is not installed.
    """

    def __init__(
        self, targets: Sequence[Target], queries: Path | str | None, qrels: Path | str | None, quoting: Quoting | None
    ) -> None:
        parse_measures([MEASURE])
        collection = collection_of(queries, qrels, quoting)
        self._evaluate = partial(evaluate, queries=queries, qrels=qrels, quoting=quoting, cost=False)
        self._targets = targets
        self.texts = {query.id: query.text for query in collection.queries()}
        self._ids = {text.strip(): query_id for query_id, text in reversed(self.texts.items())}
        self._qrels = {query_id: dict(collection.qrels[query_id]) for query_id in self.texts}
        self._lock = Lock()
        self._values: Future[Values] | None = None
        self._searched = _Counting()
        self._evaluated: list[object] = []  # the opened targets that the values are of

    def values(self) -> Future[Values]:
        """Return the values of all queries, which may still be computed."""
        with self._lock:
            opened: list[object] = [target.opened(None) for target in self._targets]
            same = list(map(id, opened)) == list(map(id, self._evaluated))
            failed = self._values is not None and self._values.done() and self._values.exception() is not None
            if self._values is None or not same or failed:
                self._evaluated, self._searched = opened, _Counting()
                self._values = in_thread(partial(self._per_target, self._searched), "evaluation")
            return self._values

    def progress(self) -> str:
        """Return how far the evaluation is, for a message."""
        return f"{self._searched.done:,} of {len(self.texts) * len(self._targets):,} searches are done"

    def of(self, text: str, values: Values) -> dict[str, Any]:
        """Return the judgments of a text; with nulls if it is not a judged query."""
        query_id = self._ids.get(text.strip())
        targets = [
            {"name": target.name, "ndcg@10": of_target.get(query_id) if query_id is not None else None}
            for target, of_target in zip(self._targets, values, strict=True)
        ]
        return {"query_id": query_id, "relevant": self._qrels.get(query_id or "", {}), "targets": targets}

    def queries(self, values: Values, order: str, limit: int, place: int) -> list[dict[str, Any]]:
        """Return the first queries, in the order of the file or with the lowest values of a target first."""
        ids = list(self.texts)
        if order == "worst":
            ids.sort(key=lambda query_id: values[place].get(query_id, 0.0))
        return [
            {"query_id": one, "text": self.texts[one], "ndcg@10": [each.get(one) for each in values]}
            for one in ids[:limit]
        ]

    def _per_target(self, searched: _Counting) -> Values:
        values = []
        for target in self._targets:
            by_words = target.engine == BM25
            found = self._evaluate(target.opened(None), bm25=by_words, progress=searched)
            row = found.bm25 if by_words and found.bm25 else found.search
            values.append(row.measured.per_query[MEASURE])
        return values
