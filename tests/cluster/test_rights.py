"""Permissions that a role needs: every request of load, verify and search, with its OpenSearch action name."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from contextlib import closing
from pathlib import Path
from urllib.parse import unquote

import pytest
from support.reporters import Recorder
from support.runs import make_run
from support.secure_proxy import SecureProxy, cluster_action, secure_proxy

from sparse_ingest.cluster.client import Connection, ResponseError, connect
from sparse_ingest.loading.load import load
from sparse_ingest.loading.publish import publish, roll_back
from sparse_ingest.pipeline import IndexSettings, Pipeline
from sparse_ingest.searching.index_search import search_index
from sparse_ingest.verification.verify import verify

pytestmark = pytest.mark.usefixtures("hasty_merges")

DOCUMENTS = {f"d{number}": {"river": 0.5 + number / 8, "stone": 1.0} for number in range(7)}

# What docs/guides/production.md lists. "I" stands for the name of an index or an alias.
NEEDED = {
    "GET /I": "indices:admin/get",
    "PUT /I": "indices:admin/create",
    "DELETE /I": "indices:admin/delete",
    "PUT /I/_mapping": "indices:admin/mapping/put",
    "PUT /I/_settings": "indices:admin/settings/update",
    "POST /_aliases": "indices:admin/aliases",
    "POST /I/_alias/I": "indices:admin/aliases",
    "POST /I/_bulk": "indices:data/write/bulk",
    "POST /I/_refresh": "indices:admin/refresh",
    "POST /I/_flush": "indices:admin/flush",
    "POST /I/_forcemerge": "indices:admin/forcemerge",
    "GET /I/_recovery": "indices:monitor/recovery",
    "GET /I/_segments": "indices:monitor/segments",
    "GET /I/_stats/docs": "indices:monitor/stats",
    "GET /I/_stats/merge": "indices:monitor/stats",
    "GET /I/_count": "indices:data/read/search",
    "POST /I/_search": "indices:data/read/search",
    "POST /I/_msearch": "indices:data/read/msearch",
    "POST /_msearch": "indices:data/read/msearch",
    "POST /I/_search/point_in_time": "indices:data/read/point_in_time/create",
    "DELETE /_search/point_in_time": "indices:data/read/point_in_time/delete",
}


def anonymized(requests: Iterable[tuple[str, str]], index: str) -> Iterator[str]:
    """Yield distinct requests with "I" for the index or its alias, without those that need cluster permissions."""
    for method, path in dict.fromkeys(requests):
        if cluster_action(path) is None:
            yield f"{method} {re.sub(f'/{index}[^/]*', '/I', unquote(path))}"


@pytest.fixture
def proxy_without_cluster_rights(opensearch_url: str) -> Iterator[SecureProxy]:
    with secure_proxy(opensearch_url, cluster_rights=False) as proxy:
        yield proxy


def test_load_verify_and_search_need_only_the_listed_index_permissions(
    proxy_without_cluster_rights: SecureProxy, opensearch_url: str, index_name: str, tmp_path: Path
) -> None:
    proxy, run = proxy_without_cluster_rights, make_run(tmp_path / "run", DOCUMENTS)
    connection = Connection(proxy.url)
    report = load(run.path, index=index_name, pipeline=Pipeline(), connection=connection)
    assert (report.acknowledged, report.refused) == (7, 0)
    assert verify(run.path, index=index_name, connection=connection, sample=None).ok
    with closing(connect(connection)) as client:
        assert search_index(client, index_name, {"river": 1.0}, size=3)[0].doc_id == "d6"
    with closing(connect(Connection(opensearch_url))) as client:
        assert client.call("GET", f"/{index_name}/_count")["count"] == 7
    assert proxy.refused
    assert {path for _, path in proxy.refused} & {"/"}
    assert set(anonymized(proxy.asked, index_name)) <= NEEDED.keys()


def test_a_second_load_and_replace_need_no_cluster_permission(
    proxy_without_cluster_rights: SecureProxy, index_name: str, tmp_path: Path
) -> None:
    proxy, run = proxy_without_cluster_rights, make_run(tmp_path / "run", DOCUMENTS)
    for settings in ({}, {"retry_dead": True}, {"replace": True, "from_scratch": True, "merge": True}):
        load(run.path, index=index_name, pipeline=Pipeline(), connection=Connection(proxy.url), **settings)
    assert set(anonymized(proxy.asked, index_name)) <= NEEDED.keys()


def test_publish_and_rollback_need_no_cluster_permission(
    proxy_without_cluster_rights: SecureProxy, index_name: str, tmp_path: Path
) -> None:
    proxy = proxy_without_cluster_rights
    runs = [make_run(tmp_path / str(count), dict(list(DOCUMENTS.items())[:count])) for count in (4, 7)]
    body = tmp_path / "body.json"
    # Without the permission to count nodes, load cannot know that this cluster has no node for a replica.
    settings, properties = {"number_of_replicas": 0}, {"sparse": {"type": "rank_features"}}
    body.write_text(json.dumps({"settings": settings, "mappings": {"dynamic": False, "properties": properties}}))
    pipeline, connection = Pipeline(index=IndexSettings(body=str(body))), Connection(proxy.url)
    first, second = (publish(run.path, alias=index_name, pipeline=pipeline, connection=connection) for run in runs)
    assert (first.serves, second.serves, second.previous) == (first.load.index, second.load.index, first.load.index)
    roll_back(index_name, first.load.index, connection=Connection(proxy.url))
    assert set(anonymized(proxy.asked, index_name)) <= NEEDED.keys()


def test_loading_merging_and_verifying_sparse_vector_needs_no_cluster_permission(
    proxy_without_cluster_rights: SecureProxy, index_name: str, tmp_path: Path
) -> None:
    proxy, run = proxy_without_cluster_rights, make_run(tmp_path / "run", DOCUMENTS)
    pipeline, connection = Pipeline(index=IndexSettings(kind="sparse_vector")), Connection(proxy.url)
    recorder = Recorder()
    load(run.path, index=index_name, pipeline=pipeline, connection=connection, merge=True, progress=recorder)
    assert verify(run.path, index=index_name, connection=connection, sample=None).ok
    assert any("neural_sparse_warmup_action" in note for note in recorder.notes), recorder.notes
    assert set(anonymized(proxy.asked, index_name)) <= NEEDED.keys()


def test_a_missing_permission_to_read_the_version_is_logged(
    proxy_without_cluster_rights: SecureProxy, caplog: pytest.LogCaptureFixture
) -> None:
    with closing(connect(Connection(proxy_without_cluster_rights.url))) as client:
        assert (client.version, client.cluster_uuid) == ((3, 6, 0), "unknown")
    assert "does not report its version to a client without a user name (cluster:monitor/main)" in caplog.text


def test_any_other_missing_permission_is_an_error_with_its_name(opensearch_url: str, tmp_path: Path) -> None:
    reason = "no permissions for [indices:admin/create] and User [name=loader]"
    forbidden = {"error": {"type": "security_exception", "reason": reason}}
    run = make_run(tmp_path / "run", DOCUMENTS)
    with secure_proxy(opensearch_url, check=lambda one: (403, forbidden) if one.method == "PUT" else None) as proxy:
        with pytest.raises(ResponseError) as caught:
            load(run.path, index="sparse-ingest-test-never", pipeline=Pipeline(), connection=Connection(proxy.url))
    assert "(403): grant the right" in str(caught.value)
    assert json.dumps(reason)[1:-1] in str(caught.value)
