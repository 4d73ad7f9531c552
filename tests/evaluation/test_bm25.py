"""BM25 over texts gives the published figures of Lucene's variant."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from sparse_ingest.corpora.collections import read_qrels, read_queries
from sparse_ingest.errors import MissingExtraError
from sparse_ingest.evaluation.bm25 import rank_texts
from sparse_ingest.evaluation.measures import measure
from sparse_ingest.records import Query
from sparse_ingest.searching.hits import Ranked

SHARED = Path(__file__).parents[3] / "shared" / "data"


@pytest.mark.skipif(not SHARED.is_dir(), reason="shared/data does not exist")
def test_the_figures_of_cranfield_are_the_published_ones():
    folder = SHARED / "cranfield"
    rows = map(json.loads, (folder / "corpus.jsonl").read_text(encoding="utf-8").splitlines())
    documents = [(row["_id"], " ".join(filter(None, [row.get("title"), row["text"]]))) for row in rows]
    ranked = (Ranked(*found) for found in rank_texts(documents, list(read_queries(folder)), 100))
    mean = measure(ranked, read_qrels(folder), ("nDCG@10", "RR", "R@100")).mean
    assert [round(value, 4) for value in mean.values()] == [0.4937, 0.7742, 0.7387]


def test_documents_without_a_query_word_are_not_found():
    documents = [("a", "the river runs"), ("b", "a stone"), ("c", "")]
    found = list(rank_texts(documents, [Query("1", "rivers"), Query("2", "zebra")], 10))
    assert [(query_id, doc_ids) for query_id, doc_ids, _ in found] == [("1", ["a"]), ("2", [])]


def test_a_missing_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "bm25s", None)
    with pytest.raises(MissingExtraError, match=r"sparse-ingest\[evaluate\]"):
        list(rank_texts([("a", "river")], [Query("1", "river")], 1))
