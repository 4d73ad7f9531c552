"""Wait for a cluster: until it answers again, its replicas exist, its writes are on disk.

Requests concern the index, so a role needs no cluster rights; messages omit details that need them.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from typing import TypeVar

from sparse_ingest.cluster.client import Client, ResponseError, UnreachableError
from sparse_ingest.cluster.indexes import Index
from sparse_ingest.cluster.sending import Retries
from sparse_ingest.cluster.waiting import Waiting
from sparse_ingest.errors import ClusterError, counted
from sparse_ingest.reporting import Reporter

_POLL_S = 2.0
T = TypeVar("T")


def patiently(ask: Callable[[], T], retries: Retries, waiting: Waiting) -> T:
    """Call `ask` until it succeeds, with the pauses of a bulk request. Return its result or raise its last error."""
    attempt, end = 0, time.monotonic() + waiting.patience_s
    while True:
        try:
            return ask()
        except (ResponseError, UnreachableError) as error:
            left_s = end - time.monotonic()
            lasting = isinstance(error, ResponseError) and not error.may_pass
            if lasting or attempt + 1 >= retries.attempts or left_s <= 0:
                raise
            why = str(error)
        more = f"attempt {attempt + 2} of {retries.attempts}, for at most {left_s:.0f} s more"
        waiting.say(why, f"Asking again ({more}): {why}")
        waiting.pause(min(retries.pause_s(attempt), left_s), why)
        attempt += 1


def wait_for_primaries(client: Client, index: Index, retries: Retries) -> None:
    """Wait until all primaries are started: without one, OpenSearch answers no request for documents.

    Raise `ClusterError` after the sum of the longest pauses of `retries`, or the client's patience.
    """
    patience_s = min(retries.attempts * retries.cap_s, client.waiting.patience_s)
    began = time.monotonic()
    while why := unstarted_primaries(client, index):
        if time.monotonic() - began > patience_s:
            raise ClusterError(f"{why} Fix that, then start the same command again.")
        client.waiting.say(why, f"{why} Waiting for it, up to {patience_s:g} s.")
        client.waiting.pause(_POLL_S, why)


def unstarted_primaries(client: Client, index: Index) -> str | None:
    """Return which primaries are not started and why. None if all are started, or if the role may not see them."""
    params = {"level": "shards", "filter_path": "indices.*.shards.*.routing"}
    answer = client.find(f"{index.path}/_stats/docs", params=params, absent=(403, 404))
    shards = answer and answer.get("indices", {}).get(index.name, {}).get("shards", {})
    if shards is None:
        return None
    started = {int(number) for number, copies in shards.items() if any(copy["routing"]["primary"] for copy in copies)}
    count = int(index.setting("number_of_shards") or 1)
    if not (missing := sorted(set(range(count)) - started)):
        return None
    return (
        f"Index {index.name!r} accepts no documents: the primary of {len(missing)} of its {count} shards is not "
        f"allocated. {_why_unassigned(client, index, missing[0], primary=True)}"
    )


def wait_for_copies(client: Client, index: Index, reporter: Reporter, *, patience_s: float = 300.0) -> str | None:
    """Wait until all copies of the shards exist. Return a message if the cluster has too few nodes for them.

    Raise `ClusterError` after `patience_s` seconds without a change, or the client's patience.
    """
    last: object = None
    patience_s = min(patience_s, client.waiting.patience_s)
    changed = time.monotonic()
    while True:
        shards = client.call("GET", f"{index.path}/_stats/docs", params={"filter_path": "_shards"})["_shards"]
        copies, there = int(shards["total"]), int(shards["successful"])
        if there >= copies:
            return None
        health = client.find("/_cluster/health", absent=(403, 404, 405, 408))
        nodes = int(health["number_of_data_nodes"]) if health else None  # None: the role may not ask
        primaries = int(index.setting("number_of_shards") or 1)
        if nodes is not None and there >= primaries * min(nodes, copies // primaries) and nodes * primaries < copies:
            return (
                f"Index {index.name!r} should have {copies // primaries} copies of each shard, but the cluster has "
                f"{counted(nodes, 'data node')}: {copies - there} of {copies} copies cannot be created. "
                "Add nodes, or set number_of_replicas in the index body."
            )
        state = (there, _recovered_bytes(client, index))
        if state != last:
            last, changed = state, time.monotonic()
            reporter.note(f"Index {index.name!r}: {there} of {copies} copies of its shards exist.")
        elif time.monotonic() - changed > patience_s:
            raise ClusterError(
                f"Index {index.name!r} has {there} of {copies} copies of its shards, without a change for "
                f"{patience_s:g} s. {_why_unassigned(client, index, 0, primary=False)} Fix that, or reduce "
                "number_of_replicas, then start the same command again."
            )
        missing = f"index {index.name!r} has {there} of {copies} copies of its shards, for up to {patience_s:g} s."
        client.waiting.pause(_POLL_S, missing)


class Durability:
    """Flushes confirmed writes to disk, which is needed only with `translog.durability: async`.

    A flush covers all confirmed writes, unless a primary was restarted or moved since this object was created.
    """

    def __init__(self, client: Client, index: Index) -> None:
        self._client, self._index = client, index
        self._began = self._primaries()

    def settle(self) -> None:
        """Flush confirmed writes to disk. Raise `ClusterError` if a primary was restarted or moved."""
        answer = self._client.call("POST", f"{self._index.path}/_flush", timeout_s=600)
        if answer["_shards"]["failed"] or self._primaries() != self._began:
            raise ClusterError(
                f"A primary of index {self._index.name!r} was restarted or moved while translog.durability was async: "
                "the last confirmed writes may be lost. Start the same command again: it sends the shards that are not "
                "in the journal."
            )

    def _primaries(self) -> list[tuple[int, int, str]]:
        """Return shard, time of the last start and node of each primary that has started."""
        answer = self._client.call("GET", f"{self._index.path}/_recovery")
        return sorted(
            (int(shard["id"]), int(shard["start_time_in_millis"]), str(shard["target"]["id"]))
            for shard in answer.get(self._index.name, {}).get("shards", [])
            if shard["primary"]
        )


def _recovered_bytes(client: Client, index: Index) -> int:
    """Return how many bytes the running recoveries of the index have copied."""
    answer = client.call("GET", f"{index.path}/_recovery", params={"active_only": "true"})
    shards = answer.get(index.name, {}).get("shards", [])
    return sum(int(shard["index"]["size"]["recovered_in_bytes"]) for shard in shards)


def _why_unassigned(client: Client, index: Index, shard: int, *, primary: bool) -> str:
    """Return why a shard copy is not allocated, with the most frequent reasons of nodes."""
    copy = {"index": index.name, "shard": shard, "primary": primary}
    try:
        answer = client.call("POST", "/_cluster/allocation/explain", copy)
    except ClusterError:
        return "GET /_cluster/allocation/explain reports the reason."
    reason = answer.get("allocate_explanation") or answer.get("unassigned_info", {}).get("reason", "no reason given")
    nodes = [node.get("deciders", ()) for node in answer.get("node_allocation_decisions", ())]
    reasons = Counter(str(decider["explanation"]) for deciders in nodes for decider in deciders)
    details = "; ".join(f"{why} ({count} of {len(nodes)} nodes)" for why, count in reasons.most_common(2))
    return f"The cluster reports: {': '.join(filter(None, (str(reason).rstrip('.'), details)))}."
