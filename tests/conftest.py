"""Shared fixtures: an OpenSearch server, a client, and an index name per test.

`opensearch_url` is SPARSE_INGEST_TEST_URL if set, otherwise a Docker container, otherwise a local server. The tests
create and delete only indexes called `sparse-ingest-test-<random>...`.

A server takes about 12 s to start, so the tests of the local server use the same instance.
"""

from __future__ import annotations

import json
import os
import secrets
import signal
import urllib.request
from collections.abc import Iterator
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path

import hypothesis
import pytest
from support import elasticsearch
from support.servers import Running, data_folder, environment, random_free_port, server_home, start_program
from support.sharing import session_folder, shared

from sparse_ingest.cluster import merging
from sparse_ingest.cluster.client import Client, Connection, connect
from sparse_ingest.local_server import download, process
from sparse_ingest.storage import waiting

# Several processes share the cores: threads of torch that spin while they wait take the time of those that work. torch
# reads this when it is imported, also in the processes that tests start.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# A slow machine is no error. Fixtures may be shared by all examples of a test.
_CHECKS = [hypothesis.HealthCheck.too_slow, hypothesis.HealthCheck.function_scoped_fixture]
hypothesis.settings.register_profile("tests", deadline=None, suppress_health_check=_CHECKS)
hypothesis.settings.load_profile("tests")

# Under nohup SIGHUP is ignored, in the background SIGINT too, and the processes of the tests would inherit that.
for number, handler in ((signal.SIGHUP, signal.SIG_DFL), (signal.SIGINT, signal.default_int_handler)):
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, handler)

# The modules that take longest. They start first, so that no core waits at the end for one of them; the Makefile turns
# off the order of pytest-xdist, by numbers of tests.
LONGEST = {
    "api/test_python_api.py", "checkpoints/test_hub.py", "cluster/test_partial_answers.py", "crash/test_kill_encode.py",
    "crash/test_kill_load.py", "docs/test_pages.py", "encoding/test_encode_devices.py", "examples/test_examples.py",
    "executors/test_ray.py", "faults/test_faulty_loads.py", "loading/test_changes.py",
    "loading/test_guarded_aliases.py", "loading/test_load.py", "local_server/test_process.py", "planning/test_plan.py",
    "remote/test_remote_kills.py", "remote/test_remote_loads.py", "reports/test_report_page.py",
    "searching/test_search.py", "serving/test_page.py", "serving/test_running.py", "serving/test_service_changes.py",
    "test_wheel.py", "verification/test_verify.py",
}  # fmt: skip


@pytest.hookimpl(trylast=True)  # pytest itself reorders tests by their session fixtures
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Move the tests of `LONGEST` to the start."""
    folder = Path(__file__).parent
    items.sort(key=lambda item: os.path.relpath(item.path, folder) not in LONGEST)


@pytest.fixture(scope="session")
def local_server() -> Iterator[Running]:
    """A local OpenSearch for the session, started with `sparse-ingest server start` and one more JVM option."""
    with server_home() as home, data_folder() as data:
        port = random_free_port()
        try:
            # communicate() returns when both pipes are closed, so the server must not inherit them.
            shown, notes = start_program(home, port, data).communicate(timeout=150)
            assert shown, notes
            answer = json.loads(shown)
            yield Running(home, data, port, answer["pid"], answer["url"])
        finally:
            with environment(SPARSE_INGEST_HOME=str(home)):
                process.stop(port)


@pytest.fixture(scope="session")
def opensearch_url(request: pytest.FixtureRequest) -> Iterator[str]:
    """The address of an OpenSearch for the tests. One that was started here ends with the session."""
    if named := os.environ.get("SPARSE_INGEST_TEST_URL"):
        yield named.rstrip("/")
    elif _docker_answers():
        from testcontainers.opensearch import OpenSearchContainer

        image = f"opensearchproject/opensearch:{download.OPENSEARCH_VERSION}"
        with OpenSearchContainer(image, security_enabled=False) as container:
            yield f"http://{container.get_container_host_ip()}:{container.get_exposed_port(9200)}"
    else:
        yield request.getfixturevalue("local_server").url


@pytest.fixture(scope="session")
def elasticsearch_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of an Elasticsearch for the tests. One that was started here ends with the session."""
    folder = session_folder(tmp_path_factory.getbasetemp()) / "elasticsearch"
    if named := os.environ.get("SPARSE_INGEST_TEST_ES_URL"):
        yield named.rstrip("/")
    elif _docker_answers():
        with shared(folder, _elasticsearch_container) as url:
            yield url
    elif found := elasticsearch.find_jdk():
        with shared(folder, partial(elasticsearch.running, *found)) as url:
            yield url
    else:
        why = "Elasticsearch needs SPARSE_INGEST_TEST_ES_URL, Docker, or a full JDK, 17 or newer"
        pytest.fail(why) if os.environ.get("SPARSE_INGEST_TEST_ES_REQUIRED") else pytest.skip(why)


