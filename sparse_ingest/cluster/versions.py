"""The version of a cluster: from `GET /`, or from its nodes if it is set to report Elasticsearch 7.10.2.

Managed services set `compatibility.override_main_response_version` for old clients, which hides name and version in
`GET /`; `_nodes` and `_cat/nodes` still have the version. During an upgrade the lowest version counts.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from sparse_ingest.errors import ClusterError

Version = tuple[int, int, int]

OLDEST_VERSION = (2, 11)  # the first with neural_sparse
NEWEST_TRIED = (3, 6, 0)  # the version of the tests
_HIDDEN = "7.10.2"  # what every OpenSearch in compatibility mode reports
_SETTING = "compatibility.override_main_response_version"


def version_of(root: Any, address: str, who: str, find: Callable[[str], Any]) -> Version:
    """Return the version of the OpenSearch that answered `GET /` with `root`, or raise `ClusterError`.

    `find` returns the answer to another GET, or None if it is refused; address and `who`, the user, are for messages.
    """
    version = root.get("version") if isinstance(root, dict) else None
    version = version if isinstance(version, dict) else {}
    found = version.get("number")
    numbers = [str(found)] if version.get("distribution") == "opensearch" else []
    # Every Elasticsearch of that version has a `build_flavor`, and no OpenSearch has.
    if not numbers and found == _HIDDEN and "build_flavor" not in version:
        numbers = _of_nodes(find)
        if not numbers:
            raise ClusterError(
                f"{address} reports version {found}, as OpenSearch does when its setting {_SETTING} is true, and does "
                f"not report the version of its nodes to {who}. Grant cluster:monitor/nodes/info, or set that to "
                f'false: PUT /_cluster/settings {{"persistent": {{"{_SETTING}": false}}}} (at AWS, in the advanced '
                "options of the domain)."
            )
    # The nodes of a real Elasticsearch 7.10.2 report that version too.
    if not numbers or (version.get("distribution") is None and min(map(_parsed, numbers)) >= _parsed(_HIDDEN)):
        what = f"not OpenSearch (it reports version {found})" if found else "not OpenSearch"
        raise ClusterError(f"{address} is {what}; sparse-ingest needs OpenSearch 2.11 or newer. Check --url.")
    lowest = min(numbers, key=_parsed)
    if _parsed(lowest)[:2] < OLDEST_VERSION:
        raise ClusterError(
            f"{address} is OpenSearch {lowest}; sparse-ingest needs 2.11 or newer, the first with neural_sparse. "
            "Upgrade the cluster."
        )
    return _parsed(lowest)


def _of_nodes(find: Callable[[str], Any]) -> list[str]:
    """Return the versions of the nodes; empty if the cluster does not report them."""
    nodes = (find("/_nodes?filter_path=nodes.*.version") or {}).get("nodes", {}).values()
    nodes = list(nodes) or find("/_cat/nodes?h=version&format=json") or ()
    return [str(node["version"]) for node in nodes if "version" in node]


def _parsed(number: object) -> Version:
    numbers = [int(part) for part in re.findall(r"\d+", str(number))[:3]]
    major, minor, patch = (*numbers, 0, 0, 0)[:3]
    return major, minor, patch
