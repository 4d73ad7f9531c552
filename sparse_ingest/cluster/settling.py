"""Wait until a cluster has done what was asked: it answers again, its segments are merged, its copies are there.

In: an index. Out: nothing, or a sentence about what stays undone. Every question is one about the index, so a role
without rights on the cluster can ask it; what only the cluster knows makes the answers shorter when it may be asked.
A merge goes on in the cluster when the connection that asked for it is cut, so it is watched, not waited for.
Not covered: when to wait (load.py, publish.py).
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from typing import TypeVar
from urllib.parse import quote

from sparse_ingest.cluster.client import Client, ResponseError, UnreachableError
from sparse_ingest.cluster.indexes import Index, check_uuid, refresh
from sparse_ingest.cluster.sending import BLOCKED, RETRIED, Retries
from sparse_ingest.errors import ClusterError

_POLL_S = 2.0
_STEP_S = 30.0  # how long one request for a merge is waited for; gateways cut longer ones
_SAY_S = 30.0
T = TypeVar("T")


def patiently(ask: Callable[[], T], retries: Retries) -> T:
    """The answer to a question that may be asked again, with the pauses of a bulk request.

    Raises:
        ClusterError: the last attempt's.
    """
    attempt = 0
    while True:
        try:
            return ask()
        except UnreachableError:
            if attempt + 1 >= retries.attempts:
                raise
        except ResponseError as error:
            if error.status not in RETRIED or error.kind == BLOCKED or attempt + 1 >= retries.attempts:
                raise
        time.sleep(retries.pause_s(attempt))
        attempt += 1


def merge(client: Client, index: Index, progress: Callable[[str], None], *, step_s: float = _STEP_S) -> str | None:
    """Merge every shard into one segment; None when it is done, else a sentence.

    Raises:
        ClusterError: the index is gone, or the cluster refuses.
    """
    path = f"/{quote(index.name, safe='')}"
    surplus, asked_in_vain = _surplus_segments(client, index), 0
    while surplus:
        # Answered when it is done; cut off or timed out, it goes on, and asking again does not start it twice.
        with contextlib.suppress(UnreachableError):
            try:
                client.call("POST", f"{path}/_forcemerge", params={"max_num_segments": "1"}, timeout_s=step_s)
            except ResponseError as error:
                if error.status not in RETRIED:
                    raise
        check_uuid(client, index)
        said = time.monotonic()
        while _merging(client, index):
            if time.monotonic() - said > _SAY_S:
                said = time.monotonic()
                surplus_now = _surplus_segments(client, index)
                progress(f"Merging index {index.name!r}: {surplus_now} segments more than one a shard.")
            time.sleep(_POLL_S)
        before, surplus = surplus, _surplus_segments(client, index)
        # Shards are merged one after the other, and between two of them nothing seems to happen.
        asked_in_vain = 0 if surplus < before else asked_in_vain + 1
        if asked_in_vain == 3:
            return (
                f"Index {index.name!r} still has {surplus} segments more than one a shard: somebody writes into it, or "
                "its disk lacks room for a merge. Everything is loaded; the same command with --merge tries again."
            )
        if asked_in_vain:
            time.sleep(_POLL_S)
    return None


def wait_for_copies(
    client: Client, index: Index, progress: Callable[[str], None], *, patience_s: float = 300.0, poll_s: float = _POLL_S
) -> str | None:
    """Wait until all copies of the index are there; a sentence when the cluster has too few nodes for them.

    Args:
        patience_s: how long nothing at all may happen.

    Raises:
        ClusterError: copies are missing, and nothing happens any more.
    """
    last: object = None
    changed = time.monotonic()
    while True:
        copies, there = _copies(client, index)
        if there >= copies:
            return None
        nodes = _data_nodes(client)
        primaries = int(index.setting("number_of_shards") or 1)
        if nodes is not None and there >= primaries * min(nodes, copies // primaries) and nodes * primaries < copies:
            return (
                f"Index {index.name!r} asks for {copies // primaries} copies of each shard, but the cluster has "
                f"{nodes} data node{'s' if nodes > 1 else ''}: {copies - there} of {copies} copies cannot be made. "
                "Add nodes, or set number_of_replicas in the index body."
            )
        state = (there, _recovered_bytes(client, index))
        if state != last:
            last, changed = state, time.monotonic()
            progress(f"Index {index.name!r}: {there} of {copies} copies of its shards are there.")
        elif time.monotonic() - changed > patience_s:
            raise ClusterError(
                f"Index {index.name!r} has {there} of {copies} copies of its shards, and for {patience_s:g} s nothing "
                f"has changed. {_why_unassigned(client, index)} Mend that, or set number_of_replicas to what the "
                "cluster can hold, then start the same command again."
            )
        time.sleep(poll_s)


def _copies(client: Client, index: Index) -> tuple[int, int]:
    """How many copies of shards the index should have, and how many there are; primaries count."""
    answer = client.call("GET", f"/{quote(index.name, safe='')}/_stats/docs", params={"filter_path": "_shards"})
    return int(answer["_shards"]["total"]), int(answer["_shards"]["successful"])


def _data_nodes(client: Client) -> int | None:
    """How many nodes can hold a shard; None when the role may not ask."""
    try:
        return int(client.call("GET", "/_cluster/health")["number_of_data_nodes"])
    except ResponseError as error:
        if error.status in (403, 404, 405, 408):
            return None
        raise


def _recovered_bytes(client: Client, index: Index) -> int:
    """How much of the index's running recoveries is done."""
    answer = client.call("GET", f"/{quote(index.name, safe='')}/_recovery", params={"active_only": "true"})
    shards = answer.get(index.name, {}).get("shards", [])
    return sum(int(shard["index"]["size"]["recovered_in_bytes"]) for shard in shards)


def _why_unassigned(client: Client, index: Index) -> str:
    try:
        answer = client.call(
            "POST", "/_cluster/allocation/explain", {"index": index.name, "shard": 0, "primary": False}
        )
    except ClusterError:
        return "Ask the cluster why with GET /_cluster/allocation/explain."
    reason = answer.get("allocate_explanation") or answer.get("unassigned_info", {}).get("reason", "no reason given")
    return f"The cluster says: {str(reason).rstrip('.')}."


def _surplus_segments(client: Client, index: Index) -> int:
    """How many segments all copies have beyond one each, as a search would see them now."""
    refresh(client, index)
    answer = client.call("GET", f"/{quote(index.name, safe='')}/_segments")
    copies = [copy for copies in answer["indices"][index.name]["shards"].values() for copy in copies]
    return sum(max(0, int(copy["num_search_segments"]) - 1) for copy in copies)


def _merging(client: Client, index: Index) -> bool:
    answer = client.call("GET", f"/{quote(index.name, safe='')}/_stats/merge")
    # An index that was deleted meanwhile has no merges; whoever asks for its UUID next says so.
    return int(answer["_all"]["total"].get("merges", {}).get("current", 0)) > 0
