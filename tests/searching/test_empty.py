"""Why a search found nothing: each cause on an index or a run where it is the only one."""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.reporters import Recorder
from support.runs import make_run
from support.tables import write_table

import sparse_ingest as si
from sparse_ingest.cluster.client import Client, Connection, connect
from sparse_ingest.cluster.search_bodies import Engine
from sparse_ingest.pipeline import HybridSettings
from sparse_ingest.searching.empty import why_empty_index
from sparse_ingest.searching.index_search import search_index

PROPERTIES: dict[str, Any] = {
    "sparse": {"type": "rank_features"}, "other": {"type": "rank_features"}, "tag": {"type": "keyword"},
    "title": {"type": "text"}, "text": {"type": "text"},
}  # fmt: skip
DOCUMENTS = {
    "a": {"sparse": {"river": 2.0, "light": 0.5}, "tag": "x", "text": "river"},
    "b": {"other": {"moon": 1.0}, "tag": "y", "text": "moon"},
}


@pytest.fixture(scope="module")
def client(opensearch_url: str) -> Client:
    return connect(Connection(url=opensearch_url))


@pytest.fixture(scope="module")
def index(client: Client) -> Iterator[str]:
    name = f"sparse-ingest-test-{secrets.token_hex(6)}"
    for suffix in ("", "-none"):
        settings = {"number_of_shards": 1, "number_of_replicas": 0}
        body = {"settings": settings, "mappings": {"dynamic": False, "properties": PROPERTIES}}
        client.call("PUT", f"/{name}{suffix}", body)
    for doc_id, document in DOCUMENTS.items():
        client.call("PUT", f"/{name}/_doc/{doc_id}", document, params={"refresh": "true"})
    yield name
    for suffix in ("", "-none"):
        client.call("DELETE", f"/{name}{suffix}")


ENGINE = Engine(mappings={"properties": PROPERTIES})
TWO_PHASE = Engine("two-phase", two_phase={"prune_type": "top_k", "prune_ratio": 1})
HYBRID = Engine(hybrid=HybridSettings(hybrid=True))


@pytest.mark.parametrize(
    ("engine", "weights", "text", "filter", "said"),
    [
        (ENGINE, {"river": 1.0}, "", {"term": {"tag": "z"}}, ["The filter matches none of the 2 documents of index"]),
        (ENGINE, {"river": 1.0}, "", {"term": {"tag": "y"}},
         ["The filter matches 1 of 2 documents, but the query finds none of them; without the filter it finds"]),
        (ENGINE, {"sun": 1.0, "dew": 0.5}, "", None, ["in field 'sparse': 'sun', 'dew'."]),
        (ENGINE, {"sun": 1.0}, "", {"term": {"tag": "y"}}, ["in field 'sparse': 'sun'."]),
        (ENGINE, {"moon": 1.0}, "", None, ["'moon'. Field 'other' has some: pass --set index.field=other."]),
        (TWO_PHASE, {"sun": 1.0, "light": 0.5}, "", None, ["Two-phase search finds documents by the heavy"]),
        (HYBRID, {"sun": 1.0}, "zebra", None, ["in field 'sparse': 'sun'.", "BM25 finds no word of the query"]),
        (Engine(keys={"river": "river"}), {"sun": 1.0}, "", None, ["The vocabulary of index .* lacks .*: 'sun'."]),
    ],
)  # fmt: skip
def test_the_cause_is_found_in_the_index(
    client: Client, index: str, engine: Engine, weights: dict[str, float], text: str, filter: Any, said: list[str]
) -> None:
    if not text:
        assert search_index(client, index, weights, size=5, engine=engine, filter=filter) == []
    found = why_empty_index(client, index, weights, engine, text, filter)
    assert len(found) == len(said)
    for message, pattern in zip(found, said, strict=True):
        assert re.search(pattern, message)


def test_an_index_without_documents_is_named(client: Client, index: str) -> None:
    [message] = why_empty_index(client, f"{index}-none", {"river": 1.0}, ENGINE, "", None)
    assert message.startswith(f"Index '{index}-none' has no documents")


def test_a_run_and_an_index_note_the_cause_through_the_reporter(
    tmp_path: Path, opensearch_url: str, index_name: str
) -> None:
    run = make_run(tmp_path / "run", {"a": {"catch": 1.0}}, model=str(write_table(tmp_path / "model")))
    si.load(run.path, index=index_name, url=opensearch_url)
    for text, of_run, of_index in (
        ("river", f"None of the 1 documents of {run.path} has a token of the query: 'river'.", "'river'"),
        ("zebra", "the model knows none of its words (tokens: '[UNK]')", "the model knows none of its words"),
    ):
        notes = Recorder(), Recorder()
        assert si.open_run(run.path, progress=notes[0]).search(text) == []
        with si.open_index(index_name, url=opensearch_url, progress=notes[1]) as opened:
            assert opened.search(text) == []
            assert opened.search("catch") and len(notes[1].notes) == 1
            assert opened.why_empty(text) == notes[1].notes
        assert of_run in notes[0].notes[0] and of_index in notes[1].notes[0]


def test_a_cluster_that_refuses_the_query_for_tokens_gives_no_cause(client: Client, index: str) -> None:
    """As without the neural-search plugin: here the field is not sparse."""
    assert why_empty_index(client, index, {"river": 1.0}, Engine(field="title"), "", None) == []
