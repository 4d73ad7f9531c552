"""What a cluster can do, and what a user may do in it: the findings of `doctor` about a server.

Every request reads. Rights are asked for with `perform_permission_check` of the security plugin (OpenSearch 3.2 or
newer), which answers instead of carrying out the request; without it they cannot be asked for. Names of users and the
reasons of the server, which may contain them, are in no finding.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

from sparse_ingest.cluster.client import Client, ResponseError, UnreachableError, connect
from sparse_ingest.cluster.connection import Connection
from sparse_ingest.cluster.indexes import cluster_settings
from sparse_ingest.cluster.versions import NEWEST_TRIED
from sparse_ingest.errors import SparseIngestError
from sparse_ingest.reporting import Check, checks_of, size_text

PATIENCE_S = 10.0
PLUGINS = {
    "opensearch-neural-search": "neural_sparse queries and sparse_vector fields; without it only `query "
    "--without-plugin` makes requests that work",
    "opensearch-knn": "sparse_vector fields (SEISMIC)",
}
_ASK = {"perform_permission_check": "true"}
_WATERMARKS = "cluster.routing.allocation.disk."
_EFFECTS = {
    "low": "a node gets no new shards",
    "high": "a node's shards are moved away",
    "flood_stage": "the indexes of a node are read-only",
}


def check_cluster(connection: Connection, index: str | None = None) -> list[Check]:
    """Return the findings about a cluster; with an index or a name for one, also which rights on it a load lacks."""
    try:
        client = connect(replace(connection, timeout_s=min(connection.timeout_s, PATIENCE_S)))
    except ResponseError as error:
        advice = {401: "Check user and password.", 403: "Grant the user cluster:monitor/main."}
        return [Check("server", "problem", f"it answers {error.status} {error.kind}", advice.get(error.status, ""))]
    except SparseIngestError as error:
        return [Check("server", "problem", str(error))]
    with client:
        number = ".".join(map(str, client.version))
        known = client.cluster_uuid != "unknown"
        found = f"OpenSearch {number} at {client.address}"
        server = Check("server", "ok", found) if known else Check(
            "server", "unknown", f"{client.address} does not report its version; {number} is assumed"
        )  # fmt: skip
        asked = {"plugins": _plugins, "health": _health, "disks": _disks, "rights": lambda one: _rights(one, index)}
        return [server, *(one for name, ask in asked.items() for one in checks_of(name, partial(ask, client), _why))]


def _why(error: Exception) -> str | None:
    if isinstance(error, ResponseError):
        return f"cannot be asked: the server answers {error.status} {error.kind}"
    return f"cannot be asked: no usable answer within {PATIENCE_S:g} s" if isinstance(error, UnreachableError) else None


def _plugins(client: Client) -> Iterator[Check]:
    nodes = client.call("GET", "/_nodes/plugins", params={"filter_path": "nodes.*.name,nodes.*.plugins.name"}).get(
        "nodes", {}
    )
    installed = [{plugin["name"] for plugin in node.get("plugins", ())} for node in nodes.values()]
    for name, purpose in PLUGINS.items():
        found = f"installed on {(having := sum(name in names for names in installed))} of {len(installed)} nodes"
        everywhere = having and having == len(installed)
        yield Check(name, "ok", found) if everywhere else Check(name, "missing", found, f"Needed for {purpose}.")


def _health(client: Client) -> Iterator[Check]:
    found = client.call("GET", "/_cluster/health")
    status = str(found["status"])
    words = f"{status}; data nodes: {found['number_of_data_nodes']}, unassigned shards: {found['unassigned_shards']}"
    advice = "Primaries are missing. Why: GET /_cluster/allocation/explain" if status == "red" else ""
    yield Check("health", "problem" if advice else "ok", words, advice)


def _disks(client: Client) -> Iterator[Check]:
    """Yield a finding for each node with data, compared with the watermarks."""
    params = {"filter_path": "nodes.*.name,nodes.*.fs.total"}
    nodes = client.call("GET", "/_nodes/stats/fs", params=params).get("nodes", {})
    settings = _settings(client)
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
            yield Check("disk", "ok", f"{found}; watermarks: {limits or 'cannot be asked'}")


def _settings(client: Client) -> dict[str, Any]:
    """Return the settings on disk space without their common prefix; {} if the user may not read them."""
    found = cluster_settings(client, absent=range(400, 500)).items()
    return {name.removeprefix(_WATERMARKS): value for name, value in found if name.startswith(_WATERMARKS)}


def _is_above(limit: str, total: int, free: int) -> bool:
    """Return whether a disk is fuller than a watermark: a share of used space, such as 85%, or bytes that stay free."""
    if limit.endswith("%"):
        return total - free > total * float(limit[:-1]) / 100
    units = {"tb": 1 << 40, "gb": 1 << 30, "mb": 1 << 20, "kb": 1 << 10, "b": 1}
    unit = next((unit for unit in units if limit.lower().endswith(unit)), None)
    return unit is not None and free < float(limit[: -len(unit)]) * units[unit]


def _rights(client: Client, index: str | None) -> Iterator[Check]:
    """Ask the security plugin which rights on an index a load lacks."""
    if client.find("/_plugins/_security/authinfo", absent=range(400, 500)) is None:
        yield Check("rights", "unknown", "cannot be asked: no answer from an API of the security plugin")
        return
    if _missing(client, "GET", "/_cluster/health") is None:
        oldest = f"needs OpenSearch 3.2 or newer (tested: {'.'.join(map(str, NEWEST_TRIED))})"
        yield Check("rights", "unknown", f"cannot be asked: perform_permission_check {oldest}")
        return
    if index is None:
        yield Check("rights", "unknown", "not asked", "Pass --index NAME to check the rights of a load on it.")
        return
    lacking: list[str] = []
    for method, path, body in _requests(index):
        missing = _missing(client, method, path, body)
        if missing is None:
            yield Check("rights", "unknown", f"cannot be asked for {method} {path}")
            return
        lacking += missing
    if lacking:
        found = f"a load into {index!r} lacks {', '.join(dict.fromkeys(lacking))}"
        yield Check("rights", "missing", found, "Grant them; the guide `Production checklist` has all that are used.")
    else:
        yield Check("rights", "ok", f"a load into {index!r} lacks none")


def _missing(client: Client, method: str, path: str, body: Any = None) -> list[str] | None:
    """Return the rights that a request would lack; None if the server does not answer that question."""
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
