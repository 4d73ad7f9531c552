"""Document frequencies as the server counts them, also of tokens that need escaping in a query."""

from __future__ import annotations

from collections import Counter

import pytest
from support.runs import DOCUMENTS, VOCABULARY, make_run

from sparse_ingest.cluster import postings
from sparse_ingest.cluster.client import Connection, connect
from sparse_ingest.cluster.postings import count_known, document_frequencies
from sparse_ingest.loading.load import load
from sparse_ingest.pipeline import Pipeline

pytestmark = pytest.mark.both_products(quick=False)


def test_every_token_and_document_is_counted(tmp_path, cluster_url, index_name, monkeypatch):
    monkeypatch.setattr(postings, "_SEARCHES", 7)
    monkeypatch.setattr(postings, "_FILTERS", 7)
    monkeypatch.setattr(postings, "_IDS", 2)
    run = make_run(tmp_path / "run")
    load(run.path, index=index_name, pipeline=Pipeline(), connection=Connection(url=cluster_url))
    client = connect(Connection(url=cluster_url))
    tokens = [token for token in VOCABULARY if token is not None]
    expected = Counter(token for terms in DOCUMENTS.values() for token in terms)
    # Counted by searches, and by aggregations.
    for documents in (None, len(DOCUMENTS)):
        found = document_frequencies(client, index_name, "sparse", tokens, documents)
        assert found == {token: expected[token] for token in tokens}
        assert document_frequencies(client, index_name, "sparse", [], documents) == {}
    assert count_known(client, index_name, [*DOCUMENTS, "unknown"]) == len(DOCUMENTS)
