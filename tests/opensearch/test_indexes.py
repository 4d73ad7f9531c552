"""The index: its body, its stamp, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace

import pytest

from sparse_ingest.errors import ClusterError, PipelineError, UsageError
from sparse_ingest.opensearch import indexes
from sparse_ingest.opensearch.client import Client, Connection, connect
from sparse_ingest.pipeline import IndexSettings, packaged_folder

STAMP = indexes.Stamp({"document": "m", "revision": "1"}, "ab" * 32, "sparse", "r" * 64, "r" * 64, ("r" * 64,))


@pytest.fixture(scope="module")
def client(opensearch_url: str) -> Iterator[Client]:
    with closing(connect(Connection(opensearch_url))) as client:
        yield client


def index_with(
    client: Client, name: str, field: dict[str, object] | None, stamp: indexes.Stamp | None = None
) -> indexes.Index:
    mappings: dict[str, object] = {"properties": {"sparse": field} if field else {}}
    if stamp:
        mappings["_meta"] = {"sparse_ingest": stamp.as_meta()}
    return indexes.create_index(client, name, {"mappings": mappings})


def test_the_packaged_body_is_curl_able_as_it_is(client: Client, index_name: str) -> None:
    body = json.loads((packaged_folder() / "opensearch" / "rank_features.json").read_text())
    client.call("PUT", f"/{index_name}", body)
    assert body["mappings"]["dynamic"] is False
    assert body["mappings"]["_source"]["excludes"] == ["sparse"]


def test_the_body_takes_field_source_mode_and_stamp(client: Client, index_name: str) -> None:
    body = indexes.index_body(IndexSettings(field="tokens", source="keep"), replace(STAMP, field="tokens"))
    index = indexes.create_index(client, index_name, body)
    assert index.mappings["properties"]["tokens"] == {"type": "rank_features"}
    assert "sparse" not in index.mappings["properties"]
    assert "tokens" not in index.mappings.get("_source", {}).get("excludes", [])
    assert index.stamp == replace(STAMP, field="tokens")
    excluded = indexes.index_body(IndexSettings(field="tokens"), STAMP)
    assert excluded["mappings"]["_source"] == {"excludes": ["tokens"]}


def test_a_body_of_ones_own_keeps_its_other_keys(tmp_path) -> None:
    path = tmp_path / "body.json"
    path.write_text(
        json.dumps(
            {
                "settings": {"number_of_shards": 3},
                "mappings": {
                    "_meta": {"owner": "me"},
                    "_source": {"excludes": ["big", "vector"]},
                    "properties": {"vector": {"type": "rank_features"}, "big": {"type": "text"}},
                },
            }
        )
    )
    body = indexes.index_body(IndexSettings(body=str(path)), STAMP)
    assert body["settings"] == {"number_of_shards": 3}
    assert body["mappings"]["_meta"].keys() == {"owner", "sparse_ingest"}
    assert body["mappings"]["_source"]["excludes"] == ["big", "sparse"]
    assert body["mappings"]["properties"].keys() == {"sparse", "big"}
    with pytest.raises(PipelineError, match="maps 'big' as another type"):
        indexes.index_body(IndexSettings(body=str(path), field="big"), STAMP)


@pytest.mark.parametrize(
    "content", ["[]", "{", '{"mappings": {}}', '{"mappings": {"properties": {"a": {"type": "text"}}}}']
)
def test_what_is_no_body_is_refused(tmp_path, content: str) -> None:
    path = tmp_path / "body.json"
    path.write_text(content)
    with pytest.raises(PipelineError, match="is no index body"):
        indexes.index_body(IndexSettings(body=str(path)), STAMP)


def test_a_missing_body_names_the_packaged_ones_and_sparse_vector_waits() -> None:
    with pytest.raises(PipelineError, match="packaged: rank_features"):
        indexes.index_body(IndexSettings(body="nope"), STAMP)
    with pytest.raises(PipelineError, match="not supported yet"):
        indexes.index_body(IndexSettings(kind="sparse_vector"), STAMP)


def test_a_stamp_keeps_other_keys_of_meta(client: Client, index_name: str) -> None:
    meta = {"_meta": {"owner": "me"}, "properties": {"sparse": {"type": "rank_features"}}}
    index = indexes.create_index(client, index_name, {"mappings": meta})
    assert index.stamp is None
    indexes.stamp_index(client, index, STAMP)
    indexes.stamp_index(client, index, replace(STAMP, load="done"))
    found = indexes.find_index(client, index_name)
    assert found is not None
    assert found.mappings["_meta"]["owner"] == "me"
    assert found.stamp == replace(STAMP, load="done")


@pytest.mark.parametrize(
    ("field", "found"),
    [
        (None, "is no such field"),
        ({"type": "text"}, "is text;"),
        ({"properties": {"river": {"type": "float"}}}, "is object;"),
        (
            {"type": "rank_features", "positive_score_impact": False},
            "is rank_features with positive_score_impact false",
        ),
    ],
)
def test_a_mapping_that_does_not_fit_is_refused(
    client: Client, index_name: str, field: dict[str, object] | None, found: str
) -> None:
    with pytest.raises(ClusterError, match=f"the field 'sparse' {found}.*expected is rank_features"):
        indexes.check_fits(index_with(client, index_name, field), STAMP)


def test_vectors_of_another_model_are_refused_and_both_are_named(client: Client, index_name: str) -> None:
    index = index_with(client, index_name, {"type": "rank_features"}, STAMP)
    indexes.check_fits(index, replace(STAMP, run_id="other"))
    with pytest.raises(ClusterError, match="vectors of 'm' with vocabulary abababababab; this run is of 'm'.*cdcdcd"):
        indexes.check_fits(index, replace(STAMP, vocabulary_sha256="cd" * 32))
    with pytest.raises(ClusterError, match="revision is '1' there and '2' here"):
        indexes.check_fits(index, replace(STAMP, model={"document": "m", "revision": "2"}))


def test_an_alias_stands_for_its_only_or_its_write_index(client: Client, index_name: str) -> None:
    first = index_with(client, f"{index_name}-1", None)
    alias = f"{index_name}-alias"
    add = {"add": {"index": first.name, "alias": alias}}
    client.call("POST", "/_aliases", {"actions": [add]})
    assert indexes.find_index(client, alias) == first._replace(mappings=first.mappings)
    second = index_with(client, f"{index_name}-2", None)
    client.call("POST", "/_aliases", {"actions": [{"add": {"index": second.name, "alias": alias}}]})
    with pytest.raises(UsageError, match="without a write index"):
        indexes.find_index(client, alias)
    client.call(
        "POST", "/_aliases", {"actions": [{"add": {"index": second.name, "alias": alias, "is_write_index": True}}]}
    )
    found = indexes.find_index(client, alias)
    assert found is not None
    assert found.uuid == second.uuid


@pytest.mark.parametrize("name", ["a*", "a,b", "_all", "", "-a", "a/b"])
def test_a_name_that_could_stand_for_several_is_refused(client: Client, name: str) -> None:
    with pytest.raises(UsageError, match="is no index name"):
        indexes.find_index(client, name)


def test_a_deleted_or_remade_index_is_noticed(client: Client, index_name: str) -> None:
    index = index_with(client, index_name, None)
    indexes.check_uuid(client, index)
    indexes.delete_index(client, index)
    with pytest.raises(ClusterError, match="is gone"):
        indexes.check_uuid(client, index)
    index_with(client, index_name, None)
    with pytest.raises(ClusterError, match="now has UUID"):
        indexes.check_uuid(client, index)
    with pytest.raises(ClusterError, match="now has UUID"):
        indexes.stamp_index(client, index, STAMP)


def test_max_clauses_comes_from_the_cluster(client: Client) -> None:
    assert indexes.max_clauses(client) >= 1024
