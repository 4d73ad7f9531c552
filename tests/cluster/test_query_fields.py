"""Filters and collapse by fields that the index does not map."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import pytest

from sparse_ingest.cluster import indexes
from sparse_ingest.cluster.client import Client, Connection, connect
from sparse_ingest.cluster.mappings import leaves
from sparse_ingest.cluster.query_fields import refuse_unmapped
from sparse_ingest.errors import UsageError

MAPPING: dict[str, Any] = {
    "_meta": {"sparse_ingest": {"fields": {"mixed": None, "price": "double"}}},
    "properties": {
        "title": {"type": "text", "fields": {"raw": {"type": "keyword"}}},
        "price": {"type": "double"},
        "meta": {"properties": {"lang": {"type": "keyword"}}},
        "parts": {"type": "nested", "properties": {"size": {"type": "long"}}},
        "labels": {"type": "flat_object"},
        "wide": {"type": "nested", "include_in_root": True, "properties": {"size": {"type": "long"}}},
        "suggest": {"type": "search_as_you_type"},
        "sparse": {"type": "rank_features"},
    },
}
GOOD = [
    {"term": {"price": 1}},
    {"term": {"meta.lang": {"value": "en", "boost": 2}}},
    {"terms": {"title.raw": ["a"], "boost": 1}},
    {"range": {"price": {"gte": 1}}},
    {"exists": {"field": "meta"}},
    {"ids": {"values": ["1"]}},
    {"term": {"_id": "1"}},
    {"term": {"labels.any.thing": "x"}},
    {"nested": {"path": "parts", "query": {"range": {"parts.size": {"gt": 1}}}}},
    {"term": {"wide.size": 1}},
    {"match": {"suggest._2gram": "x"}},
    {"multi_match": {"query": "x", "fields": ["title^2", "unknown*"]}},
    {"script": {"script": {"source": "doc['unknown'].size() > 0"}}},
    {"a_clause_of_2031": {"unknown": 1}},
    {"bool": {"filter": {"term": {"price": 1}}, "must_not": [{"match_all": {}}], "minimum_should_match": 0}},
    {"bool": {}},
    {"knn": {"field": "price", "query_vector": [1.0], "k": 1}},
    {"knn": {"price": {"vector": [1.0], "k": 1, "filter": {"term": {"price": 1}}}}},
    {"sparse_vector": {"field": "sparse", "query_vector": {"a": 1.0}}},
]
BAD = [
    {"knn": {"field": "unknown", "query_vector": [1.0], "k": 1}},
    {"knn": {"unknown": {"vector": [1.0], "k": 1}}},
    {"knn": {"field": "price", "query_vector": [1.0], "k": 1, "filter": [{"term": {"unknown": 1}}]}},
    {"knn": {"price": {"vector": [1.0], "k": 1, "filter": {"term": {"unknown": 1}}}}},
    {"term": {"": "price"}},
    {"sparse_vector": {"field": "unknown", "query_vector": {"a": 1.0}}},
    {"term": {"unknown": 1}},
    {"term": {"meta": 1}},
    {"term": {"title.unknown": "x"}},
    {"terms": {"unknown": [1], "boost": 1}},
    {"range": {"unknown": {"gte": 1}}},
    {"exists": {"field": "unknown"}},
    {"match": {"unknown": "x"}},
    {"prefix": {"unknown": "x"}},
    {"bool": {"must": [{"bool": {"should": [{"term": {"price": 1}}, {"wildcard": {"unknown": "x*"}}]}}]}},
    {"bool": {"must_not": {"regexp": {"unknown": "x"}}}},
    {"constant_score": {"filter": {"term": {"unknown": 1}}}},
    {"dis_max": {"queries": [{"term": {"price": 1}}, {"term": {"unknown": 1}}]}},
    {"nested": {"path": "unknown", "query": {"match_all": {}}}},
    {"nested": {"path": "parts", "query": {"range": {"parts.unknown": {"gt": 1}}}}},
    {"function_score": {"query": {"term": {"unknown": 1}}}},
    {"boosting": {"positive": {"match_all": {}}, "negative": {"term": {"unknown": 1}}, "negative_boost": 0.5}},
    {"multi_match": {"query": "x", "fields": ["title", "unknown^3"]}},
]


@pytest.fixture(scope="module")
def mapped(opensearch_url: str) -> Iterator[str]:
    name = f"sparse-ingest-test-{secrets.token_hex(6)}"
    with closing(connect(Connection(opensearch_url))) as client:
        client.call("PUT", f"/{name}", {"mappings": MAPPING | {"dynamic": False}})
        yield name
        client.call("DELETE", f"/{name}")


@pytest.mark.parametrize("known", [None, MAPPING])
@pytest.mark.parametrize("filter", GOOD, ids=str)
def test_mapped_fields_and_unknown_clauses_are_accepted(
    client: Client, mapped: str, filter: dict[str, Any], known: dict[str, Any] | None
) -> None:
    refuse_unmapped(client, f"/{mapped}", known, filter, "price")


@pytest.mark.parametrize("filter", BAD, ids=str)
def test_an_unmapped_field_is_refused_with_the_list_of_mapped_fields(
    client: Client, mapped: str, filter: dict[str, Any]
) -> None:
    with pytest.raises(
        UsageError, match=r"Mapped fields: labels .*, meta\.lang \(keyword\), .*price \(double\)"
    ) as error:
        refuse_unmapped(client, f"/{mapped}", MAPPING, filter, None)
    assert "rank_features" not in str(error.value)


@pytest.mark.parametrize("clause", [{"term": {"parts.size": 1}}, {"exists": {"field": "parts"}}], ids=str)
def test_a_nested_field_outside_its_nested_clause_is_refused(client: Client, clause: dict[str, Any]) -> None:
    within: dict[str, Any] = {"nested": {"path": "wide", "query": clause}}
    for filter in (clause, {"bool": {"must_not": clause}}, within):
        with pytest.raises(UsageError, match="of the filter is in the nested object 'parts'"):
            refuse_unmapped(client, "/unused", MAPPING, filter, None)


def test_runtime_and_flattened_fields_of_elasticsearch_are_accepted(client: Client) -> None:
    mapping = {"runtime": {"day": {"type": "keyword"}}, "properties": {"labels": {"type": "flattened"}}}
    filter = {"bool": {"filter": [{"term": {"day": "x"}}, {"term": {"labels.any": "x"}}]}}
    refuse_unmapped(client, "/unused", mapping, filter, None)


@pytest.mark.elasticsearch_only
def test_a_field_beside_fields_within_its_name_is_accepted(client: Client, index_name: str) -> None:
    names = ["deep.b", "host", "host.name"]
    properties: dict[str, Any] = dict.fromkeys(names, {"type": "keyword"})
    client.call("PUT", f"/{index_name}", {"mappings": {"subobjects": False, "properties": properties}})
    there = indexes.need_index(client, index_name, "")
    assert [name for name, _ in leaves(there.mappings)] == names
    for name in names:
        refuse_unmapped(client, there.path, there.mappings, {"term": {name: "x"}}, None)
    with pytest.raises(UsageError, match=r"'host.other' of .* Mapped fields: deep.b .*, host .*, host.name"):
        refuse_unmapped(client, there.path, there.mappings, {"term": {"host.other": "x"}}, None)


@pytest.mark.parametrize("names", ["deep.b.c deep host.name host", "host deep host.name deep.b.c"])
def test_dotted_names_and_objects_of_a_mapping_are_merged(names: str) -> None:
    entry = {"type": "keyword"}
    inner = {"properties": {"a": entry, "b": {"properties": {"d": entry}}}}
    properties = {name: inner if name == "deep" else entry for name in names.split()}
    found = dict(leaves(indexes.with_objects({"properties": properties})))
    assert sorted(found) == ["deep.a", "deep.b.c", "deep.b.d", "host", "host.name"]
    assert all(each["type"] == "keyword" for each in found.values())


def test_the_message_states_if_documents_have_the_unmapped_field(client: Client, mapped: str) -> None:
    with pytest.raises(UsageError, match="'mixed' of collapse.*Documents have it"):
        refuse_unmapped(client, f"/{mapped}", None, None, "mixed")


def test_a_range_of_numbers_on_a_keyword_field_is_a_warning(client: Client, caplog: pytest.LogCaptureFixture) -> None:
    for name, bound in (("price", 5), ("meta.lang", "a"), ("meta.lang", 5)):
        refuse_unmapped(client, "/unused", MAPPING, {"bool": {"filter": [{"range": {name: {"lt": bound}}}]}}, None)
    assert len(caplog.messages) == 1
    assert caplog.messages[0].startswith("meta.lang is mapped as keyword: the range compares its values as text")


def test_a_field_added_after_the_mapping_was_read_is_accepted(client: Client, index_name: str) -> None:
    client.call("PUT", f"/{index_name}", {"mappings": {"properties": {"late": {"type": "long"}}}})
    refuse_unmapped(client, f"/{index_name}", {"properties": {}}, {"term": {"late": 1}}, None)
    refuse_unmapped(client, "/sparse-ingest-test-no-such-index", None, {"term": {"late": 1}}, None)
