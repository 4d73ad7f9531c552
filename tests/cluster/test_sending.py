"""Sending through a proxy that injects faults: every document has exactly one outcome."""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from http.server import ThreadingHTTPServer

import numpy as np
import pytest
from support.deadlines import HANGING_S
from support.faulty_proxy import FaultyProxy, faulty_proxy
from support.reporters import Recorder
from support.secure_proxy import Request, secure_proxy
from support.serving import AnsweringHandler, serving

from sparse_ingest.cluster import indexes, waiting
from sparse_ingest.cluster.bulk_bodies import BulkRequest, delete_requests
from sparse_ingest.cluster.client import Client, Connection, ResponseError, connect
from sparse_ingest.cluster.pacing import Pace
from sparse_ingest.cluster.sending import Retries, send
from sparse_ingest.errors import ClusterError, Interrupted
from sparse_ingest.records import Outcome, Refusal

FAST = Retries(attempts=6, base_s=0.01, cap_s=0.05, timeout_s=20)


@pytest.fixture
def index(opensearch_url: str, index_name: str) -> Iterator[tuple[str, indexes.Index, str]]:
    """The address, an index and its private alias."""
    with closing(connect(Connection(opensearch_url))) as client:
        body = {"settings": {"number_of_replicas": 0}, "mappings": {"properties": {"s": {"type": "rank_features"}}}}
        created = indexes.create_index(client, index_name, body)
        yield opensearch_url, created, indexes.add_private_alias(client, created, "test" * 16)


@contextmanager
def through(url: str, faults=(), *, max_bytes: int | None = None) -> Iterator[tuple[Client, FaultyProxy]]:
    with faulty_proxy(url, faults, max_bytes=max_bytes) as proxy, closing(connect(Connection(proxy.url))) as client:
        yield client, proxy


def request_of(documents: list[tuple[int, str, bytes]], shard: int = 0) -> BulkRequest:
    bodies = [body for _, _, body in documents]
    borders = np.cumsum([0, *map(len, bodies)])
    rows = np.array([row for row, _, _ in documents], dtype=np.uint64)
    return BulkRequest(b"".join(bodies), borders, rows, [doc_id for _, doc_id, _ in documents], shard)


def documents(count: int, bad: tuple[int, ...] = ()) -> list[tuple[int, str, bytes]]:
    weights = (0 if row in bad else 1.5 for row in range(count))
    return [
        (row, f"d{row}", b'{"index":{"_id":"d%d"}}\n{"s":{"t":%g}}\n' % (row, weight))
        for row, weight in enumerate(weights)
    ]


def requests(count: int = 10, size: int = 5, bad: tuple[int, ...] = ()) -> Iterator[BulkRequest]:
    """Yield requests of `size` documents, each from its own shard."""
    every = documents(count, bad)
    for shard, start in enumerate(range(0, count, size)):
        yield request_of(every[start : start + size], shard)


def refused(outcomes: list[Outcome]) -> list[Refusal]:
    return [one for outcome in outcomes for one in outcome.refused]


def count(client: Client, index: indexes.Index) -> int:
    indexes.refresh(client, index)
    return indexes.count_documents(client, index)


@pytest.mark.parametrize("in_flight", [1, 3])
def test_every_request_has_one_outcome_in_order(index, in_flight: int) -> None:
    url, created, alias = index
    with closing(connect(Connection(url))) as client:
        outcomes = list(send(client, requests(23, 4), target=alias, pace=Pace(max_in_flight=in_flight)))
        assert outcomes == [Outcome(shard, 4 if shard < 5 else 3, []) for shard in range(6)]
        assert count(client, created) == 23


def test_a_slow_request_delays_outcomes_but_no_other_request(index) -> None:
    url, created, alias = index
    with through(url, [503, 503, 503]) as (client, proxy):
        slow = Retries(attempts=9, base_s=0.2, cap_s=0.2)
        outcomes = list(send(client, requests(40, 2), target=alias, retries=slow))
        assert [one.shard for one in outcomes] == list(range(20))
        assert len(proxy.bulk_sizes) == 23
        assert count(client, created) == 40


@pytest.mark.parametrize(
    "fault",
    [429, 503, "drop", "lost answer", "garbage", *(pytest.param(one, marks=pytest.mark.slow) for one in (502, 504))],
)
def test_transient_failures_are_retried_without_duplicates(index, fault) -> None:
    url, created, alias = index
    with through(url, [fault, None, fault, fault]) as (client, proxy):
        outcomes = list(send(client, requests(), target=alias, retries=FAST))
        assert outcomes == [Outcome(0, 5, []), Outcome(1, 5, [])]
        assert len(proxy.bulk_sizes) == 5
        assert count(client, created) == 10


