"""Index bodies: packaged and custom ones, and mappings that are refused."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from sparse_ingest.cluster import indexes, mappings
from sparse_ingest.cluster.bulk_bodies import BodyWriter
from sparse_ingest.cluster.client import Client
from sparse_ingest.cluster.dialects import OpenSearchDialect
from sparse_ingest.cluster.stamps import Stamp
from sparse_ingest.errors import ClusterError, PipelineError
from sparse_ingest.pipeline import IndexSettings, packaged_folder
from sparse_ingest.records import SparseRows
from sparse_ingest.runs.shards import ShardPart

NEWEST = OpenSearchDialect(OpenSearchDialect.newest_tried)
STAMP = Stamp({"document": "m", "revision": "1"}, "ab" * 32, "sparse", "r" * 64, "r" * 64, ("r" * 64,))


def index_with(client: Client, name: str, field: dict[str, object] | None, stamp: Stamp | None = None) -> indexes.Index:
    mappings: dict[str, object] = {"properties": {"sparse": field} if field else {}}
    if stamp:
        mappings["_meta"] = {"sparse_ingest": stamp.as_meta()}
    return indexes.create_index(client, name, {"mappings": mappings})


def test_the_server_accepts_the_packaged_body_unchanged(client: Client, index_name: str) -> None:
    body = json.loads((packaged_folder() / "opensearch" / "rank_features.json").read_text())
    client.call("PUT", f"/{index_name}", body)
    assert body["mappings"]["dynamic"] is False
    assert body["mappings"]["_source"]["excludes"] == ["sparse"]


def test_field_source_mode_and_stamp_are_written_into_the_body(client: Client, index_name: str) -> None:
    body = mappings.index_body(IndexSettings(field="tokens", source="keep"), replace(STAMP, field="tokens"), NEWEST)
    index = indexes.create_index(client, index_name, body)
    assert index.mappings["properties"]["tokens"] == {"type": "rank_features"}
    assert "sparse" not in index.mappings["properties"]
    assert "tokens" not in index.mappings.get("_source", {}).get("excludes", [])
    assert index.stamp == replace(STAMP, field="tokens")
    excluded = mappings.index_body(IndexSettings(field="tokens"), STAMP, NEWEST)
    assert excluded["mappings"]["_source"] == {"excludes": ["tokens"]}


def test_a_custom_body_keeps_its_other_keys(tmp_path) -> None:
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
    body = mappings.index_body(IndexSettings(body=str(path)), STAMP, NEWEST)
    assert body["settings"] == {"number_of_shards": 3}
    assert body["mappings"]["_meta"].keys() == {"owner", "sparse_ingest"}
    assert body["mappings"]["_source"]["excludes"] == ["big", "sparse"]
    assert body["mappings"]["properties"].keys() == {"sparse", "big"}
    with pytest.raises(PipelineError, match="maps 'big' as another type"):
        mappings.index_body(IndexSettings(body=str(path), field="big"), STAMP, NEWEST)
    for name in ("", "spars*", "sparse.", "a..b", "_id"):
        with pytest.raises(PipelineError, match="The sparse field cannot be"):
            mappings.index_body(IndexSettings(field=name), STAMP, NEWEST)


def test_source_excludes_may_be_a_string(tmp_path) -> None:
    path = tmp_path / "body.json"
    properties = {"sparse": {"type": "rank_features"}, "big": {"type": "text"}}
    path.write_text(json.dumps({"mappings": {"_source": {"excludes": "big"}, "properties": properties}}))
    body = mappings.index_body(IndexSettings(body=str(path)), STAMP, NEWEST)
    assert body["mappings"]["_source"]["excludes"] == ["big", "sparse"]


SPARSE = '"properties": {"sparse": {"type": "rank_features"}}'


@pytest.mark.parametrize(
    "content",
    ["[]", "{", '{"mappings": {}}', '{"mappings": {"properties": {"a": {"type": "text"}}}}',
     f'{{"mappings": {{"_source": 3, {SPARSE}}}}}', f'{{"mappings": {{"_meta": 3, {SPARSE}}}}}',
     f'{{"aliases": [], "mappings": {{{SPARSE}}}}}', f'{{"settings": {{"index": 3}}, "mappings": {{{SPARSE}}}}}'],
)  # fmt: skip
def test_an_invalid_body_is_refused(tmp_path, content: str) -> None:
    path = tmp_path / "body.json"
    path.write_text(content)
    with pytest.raises(PipelineError, match="is not an index body"):
        mappings.index_body(IndexSettings(body=str(path)), STAMP, NEWEST)


def test_the_message_for_a_missing_body_lists_the_packaged_ones() -> None:
    with pytest.raises(PipelineError, match="packaged: rank_features, sparse_vector"):
        mappings.index_body(IndexSettings(body="nope"), STAMP, NEWEST)


def test_the_packaged_sparse_vector_body_is_accepted_plain_and_with_field_and_stamp(
    client: Client, index_name: str
) -> None:
    packaged = json.loads((packaged_folder() / "opensearch" / "sparse_vector.json").read_text())
    client.call("PUT", f"/{index_name}-plain", packaged)
    settings = IndexSettings(field="tokens", kind="sparse_vector")
    index = indexes.create_index(
        client, index_name, mappings.index_body(settings, replace(STAMP, field="tokens"), NEWEST)
    )
    assert index.mappings["properties"]["tokens"]["method"]["name"] == "seismic"
    mappings.check_fits(index, replace(STAMP, field="tokens"), "sparse_vector")


def test_a_sparse_vector_body_without_index_sparse_is_refused(tmp_path) -> None:
    path = tmp_path / "body.json"
    properties = {"sparse": {"type": "sparse_vector", "method": {"name": "seismic"}}}
    path.write_text(json.dumps({"mappings": {"properties": properties}}))
    settings = IndexSettings(kind="sparse_vector", body=str(path))
    with pytest.raises(PipelineError, match="Add it"):
        mappings.index_body(settings, STAMP, NEWEST)
    path.write_text(json.dumps({"settings": {"index.sparse": "true"}, "mappings": {"properties": properties}}))
    mappings.index_body(settings, STAMP, NEWEST)
    with pytest.raises(PipelineError, match="has a rank_features field"):
        mappings.index_body(replace(settings, kind="rank_features"), STAMP, NEWEST)


def test_a_server_before_3_3_is_refused_only_for_sparse_vector() -> None:
    OpenSearchDialect((2, 11, 0)).check_kind("rank_features")
    OpenSearchDialect((3, 3, 0)).check_kind("sparse_vector")
    with pytest.raises(ClusterError, match="is OpenSearch 3.2.1; sparse_vector fields need 3.3"):
        OpenSearchDialect((3, 2, 1)).check_kind("sparse_vector")


def written(writer: BodyWriter, *weights: float) -> list[str]:
    """The document lines for weights of token id 2; a weight of 0 gives a document without terms."""
    indptr = np.cumsum([0, *map(bool, weights)])
    nonzero = np.array([weight for weight in weights if weight], dtype=np.float32)
    vectors = SparseRows(list("abcdef")[: len(weights)], indptr, np.full(len(nonzero), 2, dtype=np.uint16), nonzero)
    part = ShardPart(np.arange(len(weights), dtype=np.uint64), [], vectors, ["{}"] * len(weights))
    return [line for request in writer.requests([part]) for line in request.body.decode().splitlines()[1::2]]


def test_keys_are_tokens_or_token_ids() -> None:
    vocabulary = ["a", None, "c"]
    features = {"properties": {"sparse": {"type": "rank_features"}}}
    lines = written(mappings.document_writer(features, "sparse", vocabulary), 1.0, 0)
    assert lines == ['{"sparse":{"c":1}}', '{"sparse":{}}']
    vector = {"type": "sparse_vector", "method": {"name": "seismic", "parameters": {"quantization_ceiling_ingest": 2}}}
    writer = mappings.document_writer({"properties": {"a": {"properties": {"b": vector}}}}, "a.b", vocabulary)
    lines = written(writer, 2.0, 2.001, 200.0, 0)
    assert [list(json.loads(line).get("a.b", {})) for line in lines] == [["2"], ["2"], ["2"], []]
    assert len(set(lines[:3])) == 2
    assert lines[3] == "{}"


def test_a_field_of_the_other_kind_is_refused(client: Client, index_name: str) -> None:
    index = index_with(client, index_name, {"type": "rank_features"})
    mappings.check_fits(index, STAMP)
    mappings.check_fits(index, STAMP, "rank_features")
    with pytest.raises(ClusterError, match="as rank_features; expected sparse_vector.*or pass --kind"):
        mappings.check_fits(index, STAMP, "sparse_vector")


def test_a_mapping_with_disable_objects_is_refused(client: Client, index_name: str) -> None:
    properties = {"sparse": {"type": "rank_features"}}
    body = {"mappings": {"dynamic": False, "disable_objects": True, "properties": properties}}
    index = indexes.create_index(client, index_name, body)
    client.call("PUT", f"/{index_name}/_doc/a", {"sparse": {"river": 1.0}}, params={"refresh": "true"})
    query = {"query": {"neural_sparse": {"sparse": {"query_tokens": {"river": 1.0}}}}}
    assert client.call("POST", f"/{index_name}/_search", query)["hits"]["hits"] == []
    with pytest.raises(ClusterError, match="disable_objects"):
        mappings.check_fits(index, STAMP)


@pytest.mark.parametrize(
    ("field", "found"),
    [
        (None, "has no field 'sparse';"),
        ({"type": "text"}, "maps the field 'sparse' as text;"),
        ({"properties": {"river": {"type": "float"}}}, "maps the field 'sparse' as object;"),
        (
            {"type": "rank_features", "positive_score_impact": False},
            "maps the field 'sparse' as rank_features with positive_score_impact false",
        ),
    ],
)
def test_a_mapping_that_does_not_fit_is_refused(
    client: Client, index_name: str, field: dict[str, object] | None, found: str
) -> None:
    index = index_with(client, index_name, field)
    with pytest.raises(ClusterError, match=f"{found}.*expected rank_features.*, or sparse_vector\\."):
        mappings.check_fits(index, STAMP)
    with pytest.raises(ClusterError, match=f"{found}.*, or sparse_vector on Elasticsearch. Load into a new index"):
        mappings.check_fits(index, STAMP, "rank_features")


def test_vectors_of_another_model_are_refused_with_both_names(client: Client, index_name: str) -> None:
    index = index_with(client, index_name, {"type": "rank_features"}, STAMP)
    mappings.check_fits(index, replace(STAMP, run_id="other"))
    differing = "vectors of 'm' with vocabulary abababababab, but this run is of 'm'.*cdcdcd"
    with pytest.raises(ClusterError, match=differing):
        mappings.check_fits(index, replace(STAMP, vocabulary_sha256="cd" * 32))
    with pytest.raises(ClusterError, match="revision is '1' there and '2' here"):
        mappings.check_fits(index, replace(STAMP, model={"document": "m", "revision": "2"}))
