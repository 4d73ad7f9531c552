"""Check a cluster for `doctor`: version, plugins, health, disk space, and the rights of the user.

No request changes anything. Rights are checked with `perform_permission_check` of the security plugin (OpenSearch 3.2
or newer), which answers instead of carrying out the request. Findings contain no user names, and none of the server's
error reasons, which may contain user names.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

from sparse_ingest.cluster.client import Client, ResponseError, UnreachableError, connect
from sparse_ingest.cluster.connection import Connection
from sparse_ingest.cluster.dialects import OpenSearchDialect, cluster_settings
from sparse_ingest.errors import SparseIngestError
from sparse_ingest.reporting import Check, checks_of, size_text

PATIENCE_S = 10.0
_ASK = {"perform_permission_check": "true"}
_WATERMARKS = "cluster.routing.allocation.disk."
_EFFECTS = {
    "low": "a node gets no new shards",
    "high": "a node's shards are moved away",
    "flood_stage": "the indexes of a node are read-only",
}


def check_cluster(connection: Connection, index: str | None = None) -> list[Check]:
    """Return the findings about a cluster; with an index name, also the rights that a load into it lacks."""
    try:
        client = connect(replace(connection, timeout_s=min(connection.timeout_s, PATIENCE_S)))
    except ResponseError as error:
        advice = {401: "Check user and password.", 403: "Grant the user cluster:monitor/main."}
        found = f"the server answers {error.status} {error.kind}"
        return [Check("server", "problem", found, advice.get(error.status, ""))]
    except SparseIngestError as error:
        return [Check("server", "problem", str(error))]
    with client:
        number = ".".join(map(str, client.version))
        known = client.cluster_uuid != "unknown"
        found = f"{client.dialect.name} {number} at {client.address}"
        server = Check("server", "ok", found) if known else Check(
            "server", "unknown", f"{client.address} does not report its version; {number} is assumed"
        )  # fmt: skip
        asked = {"plugins": _plugins, "health": _health, "disks": _disks, "rights": lambda one: _rights(one, index)}
        return [server, *(one for name, ask in asked.items() for one in checks_of(name, partial(ask, client), _why))]


def _why(error: Exception) -> str | None:
    if isinstance(error, ResponseError):
        return f"cannot be checked: the server answers {error.status} {error.kind}"
    if isinstance(error, UnreachableError):
        return f"cannot be checked: no usable answer within {PATIENCE_S:g} s"
    return None


def _plugins(client: Client) -> Iterator[Check]:
    nodes = client.call("GET", "/_nodes/plugins", params={"filter_path": "nodes.*.name,nodes.*.plugins.name"}).get(
        "nodes", {}
    )
    installed = [{plugin["name"] for plugin in node.get("plugins", ())} for node in nodes.values()]
    for name, purpose in client.dialect.plugins.items():
        found = f"installed on {(having := sum(name in names for names in installed))} of {len(installed)} nodes"
        everywhere = having and having == len(installed)
        yield Check(name, "ok", found) if everywhere else Check(name, "missing", found, f"Needed for {purpose}.")


def _health(client: Client) -> Iterator[Check]:
    found = client.call("GET", "/_cluster/health")
    status = str(found["status"])
    words = f"{status}; data nodes: {found['number_of_data_nodes']}, unassigned shards: {found['unassigned_shards']}"
    advice = "Primary shards are missing. GET /_cluster/allocation/explain has the reason." if status == "red" else ""
    yield Check("health", "problem" if advice else "ok", words, advice)


def _disks(client: Client) -> Iterator[Check]:
    """Yield a finding for each node with data, compared with the watermarks."""
    params = {"filter_path": "nodes.*.name,nodes.*.fs.total"}
    nodes = client.call("GET", "/_nodes/stats/fs", params=params).get("nodes", {})
    every = cluster_settings(client.find).items()
    settings = {name.removeprefix(_WATERMARKS): value for name, value in every if name.startswith(_WATERMARKS)}
    is_on = settings.get("threshold_enabled", "true") != "false"
    marks = {name: str(settings.get(f"watermark.{name}", "")) for name in _EFFECTS}
    for node in nodes.values():
        total, free = (int(node["fs"]["total"][name]) for name in ("total_in_bytes", "available_in_bytes"))
        found = f"node {node['name']}: {size_text(free)} of {size_text(total)} free"
        above = [mark for mark, limit in marks.items() if is_on and _is_above(limit, total, free)]
        if not is_on:
            yield Check("disk", "ok", f"{found}; the watermarks are off")
        elif above:
            advice = f"Free space: above this watermark {_EFFECTS[above[-1]]}."
            yield Check("disk", "problem", f"{found}, above the {above[-1]} watermark ({marks[above[-1]]})", advice)
        else:
            limits = ", ".join(f"{mark} {limit}" for mark, limit in marks.items() if limit)
            yield Check("disk", "ok", f"{found}; watermarks: {limits or 'not readable'}")


def _is_above(limit: str, total: int, free: int) -> bool:
    """Return whether a disk is fuller than a watermark: a share of used space, such as 85%, or bytes that stay free."""
    if limit.endswith("%"):
        return total - free > total * float(limit[:-1]) / 100
    units = {"tb": 1 << 40, "gb": 1 << 30, "mb": 1 << 20, "kb": 1 << 10, "b": 1}
    unit = next((unit for unit in units if limit.lower().endswith(unit)), None)
    return unit is not None and free < float(limit[: -len(unit)]) * units[unit]


def _rights(client: Client, index: str | None) -> Iterator[Check]:
    """Ask the security plugin which rights on an index a load lacks."""
    if client.dialect.product == "elasticsearch":
        advice = "See the Elasticsearch guide for the privileges."
        yield Check("rights", "unknown", "not checked on Elasticsearch", advice)
        return
    if client.find("/_plugins/_security/authinfo", absent=range(400, 500)) is None:
        yield Check("rights", "unknown", "cannot be checked: no answer from the security plugin of OpenSearch")
        return
    if _missing(client, "GET", "/_cluster/health") is None:
        oldest = f"needs OpenSearch 3.2 or newer (tested: {'.'.join(map(str, OpenSearchDialect.newest_tried))})"
        yield Check("rights", "unknown", f"cannot be checked: perform_permission_check {oldest}")
        return
    if index is None:
        yield Check("rights", "unknown", "not checked", "Pass --index NAME to check the rights for a load into it.")
        return
    lacking: list[str] = []
    for method, path, body in _requests(index):
        missing = _missing(client, method, path, body)
        if missing is None:
            yield Check("rights", "unknown", f"cannot be checked for {method} {path}")
            return
        lacking += missing
    if lacking:
        found = f"a load into {index!r} lacks {', '.join(dict.fromkeys(lacking))}"
        yield Check("rights", "missing", found, "Grant them. The guide `Production checklist` lists all rights.")
    else:
        yield Check("rights", "ok", f"a load into {index!r} lacks no rights")


def _missing(client: Client, method: str, path: str, body: Any = None) -> list[str] | None:
    """Return the rights that a request would lack; None if the server does not report them."""
    try:
        answer = client.call(method, path, body, params=_ASK)
    except ResponseError:
        return None
    return [str(one) for one in answer.get("missingPrivileges", ())] if "accessAllowed" in answer else None


def _requests(index: str) -> Iterator[tuple[str, str, Any]]:
    """Yield the requests of a load, verify and search on an index; docs/guides/production.md lists their rights."""
    lines = [{"index": {"_index": index, "_id": "1"}}, {"sparse": {}}]
    bulk = "".join(json.dumps(line) + "\n" for line in lines).encode()
    add = {"add": {"index": index, "alias": f"{index}--sparse-ingest-doctor"}}
    path = f"/{index}"
    yield from (
        ("GET", path, None),
        ("PUT", path, {}),
        ("PUT", f"{path}/_mapping", {"_meta": {}}),
        ("PUT", f"{path}/_settings", {"index": {"refresh_interval": "1s"}}),
        ("POST", "/_aliases", {"actions": [add]}),
        ("POST", f"{path}/_bulk", bulk),
        ("POST", f"{path}/_refresh", None),
        ("POST", f"{path}/_flush", None),
        ("GET", f"{path}/_recovery", None),
        ("GET", f"{path}/_stats/docs", None),
        ("POST", f"{path}/_search", {"size": 0}),
        ("POST", f"{path}/_msearch", b'{}\n{"size": 0}\n'),
    )