def test_only_the_documents_that_failed_are_sent_again(index) -> None:
    url, created, alias = index
    with through(url, ["reject first", "reject first"]) as (client, proxy):
        outcomes = list(send(client, requests(5), target=alias, retries=FAST))
        assert outcomes == [Outcome(0, 5, [])]
        assert len(proxy.bulk_sizes) == 3
        assert proxy.bulk_sizes[1] == proxy.bulk_sizes[2] == proxy.bulk_sizes[0] // 5
        assert count(client, created) == 5


def test_a_refused_document_has_a_reason_and_the_others_are_indexed(index) -> None:
    url, created, alias = index
    with through(url) as (client, proxy):
        outcomes = list(send(client, requests(10, 5, bad=(3, 7)), target=alias, retries=FAST))
        assert [(one.acknowledged, one.documents) for one in outcomes] == [(4, 5), (4, 5)]
        assert [(one.row, one.doc_id, one.status) for one in refused(outcomes)] == [(3, "d3", 400), (7, "d7", 400)]
        assert "must be a positive normal float" in refused(outcomes)[0].reason
        assert len(proxy.bulk_sizes) == 2
        assert count(client, created) == 8


def test_a_request_that_is_too_large_is_halved_until_it_fits(index) -> None:
    url, created, alias = index
    with through(url, max_bytes=100) as (client, proxy):
        pace = Pace()
        assert list(send(client, requests(9, 9), target=alias, retries=FAST, pace=pace)) == [Outcome(0, 9, [])]
        assert pace.max_bytes() <= 100
        assert count(client, created) == 9
    with through(url, max_bytes=10) as (client, proxy):
        (outcome,) = send(client, requests(1), target=alias, retries=FAST)
        assert [one.status for one in outcome.refused] == [413]


@pytest.mark.parametrize(
    "fault", ["reset mid-body", 502, *(pytest.param(one, marks=pytest.mark.slow) for one in ("drop", 504))]
)
def test_a_request_that_keeps_failing_is_halved_as_after_413(index, fault) -> None:
    url, created, alias = index
    with through(url, max_bytes=100) as (client, proxy):
        proxy.too_large = fault
        pace = Pace(max_in_flight=1)
        assert list(send(client, requests(18, 9), target=alias, retries=FAST, pace=pace)) == [
            Outcome(0, 9, []),
            Outcome(1, 9, []),
        ]
        assert pace.max_bytes() <= 100
        # Four attempts each with 9, 4 and 5 documents; later requests fit the proxy's limit.
        assert [size > 100 for size in proxy.bulk_sizes].count(True) <= 12
        assert count(client, created) == 18


def test_a_document_that_always_breaks_its_request_is_refused_at_full_pace(index) -> None:
    url, created, alias = index
    with through(url) as (client, proxy):
        proxy.poison = b'"_id":"d3"'
        pace, patient = Pace(), Retries(attempts=12, base_s=0.001, cap_s=0.002)
        (outcome,) = send(client, requests(8, 8), target=alias, retries=patient, pace=pace)
        assert [(one.doc_id, one.status) for one in outcome.refused] == [("d3", 0)]
        assert "sent alone 6 times" in outcome.refused[0].reason
        assert "closed the connection before it answered" in outcome.refused[0].reason
        assert pace.ceiling == Pace().ceiling
        assert count(client, created) == 7


@pytest.mark.parametrize("fault", ["drop", 502, "garbage"])
def test_without_any_response_no_document_is_refused(index, fault) -> None:
    url, _, alias = index
    with through(url, [fault] * 60) as (client, proxy):
        for size in (1, 5):
            patient = Retries(attempts=8, base_s=0.001, cap_s=0.002)
            with pytest.raises(ClusterError, match=f"The cluster did not accept {size} documents? in 8 attempts"):
                list(send(client, requests(size, size), target=alias, retries=patient))
        assert 60 > len(proxy.faults) > 20


def test_a_block_during_cluster_startup_is_retried(index) -> None:
    url, _, alias = index
    starting = {"error": {"type": "cluster_block_exception", "reason": "blocked by: [SERVICE_UNAVAILABLE/1/state]"}}
    answers = [(503, starting), (503, starting), None]
    check = lambda request: answers.pop(0) if "_bulk" in request.path else None  # noqa: E731
    with secure_proxy(url, check=check) as proxy, closing(connect(Connection(proxy.url))) as client:
        assert list(send(client, requests(5), target=alias, retries=FAST)) == [Outcome(0, 5, [])]


