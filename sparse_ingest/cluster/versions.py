"""The product and version of a cluster: from a header, `GET /`, or its nodes.

Managed OpenSearch services set `compatibility.override_main_response_version` for old clients, which hides name and
version in `GET /`; `_nodes` and `_cat/nodes` still have the version. During an upgrade the lowest version counts.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from sparse_ingest.cluster.dialects import Dialect, ElasticsearchDialect, OpenSearchDialect, Version
from sparse_ingest.errors import ClusterError

_HIDDEN = "7.10.2"  # what every OpenSearch in compatibility mode reports
_SETTING = "compatibility.override_main_response_version"


def dialect_of(root: Any, header: str, address: str, who: str, find: Callable[[str], Any]) -> Dialect:
    """Return the dialect of the cluster, or raise `ClusterError` for another product or an old version.

    Args:
        root: The answer to `GET /`; None if the server does not answer it.
        header: The X-elastic-product header of an answer, "" without it.
        address: The address, for messages.
        who: The user, for messages.
        find: Returns the answer to another GET, or None if it is refused.
    """
    version = root.get("version") if isinstance(root, dict) else None
    version = version if isinstance(version, dict) else {}
    number = str(version["number"]) if "number" in version else None
    nodes = _nodes(find) if root is None else []
    # Every Elasticsearch has a `build_flavor`, and no OpenSearch has. Some proxies drop the header.
    if header == "Elasticsearch" or any("build_flavor" in one for one in (version, *nodes)):
        of_nodes = min((str(node["version"]) for node in nodes), key=_parsed, default=None)
        return _elasticsearch(number or of_nodes, version, address, who)
    return OpenSearchDialect(_opensearch_version(version, number, address, who, find))


def _elasticsearch(number: str | None, version: dict[str, Any], address: str, who: str) -> Dialect:
    if version.get("build_flavor") == "serverless":
        raise ClusterError(
            f"{address} is Elasticsearch Serverless, which lacks requests that a load needs (_forcemerge, _nodes, "
            "number_of_replicas). Use a hosted or self-managed Elasticsearch, 8.16 or newer."
        )
    if number is None:
        raise ClusterError(
            f"{address} is Elasticsearch and does not report its version to {who}. Grant the cluster privilege monitor."
        )
    return ElasticsearchDialect(_new_enough(number, ElasticsearchDialect, address, "accepts tokens with a dot"))


def _opensearch_version(
    version: dict[str, Any], number: str | None, address: str, who: str, find: Callable[[str], Any]
) -> Version:
    numbers = [str(number)] if version.get("distribution") == "opensearch" else []
    if not numbers and number == _HIDDEN:
        numbers = [str(node["version"]) for node in _nodes(find)]
        if not numbers:
            raise ClusterError(
                f"{address} reports version {number}, as OpenSearch does when its setting {_SETTING} is true, and does "
                f"not report the version of its nodes to {who}. Grant cluster:monitor/nodes/info, or set that to "
                f'false: PUT /_cluster/settings {{"persistent": {{"{_SETTING}": false}}}} (at AWS, in the advanced '
                "options of the domain)."
            )
    if not numbers or (version.get("distribution") is None and min(map(_parsed, numbers)) >= _parsed(_HIDDEN)):
        what = f"reports version {number}" if number else "names no version"
        raise ClusterError(
            f"{address} is neither OpenSearch nor Elasticsearch (it {what}); sparse-ingest needs OpenSearch 2.11 or "
            "newer, or Elasticsearch 8.16 or newer. Check --url."
        )
    return _new_enough(min(numbers, key=_parsed), OpenSearchDialect, address, "has neural_sparse queries")


def _new_enough(number: str, product: type[Dialect], address: str, why: str) -> Version:
    if _parsed(number)[:2] < product.oldest:
        oldest = ".".join(map(str, product.oldest))
        raise ClusterError(
            f"{address} is {product.name} {number}; sparse-ingest needs {oldest} or newer, the first that {why}. "
            "Upgrade the cluster."
        )
    return _parsed(number)


def _nodes(find: Callable[[str], Any]) -> list[dict[str, Any]]:
    """Return the nodes that report their versions; empty if the cluster does not."""
    nodes = (find("/_nodes?filter_path=nodes.*.version,nodes.*.build_flavor") or {}).get("nodes", {}).values()
    nodes = list(nodes) or find("/_cat/nodes?h=version&format=json") or []
    return [node for node in nodes if "version" in node]


def _parsed(number: object) -> Version:
    numbers = [int(part) for part in re.findall(r"\d+", str(number))[:3]]
    major, minor, patch = (*numbers, 0, 0, 0)[:3]
    return major, minor, patch
