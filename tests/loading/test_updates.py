"""`--update`: add vectors to documents of another client, on a real server."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support.changes import ADDED, NEW, NEW_TITLES, OLD, existing_index, into, titled_run, titles_in, verify_all
from support.reporters import Recorder

from sparse_ingest.cluster import indexes
from sparse_ingest.cluster.client import Client
from sparse_ingest.errors import ClusterError, RunError
from sparse_ingest.pipeline import IndexSettings, Pipeline
from sparse_ingest.runs.run import Run

pytestmark = pytest.mark.both_products(quick=False)


@pytest.fixture
def old(tmp_path: Path) -> Run:
    return titled_run(tmp_path / "old", OLD, shard_rows=6)


@pytest.fixture
def new(tmp_path: Path) -> Run:
    return titled_run(tmp_path / "new", NEW, fields=NEW_TITLES)


def create_index_without_vectors(client: Client, index: str, **mappings: Any) -> None:
    """Create an index as another client would: the documents of OLD, without vectors."""
    mappings.setdefault("properties", {"title": {"type": "text"}})
    client.call("PUT", f"/{index}", {"mappings": mappings})
    lines = [line for doc_id in OLD for line in ({"index": {"_id": doc_id}}, {"title": f"Their {doc_id}"})]
    body = "".join(json.dumps(line) + "\n" for line in lines).encode()
    assert not client.call("POST", f"/{index}/_bulk", body, params={"refresh": "true"})["errors"]


def source_of(client: Client, index: str, doc_id: str) -> dict[str, Any]:
    return dict(client.call("GET", f"/{index}/_doc/{doc_id}")["_source"])


def test_update_adds_vectors_to_existing_documents_and_changes_nothing_else(
    client: Client, index_name: str, new: Run
) -> None:
    create_index_without_vectors(client, index_name)
    recorder = Recorder()
    report = into(client, index_name, new, update=True, progress=recorder)
    assert (report.documents, report.acknowledged, report.refused) == (20, 18, 2)
    letters = [json.loads(line) for line in Path(report.dead or "").read_text().splitlines()]
    assert {letter["id"]: letter["status"] for letter in letters} == dict.fromkeys(ADDED, 404)
    assert all("document_missing_exception" in letter["reason"] for letter in letters)
    client.call("POST", f"/{index_name}/_refresh")
    assert titles_in(client, index_name) == {doc_id: f"Their {doc_id}" for doc_id in OLD}
    found = verify_all(client, index_name, new)
    assert found.ok and found.refused_documents == 2 and found.expected_documents is None
    assert "stores the vectors twice" in " ".join(recorder.notes)
    if client.dialect.product == "opensearch":  # Elasticsearch returns no vectors in _source
        assert source_of(client, index_name, "d3")["sparse"] == {"river": 9.0}


@pytest.mark.parametrize("excludes", [[], ["spar*"], pytest.param(["sparse"], marks=pytest.mark.slow)])
def test_a_second_update_replaces_every_token_of_the_first(
    client: Client, index_name: str, tmp_path: Path, excludes: list[str]
) -> None:
    """OpenSearch merges partial documents into _source, so an old vector there would keep its old tokens."""
    create_index_without_vectors(client, index_name, _source={"excludes": excludes})
    first = titled_run(tmp_path / "first", {doc_id: {"river": 1.0, "cloud": 2.0} for doc_id in OLD})
    second = titled_run(tmp_path / "second", {doc_id: {"stone": 1.0} if doc_id != "d1" else {} for doc_id in OLD})
    into(client, index_name, first, update=True)
    report = into(client, index_name, second, update=True)
    assert (report.acknowledged, report.refused) == (20, 0)
    assert verify_all(client, index_name, second).ok
    assert titles_in(client, index_name)["d7"] == "Their d7"
    if client.dialect.product == "opensearch":
        assert source_of(client, index_name, "d7").get("sparse") == (None if excludes else {"stone": 1.0})


@pytest.mark.opensearch_only
def test_an_update_by_another_client_loses_a_vector_outside_source_and_keeps_one_inside(
    client: Client, index_name: str, tmp_path: Path
) -> None:
    run = titled_run(tmp_path / "run", OLD)
    for name, excludes, differing in (("inside", [], 0), ("outside", ["sparse"], 2)):
        index = f"{index_name}-{name}"
        create_index_without_vectors(client, index, _source={"excludes": excludes})
        recorder = Recorder()
        into(client, index, run, update=True, progress=recorder)
        assert ("loses its vector" in " ".join(recorder.notes)) == bool(excludes)
        client.call("POST", f"/{index}/_update/d4", {"doc": {"title": "changed"}})
        assert verify_all(client, index, run).differing == differing


@pytest.mark.parametrize(
    ("mappings", "message"),
    [
        ({"_source": {"enabled": False}}, "keeps no _source"),
        ({"_source": {"excludes": ["embed*"]}}, "would lose: embedding\\."),
        ({"_source": {"excludes": ["*embedding"]}}, "would lose: embedding, more.embedding\\."),
        ({"_source": {"excludes": ["more"]}}, "would lose: more.embedding\\."),
        ({"_source": {"includes": ["title", "embedding", "sparse"]}}, "would lose: more.embedding\\."),
    ],
)
def test_update_is_refused_if_it_would_lose_a_field(
    client: Client, index_name: str, new: Run, mappings: dict[str, Any], message: str
) -> None:
    vector = client.dialect.field_entry()
    mappings = {**mappings, "properties": {"title": {"type": "text"}, "embedding": vector,
                                           "more": {"properties": {"embedding": vector}}}}  # fmt: skip
    client.call("PUT", f"/{index_name}", {"mappings": mappings})
    before = existing_index(client, index_name)
    with pytest.raises(ClusterError, match=message):
        into(client, index_name, new, update=True)
    assert existing_index(client, index_name) == before


def test_update_of_a_missing_index_is_refused(client: Client, index_name: str, new: Run) -> None:
    with pytest.raises(ClusterError, match="Index .* does not exist; --update adds vectors to existing documents"):
        into(client, index_name, new, update=True)
    assert indexes.find_index(client, index_name) is None


def test_update_of_a_nested_field_and_a_later_since(client: Client, index_name: str, old: Run, new: Run) -> None:
    create_index_without_vectors(client, index_name, _source={"excludes": ["vectors"]})
    pipeline = Pipeline(index=IndexSettings(field="vectors.sparse"))
    into(client, index_name, old, update=True, pipeline=pipeline)
    report = into(client, index_name, new, update=True, since=old.path, pipeline=pipeline)
    assert (report.unchanged, report.acknowledged, report.refused) == (15, 18, 2)
    assert verify_all(client, index_name, new).ok
    with pytest.raises(RunError, match="loaded with --update"):
        into(client, index_name, old, since=new.path, pipeline=pipeline)


@pytest.mark.opensearch_only
def test_update_of_a_sparse_vector_field_also_removes_vectors(client: Client, index_name: str, tmp_path: Path) -> None:
    """An empty sparse_vector is no value, and a partial document without the field would change nothing."""
    sparse = {"type": "sparse_vector", "method": {"name": "seismic"}}
    mappings = {"_source": {"excludes": ["sparse"]}, "properties": {"title": {"type": "text"}, "sparse": sparse}}
    client.call("PUT", f"/{index_name}", {"settings": {"index.sparse": True}, "mappings": mappings})
    pipeline = Pipeline(index=IndexSettings(kind="sparse_vector"))
    whole, fewer = (
        titled_run(tmp_path / name, {"d1": {"river": 1.0}, "d2": second})
        for name, second in (("a", {"stone": 1.0}), ("b", {}))
    )
    into(client, index_name, whole, pipeline=pipeline)
    into(client, index_name, fewer, pipeline=pipeline, update=True)
    assert verify_all(client, index_name, fewer).ok
    assert titles_in(client, index_name) == {"d1": "Title of d1", "d2": "Title of d2"}
    assert verify_all(client, index_name, whole).differing == 1


@pytest.mark.opensearch_only
def test_a_sparse_vector_field_cannot_be_added_later(client: Client, index_name: str, new: Run) -> None:
    create_index_without_vectors(client, index_name)
    with pytest.raises(ClusterError, match="a sparse_vector field needs settings of a new index"):
        into(client, index_name, new, update=True, pipeline=Pipeline(index=IndexSettings(kind="sparse_vector")))