def test_documents_that_a_final_pipeline_drops_are_refused_with_its_name(index) -> None:
    url, created, alias = index
    recorder = Recorder()
    with closing(connect(Connection(url), reporter=recorder)) as client:
        dropping = {"processors": [{"drop": {"if": "ctx._id == 'd1' || ctx._id == 'd3'"}}]}
        client.call("PUT", f"/_ingest/pipeline/{created.name}", dropping)
        client.call("PUT", f"{created.path}/_settings", {"index.final_pipeline": created.name})
        try:
            (outcome,) = send(client, requests(5), target=alias, final_pipeline=created.name)
            again = list(send(client, requests(5), target=alias, final_pipeline=created.name))
        finally:
            client.call("PUT", f"{created.path}/_settings", {"index.final_pipeline": None})
            client.call("DELETE", f"/_ingest/pipeline/{created.name}")
        assert [one.doc_id for one in outcome.refused] == ["d1", "d3"]
        assert f"the final pipeline '{created.name}'" in outcome.refused[0].reason
        assert [one.doc_id for one in again[0].refused] == ["d1", "d3"]
        assert len([note for note in recorder.notes if created.name in note]) == 1
        assert count(client, created) == 3


def test_an_invalid_id_that_fails_the_complete_request_is_isolated(index) -> None:
    url, created, alias = index
    long_id = "x" * 513
    spoiled = documents(6)
    spoiled[4] = (4, long_id, b'{"index":{"_id":"%b"}}\n{}\n' % long_id.encode())
    with closing(connect(Connection(url))) as client:
        outcomes = list(send(client, [request_of(spoiled)], target=alias, retries=FAST, pace=Pace(max_in_flight=1)))
        assert outcomes[0].acknowledged == 5
        assert [one.row for one in outcomes[0].refused] == [4]
        assert "too long" in outcomes[0].refused[0].reason
        assert count(client, created) == 5


def test_exhausted_retries_are_an_error_with_the_cause(index) -> None:
    url, _, alias = index
    with through(url, [503] * 20) as (client, proxy):
        with pytest.raises(
            ClusterError, match="The cluster did not accept 5 documents in 6 attempts.*503 made_up: by the proxy"
        ):
            list(send(client, requests(5), target=alias, retries=FAST))
        assert len(proxy.bulk_sizes) == 6


def test_a_403_is_not_retried(index) -> None:
    url, _, alias = index
    with through(url, [403]) as (client, proxy):
        with pytest.raises(ResponseError, match="forbids this"):
            list(send(client, requests(5), target=alias, retries=FAST))
        assert len(proxy.bulk_sizes) == 1


@pytest.mark.parametrize("block", ["index.blocks.read_only_allow_delete", "index.blocks.write"])
def test_a_write_block_is_not_retried(index, block: str) -> None:
    url, created, alias = index
    with through(url) as (client, proxy):
        client.call("PUT", f"/{created.name}/_settings", {block: True})
        with pytest.raises(ClusterError, match="The cluster accepts no documents: index .* blocked by"):
            list(send(client, requests(5), target=alias, retries=FAST))
        client.call("PUT", f"/{created.name}/_settings", {block: None})
        assert len(proxy.bulk_sizes) == 1


def test_a_deleted_index_is_an_error_and_is_not_created_again(index) -> None:
    url, created, alias = index
    with closing(connect(Connection(url))) as client:
        client.call("DELETE", created.path)
        with pytest.raises(ClusterError, match="deleted or its alias removed"):
            list(send(client, requests(5), target=alias, retries=FAST))
        assert indexes.find_index(client, created.name) is None


def test_requests_are_built_only_as_earlier_ones_are_answered(index) -> None:
    url, _, alias = index
    built: list[int] = []

    def counted() -> Iterator[BulkRequest]:
        for request in requests(40, 2):
            built.append(len(built))
            yield request

    def hold(request: Request) -> None:
        if "/_bulk" in request.path and b'"_id":"d0"' not in request.body:
            assert released.wait(HANGING_S)

    released = threading.Event()
    with secure_proxy(url, check=hold) as proxy, closing(connect(Connection(proxy.url))) as client:
        outcomes = send(client, counted(), target=alias, pace=Pace(max_in_flight=2))
        next(outcomes)
        # One is answered, two may be in flight, and a fourth prepared.
        assert len(built) <= 4
        released.set()
        assert len(list(outcomes)) == 19


