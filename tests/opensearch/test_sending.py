"""Sending through a proxy that spoils requests: one outcome per document whatever happens on the way."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import closing, contextmanager

import pytest
from faulty_proxy import FaultyProxy, faulty_proxy

from sparse_ingest.errors import ClusterError
from sparse_ingest.opensearch import indexes
from sparse_ingest.opensearch.bodies import BulkRequest, bulk_requests
from sparse_ingest.opensearch.client import Client, Connection, ResponseError, connect
from sparse_ingest.opensearch.sending import Retries, send

FAST = Retries(attempts=6, base_s=0.01, cap_s=0.05, timeout_s=20)


@pytest.fixture
def index(opensearch_url: str, index_name: str) -> Iterator[tuple[str, indexes.Index, str]]:
    """Address, index and alias."""
    with closing(connect(Connection(opensearch_url))) as client:
        body = {"settings": {"number_of_replicas": 0}, "mappings": {"properties": {"s": {"type": "rank_features"}}}}
        made = indexes.create_index(client, index_name, body)
        yield opensearch_url, made, indexes.add_private_alias(client, made, "test" * 16)


@contextmanager
def through(url: str, faults=(), *, max_bytes: int | None = None) -> Iterator[tuple[Client, FaultyProxy]]:
    with faulty_proxy(url, faults, max_bytes=max_bytes) as proxy, closing(connect(Connection(proxy.url))) as client:
        yield client, proxy


def documents(count: int, bad: tuple[int, ...] = ()) -> Iterator[tuple[int, str, bytes]]:
    for row in range(count):
        weight = 0 if row in bad else 1.5
        yield row, f"d{row}", b'{"index":{"_id":"d%d"}}\n{"s":{"t":%g}}\n' % (row, weight)


def requests(count: int = 10, size: int = 5, bad: tuple[int, ...] = ()) -> Iterator[BulkRequest]:
    return bulk_requests(documents(count, bad), max_documents=size)


def count(client: Client, index: indexes.Index) -> int:
    indexes.refresh(client, index)
    return indexes.count_documents(client, index)


@pytest.mark.parametrize("in_flight", [1, 3])
def test_every_document_has_one_outcome_in_order(index, in_flight: int) -> None:
    url, made, alias = index
    with closing(connect(Connection(url))) as client:
        outcomes = list(send(client, requests(23, 4), target=alias, in_flight=in_flight))
        assert [(one.row, one.doc_id, one.reason) for one in outcomes] == [(r, f"d{r}", None) for r in range(23)]
        assert count(client, made) == 23


@pytest.mark.parametrize("fault", [429, 502, 503, 504, "drop", "lost answer", "garbage"])
def test_what_passes_is_sent_again_and_nothing_is_doubled(index, fault) -> None:
    url, made, alias = index
    with through(url, [fault, None, fault, fault]) as (client, proxy):
        outcomes = list(send(client, requests(), target=alias, retries=FAST))
        assert [one.reason for one in outcomes] == [None] * 10
        assert len(proxy.bulk_sizes) == 5
        assert count(client, made) == 10


def test_only_the_documents_that_failed_are_sent_again(index) -> None:
    url, made, alias = index
    with through(url, ["reject first", "reject first"]) as (client, proxy):
        outcomes = list(send(client, requests(5), target=alias, retries=FAST))
        assert [one.row for one in outcomes] == [0, 1, 2, 3, 4]
        assert all(one.reason is None for one in outcomes)
        assert len(proxy.bulk_sizes) == 3
        assert proxy.bulk_sizes[1] == proxy.bulk_sizes[2] == proxy.bulk_sizes[0] // 5
        assert count(client, made) == 5


def test_a_refused_document_has_its_reason_and_the_others_are_taken(index) -> None:
    url, made, alias = index
    with through(url) as (client, proxy):
        outcomes = list(send(client, requests(10, 5, bad=(3, 7)), target=alias, retries=FAST))
        refused = {one.row: (one.status, one.reason) for one in outcomes if one.reason}
        assert refused.keys() == {3, 7}
        assert refused[3][0] == 400
        assert "must be a positive normal float" in refused[3][1]
        assert len(proxy.bulk_sizes) == 2
        assert count(client, made) == 8


def test_a_request_that_is_too_large_is_halved_until_it_fits(index) -> None:
    url, made, alias = index
    with through(url, max_bytes=100) as (client, proxy):
        outcomes = list(send(client, requests(9, 9), target=alias, retries=FAST))
        assert [one.row for one in outcomes] == list(range(9))
        assert all(one.reason is None for one in outcomes)
        assert count(client, made) == 9
    with through(url, max_bytes=10) as (client, proxy):
        (outcome,) = send(client, requests(1), target=alias, retries=FAST)
        assert outcome.status == 413


def test_an_id_that_spoils_its_whole_request_is_found(index) -> None:
    url, made, alias = index
    long_id = "x" * 513
    spoiled = [*documents(6)]
    spoiled[4] = (4, long_id, b'{"index":{"_id":"%b"}}\n{}\n' % long_id.encode())
    with closing(connect(Connection(url))) as client:
        outcomes = list(send(client, bulk_requests(spoiled), target=alias, retries=FAST))
        assert [one.row for one in outcomes if one.reason] == [4]
        assert "too long" in str(outcomes[4].reason)
        assert count(client, made) == 5


def test_retries_used_up_stop_the_load_and_name_the_cause(index) -> None:
    url, _, alias = index
    with through(url, [503] * 20) as (client, proxy):
        with pytest.raises(ClusterError, match="5 documents were not taken in 6 attempts.*503 made_up: by the proxy"):
            list(send(client, requests(5), target=alias, retries=FAST))
        assert len(proxy.bulk_sizes) == 6


def test_a_status_that_concerns_everything_stops_at_once(index) -> None:
    url, _, alias = index
    with through(url, [403]) as (client, proxy):
        with pytest.raises(ResponseError, match="forbids this"):
            list(send(client, requests(5), target=alias, retries=FAST))
        assert len(proxy.bulk_sizes) == 1


@pytest.mark.parametrize("block", ["index.blocks.read_only_allow_delete", "index.blocks.write"])
def test_a_block_such_as_the_full_disk_stops_without_retries(index, block: str) -> None:
    url, made, alias = index
    with through(url) as (client, proxy):
        client.call("PUT", f"/{made.name}/_settings", {block: True})
        with pytest.raises(ClusterError, match="OpenSearch takes no documents: index .* blocked by"):
            list(send(client, requests(5), target=alias, retries=FAST))
        client.call("PUT", f"/{made.name}/_settings", {block: None})
        assert len(proxy.bulk_sizes) == 1


def test_a_deleted_index_stops_the_load_and_is_not_made_again(index) -> None:
    url, made, alias = index
    with closing(connect(Connection(url))) as client:
        indexes.delete_index(client, made)
        with pytest.raises(ClusterError, match="deleted or its alias removed"):
            list(send(client, requests(5), target=alias, retries=FAST))
        assert indexes.find_index(client, made.name) is None


def test_the_next_request_is_made_only_when_an_old_one_is_answered(index) -> None:
    url, _, alias = index
    made: list[int] = []

    def counted() -> Iterator[BulkRequest]:
        for request in requests(40, 2):
            made.append(len(made))
            yield request

    with closing(connect(Connection(url))) as client:
        outcomes = send(client, counted(), target=alias, in_flight=2)
        next(outcomes)
        assert len(made) <= 3
        assert len(list(outcomes)) == 39


def test_a_closed_generator_wakes_sleeping_senders(index) -> None:
    url, _, alias = index
    slow = Retries(attempts=3, base_s=60, cap_s=60)
    with through(url, [None, 503, 503, 503]) as (client, _):
        outcomes = send(client, requests(20, 5), target=alias, in_flight=2, retries=slow)
        next(outcomes)
        started = time.monotonic()
        outcomes.close()  # type: ignore[attr-defined]
        assert time.monotonic() - started < 1
