"""Indexes: stamps, lookup by name or alias, and the names that are refused."""

from __future__ import annotations

from dataclasses import replace

import pytest

from sparse_ingest.cluster import aliases, indexes
from sparse_ingest.cluster.client import Client
from sparse_ingest.cluster.stamps import Stamp
from sparse_ingest.errors import ClusterError, UsageError

STAMP = Stamp({"document": "m", "revision": "1"}, "ab" * 32, "sparse", "r" * 64, "r" * 64, ("r" * 64,))


def create_bare(client: Client, name: str) -> indexes.Index:
    return indexes.create_index(client, name, {"mappings": {}})


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


def test_an_alias_resolves_to_its_only_index_or_its_write_index(client: Client, index_name: str) -> None:
    first = create_bare(client, f"{index_name}-1")
    alias = f"{index_name}-alias"
    add = {"add": {"index": first.name, "alias": alias}}
    client.call("POST", "/_aliases", {"actions": [add]})
    assert indexes.find_index(client, alias) == first._replace(aliases={alias: {}})
    second = create_bare(client, f"{index_name}-2")
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
def test_a_name_that_can_match_several_indexes_is_refused(client: Client, name: str) -> None:
    with pytest.raises(UsageError, match="is not an index name"):
        indexes.find_index(client, name)


def test_a_deleted_or_recreated_index_is_detected(client: Client, index_name: str) -> None:
    index = create_bare(client, index_name)
    indexes.check_uuid(client, index)
    client.call("DELETE", index.path)
    with pytest.raises(ClusterError, match="is gone"):
        indexes.check_uuid(client, index)
    create_bare(client, index_name)
    with pytest.raises(ClusterError, match="now has UUID"):
        indexes.check_uuid(client, index)
    with pytest.raises(ClusterError, match="now has UUID"):
        indexes.stamp_index(client, index, STAMP)


def test_max_clauses_is_read_from_the_cluster(client: Client) -> None:
    assert client.dialect.max_clauses(client.find) >= 1024


def test_a_data_stream_is_refused(client: Client, index_name: str) -> None:
    template = f"/_index_template/{index_name}"
    client.call("PUT", template, {"index_patterns": [f"{index_name}-stream"], "data_stream": {}})
    try:
        client.call("PUT", f"/_data_stream/{index_name}-stream")
        with pytest.raises(UsageError, match="is a data stream"):
            indexes.find_index(client, f"{index_name}-stream")
        with pytest.raises(UsageError, match="is a data stream"):
            aliases.served_by(client, f"{index_name}-stream")
    finally:
        client.call("DELETE", f"/_data_stream/{index_name}-stream")
        client.call("DELETE", template)
