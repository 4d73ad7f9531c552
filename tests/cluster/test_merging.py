"""Merges: one segment per shard without the second copy of its documents, and a message if that is not possible."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
from support.reporters import NoNotes, Recorder

from sparse_ingest.cluster import indexes, merging
from sparse_ingest.cluster.client import Client
from sparse_ingest.errors import Interrupted
from sparse_ingest.reporting import SILENT

pytestmark = pytest.mark.both_products(quick=False)


def vector(number: int) -> dict[str, float]:
    return {f"word{(31 * number + 7 * place) % 499}": 1 + number * place % 97 / 64 for place in range(80)}


def create_index(client: Client, name: str, *, shards: int = 1, **mappings: Any) -> indexes.Index:
    settings = {"number_of_shards": shards, "number_of_replicas": 0, "refresh_interval": -1}
    return indexes.create_index(client, name, {"settings": settings, "mappings": {"dynamic": False, **mappings}})


def add_segments(client: Client, index: indexes.Index, segments: int, documents: int = 1) -> None:
    """Add documents with a text and a vector, each batch followed by a refresh so that it is a segment."""
    for segment in range(segments):
        lines: list[dict[str, Any]] = []
        for number in range(documents):
            lines.append({"index": {"_id": f"{segment}-{number}", "routing": f"{segment}-{number}"}})
            lines.append({"text": f"document {number} of {segment}", "sparse": vector(number)})
        body = "".join(f"{json.dumps(line)}\n" for line in lines).encode()
        client.call("POST", f"/{index.name}/_bulk", body, params={"refresh": "true"})


def merge_now(client: Client, index: indexes.Index) -> None:
    client.call("POST", f"/{index.name}/_forcemerge", params={"max_num_segments": "1"})


def segment_names(client: Client, index: indexes.Index) -> list[list[str]]:
    """The names of the searchable segments, by copy of a shard."""
    shards = client.call("GET", f"/{index.name}/_segments")["indices"][index.name]["shards"]
    copies = [copy["segments"] for copies in shards.values() for copy in copies]
    return [[name for name, segment in segments.items() if segment["search"]] for segments in copies]


@pytest.mark.usefixtures("hasty_merges")
class TestSegments:
    def test_every_shard_becomes_one_segment(self, client: Client, index_name: str) -> None:
        index = create_index(client, index_name, shards=2)
        add_segments(client, index, 8)
        assert max(map(len, segment_names(client, index))) > 1
        assert merging.merge(client, index, SILENT).undone is None
        assert list(map(len, segment_names(client, index))) == [1, 1]

    def test_a_merge_whose_request_times_out_is_completed(
        self, client: Client, index_name: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        index = create_index(client, index_name)
        add_segments(client, index, 4)
        call, cut = Client.call, []

        def time_out(self: Client, method: str, path: str, *arguments, **keywords):
            if path.endswith("_forcemerge"):
                cut.append(path)
                keywords["timeout_s"] = 0.0001
            return call(self, method, path, *arguments, **keywords)

        monkeypatch.setattr(Client, "call", time_out)
        monkeypatch.setattr(merging, "_POLL_S", 0.2)
        assert merging.merge(client, index, SILENT).undone is None
        assert cut
        assert list(map(len, segment_names(client, index))) == [1]

    def test_a_merge_is_given_up_with_a_message_if_another_client_keeps_writing(
        self, client: Client, index_name: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Another client keeps writing: two new segments before each poll."""
        index = create_index(client, index_name)
        add_segments(client, index, 3)
        call, written = Client.call, []

        def write_before(self: Client, method: str, path: str, *arguments, **keywords):
            if path.endswith("_segments"):
                for _ in range(2):
                    written.append(path)
                    call(self, "PUT", f"/{index.name}/_doc/x{len(written)}", {}, params={"refresh": "true"})
            return call(self, method, path, *arguments, **keywords)

        monkeypatch.setattr(Client, "call", write_before)
        monkeypatch.setattr(merging, "_POLL_S", 0.01)
        done = merging.merge(client, index, SILENT)
        assert done.state is None
        assert "segments more than one per shard: another client writes into it" in str(done.undone)

    def test_an_index_of_one_segment_is_merged_if_routing_is_required(self, client: Client, index_name: str) -> None:
        index = create_index(client, index_name, _routing={"required": True})
        add_segments(client, index, 1)
        before = segment_names(client, index)
        assert merging.merge(client, index, SILENT).undone is None
        assert list(map(len, segment_names(client, index))) == [1]
        assert segment_names(client, index) != before

    def test_an_index_with_a_write_block_keeps_its_size_and_a_note_has_the_reason(
        self, client: Client, index_name: str
    ) -> None:
        index, recorder = create_index(client, index_name), Recorder()
        add_segments(client, index, 1)
        client.call("PUT", f"/{index_name}/_settings", {"index.blocks.write": True})
        assert merging.merge(client, index, recorder).state is None
        assert "refused to delete an id that does not exist (cluster_block_exception" in recorder.notes[-1]

    def test_a_lagging_retention_lease_is_reported(self, client: Client, index_name: str) -> None:
        index, recorder = create_index(client, index_name), Recorder()
        add_segments(client, index, 2)
        done = merging.merge(client, index, recorder)
        assert (done.undone, done.state) == (None, None)
        assert "waiting up to 0 s before the merge" in recorder.notes[0]
        assert "the retention lease 'peer_recovery/" in recorder.notes[1]