def test_a_closed_generator_wakes_sleeping_senders(index) -> None:
    url, _, alias = index
    slow = Retries(attempts=3, base_s=1e6, cap_s=1e6)
    before = set(threading.enumerate())
    with through(url, [None, 503, 503, 503]) as (client, proxy):

        def one_before_the_others() -> Iterator[BulkRequest]:
            for request in requests(20, 5):
                yield request
                while not proxy.bulk_sizes:  # otherwise the proxy may answer a later request first
                    time.sleep(0.01)

        outcomes = send(client, one_before_the_others(), target=alias, pace=Pace(max_in_flight=2), retries=slow)
        next(outcomes)
        outcomes.close()  # type: ignore[attr-defined]
        senders = [one for one in set(threading.enumerate()) - before if one.name == "bulk request"]
        for sender in senders:
            sender.join(HANGING_S)
            assert not sender.is_alive()


class Stopping(Recorder):
    """Requests a stop after some notes."""

    def __init__(self, notes: int = 1) -> None:
        super().__init__()
        self._most_notes = notes

    def stop_requested(self) -> bool:
        return len(self.notes) >= self._most_notes


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (503, "answered 503 made_up"),
        ("drop", "closed the connection"),
        ("garbage", "did not answer with the JSON of OpenSearch"),
        ("reject first", "429 rejected_execution_exception"),
    ],
)
def test_a_retry_is_reported_with_its_reason_and_a_stop_request_ends_the_pause(index, fault, message: str) -> None:
    url, _, alias = index
    recorder, slow = Stopping(), Retries(attempts=3, base_s=60, cap_s=60)
    with faulty_proxy(url, [fault]) as proxy, closing(connect(Connection(proxy.url), reporter=recorder)) as client:
        with pytest.raises(Interrupted, match=message):
            list(send(client, requests(5), target=alias, retries=slow))
    assert len(recorder.notes) == 1
    assert re.search(r"documents again \(attempt 2 of 3, for at most (600|5\d\d) s more\)", recorder.notes[0])
    assert message in recorder.notes[0]


@pytest.mark.parametrize(
    "fault", [503, "reject first", *(pytest.param(one, marks=pytest.mark.slow) for one in ("drop", "garbage"))]
)
def test_the_timeout_of_the_client_ends_the_retries(index, fault) -> None:
    url, _, alias = index
    with through(url, [fault] * 1000) as (client, _):
        client.waiting.patience_s = 0.3
        often = Retries(attempts=1000, base_s=0.1, cap_s=0.1)
        with pytest.raises(ClusterError, match=r"did not accept 1 document in \d+ attempts? and \d+ s\. .*[^.]\. When"):
            list(send(client, requests(1), target=alias, retries=often))


def test_a_long_pause_is_reported(index, monkeypatch: pytest.MonkeyPatch) -> None:
    url, _, alias = index
    monkeypatch.setattr(waiting, "SAY_S", 0.1)
    recorder = Stopping(notes=3)
    with faulty_proxy(url, [503]) as proxy, closing(connect(Connection(proxy.url), reporter=recorder)) as client:
        with pytest.raises(Interrupted):
            list(send(client, requests(5), target=alias, retries=Retries(base_s=1e6, cap_s=1e6)))
    assert [note.partition(" documents ")[0].partition(" in ")[0] for note in recorder.notes] == [
        "Sending 5", "Trying again", "Trying again",
    ]  # fmt: skip


def test_a_repeated_reason_is_reported_once(index, monkeypatch: pytest.MonkeyPatch) -> None:
    url, created, alias = index
    monkeypatch.setattr(waiting, "SAY_S", 3600)
    recorder = Recorder()
    with faulty_proxy(url, [503, 429, 503, 429] * 4) as proxy:
        with closing(connect(Connection(proxy.url), reporter=recorder)) as client:
            patient = Retries(attempts=20, base_s=0.001, cap_s=0.002)
            list(send(client, requests(40, 5), target=alias, retries=patient, pace=Pace(max_in_flight=4)))
            assert count(client, created) == 40
    assert len(recorder.notes) == 2


def test_progress_resets_the_count_of_attempts(index) -> None:
    url, created, alias = index
    with through(url, ["reject first", 503, 503, "reject first"]) as (client, proxy):
        three = Retries(attempts=3, base_s=0.01, cap_s=0.01)
        # The first response accepts 4 of 5 documents. The last one then fails in three attempts.
        with pytest.raises(ClusterError, match="did not accept 1 document in 3 attempts"):
            list(send(client, requests(5), target=alias, retries=three))
        assert len(proxy.bulk_sizes) == 3
        proxy.faults[:] = ["reject first", 503]
        assert list(send(client, requests(5), target=alias, retries=three)) == [Outcome(0, 5, [])]
        assert count(client, created) == 5


