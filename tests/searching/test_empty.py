"""Why a search found nothing: each cause on an index or a run where it is the only one."""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.reporters import Recorder
from support.runs import make_run
from support.tables import write_table

import sparse_ingest as si
from sparse_ingest.cluster.client import Client
from sparse_ingest.cluster.search_bodies import Engine
from sparse_ingest.pipeline import HybridSettings
from sparse_ingest.searching.empty import why_empty_index
from sparse_ingest.searching.index_search import search_index

pytestmark = pytest.mark.both_products

DOCUMENTS = {
    "a": {"sparse": {"river": 2.0, "light": 0.5}, "tag": "x", "text": "river"},
    "b": {"other": {"moon": 1.0}, "tag": "y", "text": "moon"},
}


def mapped(client: Client) -> dict[str, Any]:
    sparse = client.dialect.field_entry()
    text = {name: {"type": "text"} for name in ("title", "text")}
    return {"properties": {"sparse": sparse, "other": sparse, "tag": {"type": "keyword"}, **text}}


@pytest.fixture(scope="module")
def index(client: Client) -> Iterator[str]:
    name = f"sparse-ingest-test-{secrets.token_hex(6)}"
    for suffix in ("", "-none"):
        settings = {"number_of_shards": 1, "number_of_replicas": 0}
        client.call("PUT", f"/{name}{suffix}", {"settings": settings, "mappings": {"dynamic": False, **mapped(client)}})
    for doc_id, document in DOCUMENTS.items():
        client.call("PUT", f"/{name}/_doc/{doc_id}", document, params={"refresh": "true"})
    yield name
    for suffix in ("", "-none"):
        client.call("DELETE", f"/{name}{suffix}")


def check_cause(
    client: Client, index: str, engine: Engine, weights: dict[str, float], said: list[str], text: str = "",
    filter: Any = None,
) -> None:  # fmt: skip
    engine = replace(engine, mappings=mapped(client))
    if not text:
        assert search_index(client, index, weights, size=5, engine=engine, filter=filter) == []
    found = why_empty_index(client, index, weights, engine, text, filter)
    assert len(found) == len(said)
    for message, pattern in zip(found, said, strict=True):
        assert re.search(pattern, message)


@pytest.mark.parametrize(
    ("weights", "filter", "said"),
    [
        ({"river": 1.0}, {"term": {"tag": "z"}}, "The filter matches none of the 2 documents of index"),
        ({"river": 1.0}, {"term": {"tag": "y"}},
         "The filter matches 1 of 2 documents, but the query finds none of them; without the filter it finds"),
        ({"sun": 1.0, "dew": 0.5}, None, "in field 'sparse': 'sun', 'dew'."),
        ({"sun": 1.0}, {"term": {"tag": "y"}}, "in field 'sparse': 'sun'."),
        ({"moon": 1.0}, None, "'moon'. Field 'other' has some: pass --set index.field=other."),
    ],
)  # fmt: skip
def test_the_cause_is_found_in_the_index(
    client: Client, index: str, weights: dict[str, float], filter: Any, said: str
) -> None:
    check_cause(client, index, Engine(), weights, [said], filter=filter)


def test_a_token_that_the_vocabulary_lacks_is_named(client: Client, index: str) -> None:
    engine = Engine(keys={"river": "river"})
    check_cause(client, index, engine, {"sun": 1.0}, ["The vocabulary of index .* lacks .*: 'sun'."])


@pytest.mark.opensearch_only
def test_the_part_of_a_two_phase_or_hybrid_search_that_finds_nothing_is_named(client: Client, index: str) -> None:
    two_phase = Engine("two-phase", two_phase={"prune_type": "top_k", "prune_ratio": 1})
    check_cause(client, index, two_phase, {"sun": 1.0, "light": 0.5}, ["Two-phase search finds documents by the heavy"])
    said = ["in field 'sparse': 'sun'.", "BM25 finds no word of the query"]
    check_cause(client, index, Engine(hybrid=HybridSettings(hybrid=True)), {"sun": 1.0}, said, text="zebra")


def test_an_index_without_documents_is_named(client: Client, index: str) -> None:
    [message] = why_empty_index(client, f"{index}-none", {"river": 1.0}, Engine(), "", None)
    assert message.startswith(f"Index '{index}-none' has no documents")


def test_a_run_and_an_index_note_the_cause_through_the_reporter(
    tmp_path: Path, cluster_url: str, index_name: str
) -> None:
    run = make_run(tmp_path / "run", {"a": {"catch": 1.0}}, model=str(write_table(tmp_path / "model")))
    si.load(run.path, index=index_name, url=cluster_url)
    for text, of_run, of_index in (
        ("river", f"None of the 1 documents of {run.path} has a token of the query: 'river'.", "'river'"),
        ("zebra", "the model knows none of its words (tokens: '[UNK]')", "the model knows none of its words"),
    ):
        notes = Recorder(), Recorder()
        assert si.open_run(run.path, progress=notes[0]).search(text) == []
        with si.open_index(index_name, url=cluster_url, progress=notes[1]) as opened:
            assert opened.search(text) == []
            assert opened.search("catch") and len(notes[1].notes) == 1
            assert opened.why_empty(text) == notes[1].notes
        assert of_run in notes[0].notes[0] and of_index in notes[1].notes[0]


def test_a_cluster_that_refuses_the_query_for_tokens_gives_no_cause(client: Client, index: str) -> None:
    """As without the neural-search plugin: here the field is not sparse."""
    assert why_empty_index(client, index, {"river": 1.0}, Engine(field="title"), "", None) == []