def test_an_empty_index_needs_no_merge(client: Client, index_name: str) -> None:
    assert merging.merge(client, create_index(client, index_name), NoNotes()).undone is None


def test_a_stop_request_ends_the_wait_for_leases(
    client: Client, index_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = create_index(client, index_name)
    add_segments(client, index, 2)
    monkeypatch.setattr(client.waiting, "reporter", Recorder(stop_at=0))
    with pytest.raises(Interrupted, match="is not merged yet"):
        merging.merge(client, index, SILENT)


@pytest.mark.slow  # waits up to 30 s for retention leases
def test_merging_removes_the_second_copy_of_each_document(client: Client, index_name: str) -> None:
    """For shards of several segments, of one unmerged segment, and of one merged before the leases allowed it."""
    fills: dict[str, Callable[..., object]] = {
        "several": partial(add_segments, client, segments=4, documents=50),
        "flushed": partial(add_segments, client, segments=1, documents=200),
        "merged": partial(add_segments, client, segments=4, documents=50),
    }
    there = {}
    for fill_name, fill in fills.items():
        there[fill_name] = create_index(client, f"{index_name}-{fill_name}", shards=2, _source={"excludes": ["sparse"]})
        fill(index=there[fill_name])
    merge_now(client, there["merged"])
    kept = create_index(client, f"{index_name}-kept", shards=2)
    add_segments(client, kept, 4, 50)
    done = {fill_name: merging.merge(client, index, SILENT) for fill_name, index in (there | {"kept": kept}).items()}
    for fill_name, index in there.items():
        assert list(map(len, segment_names(client, index))) == [1, 1]
        assert done[fill_name].from_bytes > 1.5 * done[fill_name].to_bytes
        assert done[fill_name].to_bytes == pytest.approx(done["several"].to_bytes, rel=0.1)
        assert done[fill_name].to_bytes < done["kept"].to_bytes
        assert indexes.count_documents(client, index) == 200

    # A merged index is merged again only after it changed.
    names, state = segment_names(client, there["several"]), done["several"].state
    assert merging.merge(client, there["several"], NoNotes(), state) == (done["several"].to_bytes,) * 2 + (None, state)
    assert segment_names(client, there["several"]) == names
    client.call("DELETE", f"/{index_name}-several/_doc/0-0", params={"routing": "0-0"})
    with pytest.raises(AssertionError, match="waiting up to 60 s"):
        merging.merge(client, there["several"], NoNotes(), state)