def test_overload_slows_the_pace(index) -> None:
    url, _, alias = index
    with through(url, [429, 429, 429]) as (client, _):
        pace = Pace()
        before = pace.in_flight, pace.max_bytes()
        list(send(client, requests(5), target=alias, retries=FAST, pace=pace))
        assert pace.in_flight == 1 < before[0]
        assert pace.max_bytes() == before[1] // 8


def test_a_rate_is_kept(index) -> None:
    url, created, alias = index
    with closing(connect(Connection(url))) as client:
        started = time.monotonic()
        outcomes = list(send(client, requests(40, 4), target=alias, pace=Pace(max_rate=50)))
        # The last request, documents 37 to 40, starts after 36 / 50 = 0.72 s.
        assert time.monotonic() - started >= 0.7
        assert sum(one.acknowledged for one in outcomes) == 40
        assert count(client, created) == 40


def test_deleting_a_missing_document_succeeds(index) -> None:
    url, created, alias = index
    with closing(connect(Connection(url))) as client:
        list(send(client, requests(3), target=alias))
        deletions = list(delete_requests(["d0", "never there", "d2"]))
        assert list(send(client, deletions, target=alias)) == [Outcome(0, 3, [])]
        assert count(client, created) == 1


def test_an_update_of_a_missing_document_is_refused(index) -> None:
    url, created, alias = index
    with closing(connect(Connection(url))) as client:
        list(send(client, requests(1), target=alias))
        bodies = [b'{"update":{"_id":"%b"}}\n{"doc":{"s":{"t":2}}}\n' % doc_id for doc_id in (b"d0", b"none")]
        update = request_of([(0, "d0", bodies[0]), (5, "none", bodies[1])])._replace(operation="update")
        (outcome,) = send(client, [update], target=alias)
        assert outcome.acknowledged == 1
        assert [(one.row, one.doc_id, one.status) for one in outcome.refused] == [(5, "none", 404)]
        assert count(client, created) == 1


SPOILED = [
    {"status": 0}, {"status": 102}, {"status": 199}, {"status": 302}, {"status": 600}, {"status": -1}, {"status": True},
    {"status": 201.0}, {"status": "201"}, {"status": None}, {"status": [201]}, {"error": {"type": "x", "reason": "y"}},
    {"error": "no"}, {"result": "deleted"}, {"result": "not_found"}, {"result": ["created"]},
]  # fmt: skip


@pytest.mark.parametrize("spoiled", SPOILED, ids=str)
def test_a_bulk_item_without_a_clear_success_is_an_error(spoiled: dict) -> None:
    class Spoiling(AnsweringHandler):
        def do_POST(self) -> None:
            lines = self.rfile.read(int(self.headers["content-length"])).split()[::2]
            items = [{"index": {"_id": json.loads(line)["index"]["_id"], "status": 201}} for line in lines]
            items[3]["index"] |= spoiled
            self.answer(200, {"items": items})

        def do_GET(self) -> None:
            self.answer(200, {"version": {"distribution": "opensearch", "number": "3.6.0"}})

    server = ThreadingHTTPServer(("127.0.0.1", 0), Spoiling)
    with serving(server), closing(connect(Connection(f"http://127.0.0.1:{server.server_address[1]}"))) as client:
        with pytest.raises(ClusterError, match="for document 'd3'. Check that no proxy changes requests"):
            list(send(client, requests(5), target="x", retries=FAST))
        with pytest.raises(ClusterError, match="Check that the final pipeline 'p' .* changes no ids"):
            list(send(client, requests(5), target="x", retries=FAST, final_pipeline="p"))


def test_retry_after_is_respected() -> None:
    stamps: list[float] = []

    class Busy(AnsweringHandler):
        def do_POST(self) -> None:
            stamps.append(time.monotonic())
            body = self.rfile.read(int(self.headers["content-length"]))
            items = [{"index": {"_id": json.loads(line)["index"]["_id"], "status": 201}} for line in body.split()[::2]]
            if len(stamps) == 1:
                self.answer(503, b"slow down", Retry_After="1")
            else:
                self.answer(200, {"items": items})

        def do_GET(self) -> None:
            self.answer(200, {"version": {"distribution": "opensearch", "number": "3.6.0"}})

    server = ThreadingHTTPServer(("127.0.0.1", 0), Busy)
    with serving(server), closing(connect(Connection(f"http://127.0.0.1:{server.server_address[1]}"))) as client:
        assert list(send(client, requests(5), target="x", retries=FAST)) == [Outcome(0, 5, [])]
    assert stamps[1] - stamps[0] >= 1