@contextmanager
def _elasticsearch_container() -> Iterator[str]:
    from testcontainers.elasticsearch import ElasticSearchContainer

    with ElasticSearchContainer(f"elasticsearch:{elasticsearch.RELEASES[0].version}") as container:
        yield f"http://{container.get_container_host_ip()}:{container.get_exposed_port(9200)}"


@pytest.fixture(scope="session")
def cluster_url(request: pytest.FixtureRequest) -> str:
    """The address of a cluster: OpenSearch, unless the test is marked `both_products` or `elasticsearch_only`."""
    return str(request.getfixturevalue(f"{getattr(request, 'param', 'opensearch')}_url"))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run tests on the products of their marks; without any, only on OpenSearch."""
    of = metafunc.definition.get_closest_marker
    both, only = of("both_products"), of("elasticsearch_only")
    if "cluster_url" not in metafunc.fixturenames or not (both or only):
        return
    slow = (pytest.mark.slow,) if both and not both.kwargs.get("quick", True) else ()
    products = [] if only else [pytest.param("opensearch")]
    products += [] if of("opensearch_only") else [pytest.param("elasticsearch", marks=slow)]
    metafunc.parametrize("cluster_url", products, indirect=True, scope="session")


def _docker_answers() -> bool:
    import docker

    try:
        client = docker.from_env(timeout=2)
    except docker.errors.DockerException:
        return False
    client.close()
    return True


@pytest.fixture(autouse=True)
def forget_abandoned_waits() -> Iterator[None]:
    """Forget abandoned waits: with any left, main() in a later test would exit the test process."""
    yield
    waiting.left_behind.clear()


@pytest.fixture(scope="session")
def client(cluster_url: str) -> Iterator[Client]:
    """A client of that server, shared by all tests."""
    with closing(connect(Connection(cluster_url))) as client:
        yield client


@pytest.fixture
def index_name(cluster_url: str) -> Iterator[str]:
    """A new index name. Every index whose name begins with it is deleted after the test."""
    name = f"sparse-ingest-test-{secrets.token_hex(6)}"
    yield name
    for row in json.loads(_request(f"{cluster_url}/_cat/indices/{name}*?format=json&h=index&expand_wildcards=all")):
        # Clusters often forbid deleting by wildcard.
        _request(f"{cluster_url}/{row['index']}", "DELETE")


@pytest.fixture
def hasty_merges(monkeypatch: pytest.MonkeyPatch) -> None:
    """Do not wait up to 30 s for retention leases before a merge. Only for tests that ignore the index size."""
    monkeypatch.setattr(merging, "_LEASES_S", 0)
    monkeypatch.setattr(merging, "_POLL_S", 0.5)


def _request(url: str, method: str = "GET") -> bytes:
    opener = urllib.request.build_opener()
    if url.startswith("http://127.0.0.1"):
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(urllib.request.Request(url, method=method), timeout=30) as answer:
        return answer.read()
