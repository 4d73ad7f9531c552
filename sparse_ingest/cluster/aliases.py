"""The alias that searches use: which index it stands for, and moving it to another in one request.

In: the name of an alias. Out: what it serves, with its filter and routing, which move along. Between the removal and
the addition there is no instant: both are one change of the cluster's state. A removal says `must_exist`: without
it, OpenSearch passes over an alias that somebody else has just moved.
Not covered: when to move it (publish.py).
"""

from __future__ import annotations

from typing import Any, NamedTuple
from urllib.parse import quote

from sparse_ingest.cluster.client import Client, ResponseError
from sparse_ingest.cluster.indexes import Index, is_one_name
from sparse_ingest.errors import ClusterError, UsageError


class Served(NamedTuple):
    """What an alias stands for: a concrete index, or None when there is no such alias; and its properties."""

    alias: str
    concrete: str | None
    properties: dict[str, Any]


def served_by(client: Client, alias: str) -> Served:
    """The index that an alias serves.

    Raises:
        UsageError: an index has this name, or the alias stands for several.
    """
    if not is_one_name(alias):
        raise UsageError(f"--alias {alias!r} is no name for an alias; one name is expected, without wildcards.")
    try:
        found = client.call("GET", f"/{quote(alias, safe='')}")
    except ResponseError as error:
        if error.status == 404:
            return Served(alias, None, {})
        raise
    if alias not in found and not all(alias in entry["aliases"] for entry in found.values()):
        raise UsageError(f"{alias!r} is a data stream, so it cannot be an alias too. Give --alias another name.")
    if alias in found:
        raise UsageError(
            f"{alias!r} is an index, so it cannot be an alias too. Give --alias another name, or load into the index "
            f"with --index {alias}."
        )
    if len(found) > 1:
        raise UsageError(
            f"Alias {alias!r} stands for {len(found)} indexes ({', '.join(sorted(found))}); one that --alias may move "
            "stands for one. Take it off the others, or give another name."
        )
    ((index, entry),) = found.items()
    return Served(alias, index, entry["aliases"][alias])


def move(client: Client, served: Served, target: Index) -> None:
    """Let the alias serve `target` and nothing else.

    Raises:
        ClusterError: somebody has moved or removed it since it was looked at.
    """
    actions: list[dict[str, Any]] = []
    if served.concrete is not None:
        actions.append({"remove": {"index": served.concrete, "alias": served.alias, "must_exist": True}})
    actions.append({"add": {"index": target.name, "alias": served.alias, **served.properties}})
    try:
        client.call("POST", "/_aliases", {"actions": actions})
    except ResponseError as error:
        if error.status != 404:
            raise
        raise ClusterError(
            f"Alias {served.alias!r} no longer stands for {served.concrete!r}: somebody moved it meanwhile. It was "
            f"left as it is; look at it with GET /_alias/{served.alias}, then start the same command again."
        ) from error
