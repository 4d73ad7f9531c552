"""Waiting for shard copies and for a cluster that is briefly unavailable; every wait is bounded."""

from __future__ import annotations

from contextlib import closing

import pytest
from support.reporters import NoNotes
from support.secure_proxy import secure_proxy

from sparse_ingest.cluster import indexes, settling
from sparse_ingest.cluster.client import Client, Connection, ResponseError, UnreachableError, connect
from sparse_ingest.cluster.sending import Retries
from sparse_ingest.cluster.settling import Durability
from sparse_ingest.cluster.waiting import Waiting
from sparse_ingest.errors import ClusterError
from sparse_ingest.reporting import SILENT, SilentReporter

FAST = Retries(attempts=4, base_s=0.001, cap_s=0.002)


def create_index(client: Client, name: str, *, shards: int = 1, replicas: int = 0) -> indexes.Index:
    settings = {"number_of_shards": shards, "number_of_replicas": replicas, "refresh_interval": -1}
    return indexes.create_index(client, name, {"settings": settings, "mappings": {"dynamic": False}})


NEVER = NoNotes()


def test_started_copies_need_no_wait(client: Client, index_name: str) -> None:
    assert settling.wait_for_copies(client, create_index(client, index_name, shards=2), NEVER) is None


def test_replicas_without_a_node_are_reported_and_not_waited_for(client: Client, index_name: str) -> None:
    index = create_index(client, index_name, shards=2, replicas=1)
    message = settling.wait_for_copies(client, index, NEVER)
    assert message is not None
    assert "the cluster has 1 data node: 2 of 4 copies cannot be created" in message


def test_copies_that_never_start_are_an_error_also_without_cluster_permissions(
    client: Client, index_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = create_index(client, index_name, replicas=1)
    call = Client.call

    def without_cluster(self: Client, method: str, path: str, *arguments, **keywords):
        if path.startswith("/_cluster"):
            raise ResponseError("no", status=403, kind="security_exception", reason="no permissions")
        return call(self, method, path, *arguments, **keywords)

    monkeypatch.setattr(Client, "call", without_cluster)
    monkeypatch.setattr(settling, "_POLL_S", 0.05)
    with pytest.raises(ClusterError, match=r"has 1 of 2 copies.* without a change for 0.2 s.*allocation/explain"):
        settling.wait_for_copies(client, index, SILENT, patience_s=0.2)


def test_a_call_is_retried_while_the_cluster_is_unavailable() -> None:
    answers: list[object] = [
        UnreachableError("gone"),
        ResponseError("busy", status=503, kind="x", reason="x"),
        ResponseError("busy", status=429, kind="x", reason="x"),
        "here",
    ]

    def ask() -> object:
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    assert settling.patiently(ask, FAST, Waiting("cluster")) == "here"


@pytest.mark.parametrize(
    "error",
    [
        ResponseError("no", status=404, kind="x", reason="x"),
        ResponseError("blocked", status=429, kind="cluster_block_exception", reason="x"),
        ClusterError("the index is another one"),
    ],
)
def test_permanent_errors_are_not_retried(error: ClusterError) -> None:
    calls = []

    def ask() -> None:
        calls.append(1)
        raise error

    with pytest.raises(ClusterError):
        settling.patiently(ask, FAST, Waiting("cluster"))
    assert len(calls) == 1


def test_an_unassigned_primary_is_reported_with_the_reason(
    client: Client, index_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(settling, "_POLL_S", 0.1)
    settings = {"number_of_shards": 2, "index.routing.allocation.require.box": "hot"}
    client.call("PUT", f"/{index_name}", {"settings": settings}, params={"wait_for_active_shards": "0"})
    index = indexes.find_index(client, index_name)
    assert index is not None
    with pytest.raises(ClusterError) as caught:
        settling.wait_for_primaries(client, index, FAST)
    for part in (index_name, "the primary of 2 of its 2 shards is not allocated", 'filters [box:"hot"]'):
        assert part in str(caught.value)


def test_the_wait_ends_when_the_primaries_are_started(
    opensearch_url: str, index_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(settling, "_POLL_S", 0.1)

    class Freeing(SilentReporter):
        notes: list[str] = []

        def note(self, message: str) -> None:
            self.notes.append(message)
            connected.call("PUT", f"/{index_name}/_settings", {"index.routing.allocation.require.box": None})

    with closing(connect(Connection(opensearch_url), reporter=Freeing())) as connected:
        settings = {"index.routing.allocation.require.box": "hot"}
        connected.call("PUT", f"/{index_name}", {"settings": settings}, params={"wait_for_active_shards": "0"})
        index = indexes.find_index(connected, index_name)
        assert index is not None
        settling.wait_for_primaries(connected, index, Retries())
    assert "is not allocated" in Freeing.notes[0]


def test_without_permission_to_read_shards_the_check_is_skipped(client: Client, index_name: str) -> None:
    index = create_index(client, index_name)
    assert settling.unstarted_primaries(client, index) is None
    forbidden = 403, {"error": {"type": "security_exception", "reason": "no permissions for [indices:monitor/stats]"}}
    check = lambda request: forbidden if "_stats" in request.path else None  # noqa: E731
    with secure_proxy(client.address, check=check) as proxy, closing(connect(Connection(proxy.url))) as other:
        assert settling.unstarted_primaries(other, index) is None


def test_a_restarted_primary_is_detected(client: Client, index_name: str) -> None:
    index = create_index(client, index_name)
    durability = Durability(client, index)
    durability.settle()
    client.call("POST", f"/{index_name}/_close")
    client.call("POST", f"/{index_name}/_open", params={"wait_for_active_shards": "1"})
    with pytest.raises(ClusterError, match="was restarted or moved"):
        durability.settle()
