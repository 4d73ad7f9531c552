"""The version of a cluster in compatibility mode is read from its nodes; Elasticsearch is refused."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from support.runs import make_run
from support.secure_proxy import Request, secure_proxy
from support.serving import AnsweringHandler, serving

from sparse_ingest.cluster.client import Connection, connect
from sparse_ingest.errors import ClusterError
from sparse_ingest.loading.load import load
from sparse_ingest.verification.verify import verify

TAGLINE = "The OpenSearch Project: https://opensearch.org/"
HIDDEN = {"cluster_uuid": "C", "version": {"number": "7.10.2", "build_type": "tar"}, "tagline": TAGLINE}
FORBIDDEN = (403, {"error": {"type": "security_exception", "reason": "no permissions for [cluster:monitor/x]"}})
NODES, CAT = "/_nodes", "/_cat/nodes"


@contextmanager
def answering(answers: Mapping[str, tuple[int, Any]]) -> Iterator[str]:
    """A server with a response per path, and 403 for any other."""

    class Handler(AnsweringHandler):
        def do_GET(self) -> None:
            self.answer(*answers.get(self.path.partition("?")[0], FORBIDDEN))

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    with serving(server):
        yield f"http://127.0.0.1:{server.server_address[1]}"


def of_nodes(*versions: str) -> tuple[int, Any]:
    return 200, {"nodes": {f"n{place}": {"version": version} for place, version in enumerate(versions)}}


@pytest.mark.parametrize(
    ("more", "version"),
    [
        ({NODES: of_nodes("2.19.1")}, (2, 19, 1)),
        ({NODES: of_nodes("2.19.1", "2.11.0", "3.1.0")}, (2, 11, 0)),
        (
            {
                NODES: (401, {"Message": "Your request is not allowed."}),
                CAT: (200, [{"version": "3.2.0"}, {"version": "2.13.0"}]),
            },
            (2, 13, 0),
        ),
        ({NODES: (200, {}), CAT: (200, [{"version": "3.6.0"}])}, (3, 6, 0)),
    ],
)
def test_in_compatibility_mode_the_version_is_read_from_the_nodes(more: Any, version: object) -> None:
    with answering({"/": (200, HIDDEN)} | more) as url, closing(connect(Connection(url))) as client:
        assert client.version == version


def test_the_oldest_node_decides_if_the_version_is_too_old() -> None:
    with answering({"/": (200, HIDDEN), NODES: of_nodes("2.19.1", "2.9.0")}) as url:
        with pytest.raises(ClusterError, match="is OpenSearch 2.9.0; sparse-ingest needs 2.11 or newer"):
            connect(Connection(url))


def test_without_permission_for_nodes_the_message_names_the_setting() -> None:
    with answering({"/": (200, HIDDEN)}) as url, pytest.raises(ClusterError) as caught:
        connect(Connection(url, user="me", password="secret"))
    for part in ("compatibility.override_main_response_version", "user 'me'", "cluster:monitor/nodes/info", "false"):
        assert part in str(caught.value)


@pytest.mark.parametrize("flavor", [{"build_flavor": "default"}, {"build_flavor": "oss"}, {}])
def test_elasticsearch_7_10_2_is_refused(flavor: dict[str, str]) -> None:
    root = {"cluster_uuid": "C", "version": {"number": "7.10.2", **flavor}, "tagline": "You Know, for Search"}
    with answering({"/": (200, root), NODES: of_nodes("7.10.2")}) as url:
        with pytest.raises(ClusterError, match="7.10.2"):
            connect(Connection(url))


BUSY = (429, {"error": {"type": "circuit_breaking_exception", "reason": "Data too large"}})
STATE = "/_cluster/state/version"


@pytest.mark.parametrize("more", [{STATE: BUSY}, {STATE: (200, {"cluster_uuid": "C"}), NODES: BUSY}])
def test_a_busy_cluster_is_not_one_that_lacks_a_uuid_or_a_version(more: Any) -> None:
    """Without `GET /`, as in a distribution of Elasticsearch: journals would be those of a cluster without UUID."""
    with answering({"/": (405, {}), **more}) as url, pytest.raises(ClusterError, match="429 circuit_breaking"):
        connect(Connection(url))


def test_load_and_verify_work_in_compatibility_mode(opensearch_url: str, index_name: str, tmp_path: Path) -> None:
    with closing(connect(Connection(opensearch_url))) as client:
        version, cluster_uuid = client.version, client.cluster_uuid

    def hide(request: Request) -> tuple[int, object] | None:
        return (200, HIDDEN | {"cluster_uuid": cluster_uuid}) if request.path == "/" else None

    run = make_run(tmp_path / "run")
    with secure_proxy(opensearch_url, check=hide) as proxy:
        with closing(connect(Connection(proxy.url))) as client:
            assert client.version == version
        assert load(run.path, index=index_name, url=proxy.url).acknowledged == 5
        assert verify(run.path, index=index_name, url=proxy.url, sample=None).ok
