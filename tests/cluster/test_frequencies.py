"""Document frequencies as the server counts them, also of tokens that need escaping in a query."""

from __future__ import annotations

from collections import Counter

import pytest
from support.runs import DOCUMENTS, VOCABULARY, make_run

from sparse_ingest.cluster import postings
from sparse_ingest.cluster.client import Connection, ResponseError, connect
from sparse_ingest.cluster.postings import count_known, document_frequencies
from sparse_ingest.cluster.reading import UnsearchableFieldError
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
        with pytest.raises(UnsearchableFieldError, match="cannot search the sparse field"):
            document_frequencies(client, index_name, "text", tokens, documents)
    assert count_known(client, index_name, [*DOCUMENTS, "unknown"]) == len(DOCUMENTS)


def test_a_block_is_reported_with_the_request_that_removes_it(cluster_url, index_name):
    client = connect(Connection(url=cluster_url))
    alias = {f"{index_name}-alias": {}}
    client.call("PUT", f"/{index_name}", {"aliases": alias, "settings": {"index.blocks.read": True}})
    for documents in (None, 1):
        with pytest.raises(ResponseError, match=f"PUT /{index_name}/_settings"):
            document_frequencies(client, f"{index_name}-alias", "sparse", ["a"], documents)
    client.call("POST", f"/{index_name}/_close")
    for documents in (None, 1):
        with pytest.raises(ResponseError, match=f"index '{index_name}' is closed .*POST /{index_name}/_open"):
            document_frequencies(client, index_name, "sparse", ["a"], documents)
