"""`pipelines list` and `index list`, on a real server."""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterator
from contextlib import closing

import pytest
from support.forked import command
from support.loads import into
from support.runs import DOCUMENTS, make_run
from support.secure_proxy import Refusal, Request, secure_proxy

from sparse_ingest.cluster.client import Client, Connection, connect
from sparse_ingest.cluster.index_admin import create_index
from sparse_ingest.cluster.index_list import list_indexes
from sparse_ingest.pipeline import Pipeline, packaged_names, read_pipeline

FORBIDDEN = {"error": {"type": "security_exception", "reason": "no permissions for User [name=loader]"}, "status": 403}


def test_pipelines_are_listed_with_their_models_and_a_sentence() -> None:
    listed = json.loads(command("pipelines", "list", "--json").out)
    assert [one["name"] for one in listed] == packaged_names()
    for one in listed:
        model = read_pipeline(one["name"]).model
        assert (one["model"], one["query_model"]) == (model.document, model.query)
        assert len(one["description"]) > 30 and not one["description"].endswith(".")
        assert not one["description"].startswith(one["model"])
    assert "no commercial use" in next(one["description"] for one in listed if one["name"].startswith("efficient"))


@pytest.mark.parametrize("columns", [80, 120])
def test_a_table_that_does_not_fit_becomes_blocks(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    lines = command("pipelines", "list").out.splitlines()
    assert [line for line in lines if not line.startswith(" ")] == packaged_names()
    # A name of a model is not broken, so that it can be copied.
    assert [line for line in lines if len(line) > columns and not line.startswith("  model ")] == []
    monkeypatch.setenv("COLUMNS", "1000")
    table = command("pipelines", "list").out.splitlines()
    assert len(table) == len(packaged_names()) + 1
    assert len({line.index(" ".join(line.split()[1:2])) for line in table}) == 1


@pytest.fixture(scope="module")
def client(opensearch_url: str) -> Iterator[Client]:
    with closing(connect(Connection(opensearch_url))) as client:
        yield client


@pytest.fixture(scope="module")
def two(client: Client, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """An index behind an alias, an empty one, and one of another client, whose names begin with the returned name."""
    name = f"sparse-ingest-test-{secrets.token_hex(6)}"
    into(client, f"{name}-loaded", make_run(tmp_path_factory.mktemp("runs") / "run"))
    client.call("PUT", f"/{name}-loaded/_alias/{name}-a")
    create_index(f"{name}-empty", pipeline=Pipeline(), connection=Connection(client.address))
    client.call("PUT", f"/{name}-other", {"mappings": {"_meta": {"theirs": 1}}})
    yield name
    for kind in ("loaded", "empty", "other"):
        client.call("DELETE", f"/{name}-{kind}")


def test_indexes_that_sparse_ingest_created_are_listed(
    two: str, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    listed = json.loads(command("index", "list", f"{two}*", "--url", client.address, "--json").out)
    empty, loaded = listed
    assert empty == {**empty, "index": f"{two}-empty", "documents": 0, "model": None, "load": None, "aliases": []}
    assert loaded == {
        **loaded, "aliases": [f"{two}-a"], "documents": len(DOCUMENTS), "kind": "rank_features", "field": "sparse",
        "model": "made-by-hand", "load": "done",
    }  # fmt: skip
    assert loaded["bytes"] > 0 and loaded["created"].endswith("+00:00") and loaded["index"] == f"{two}-loaded"
    assert loaded["index"] in command("index", "list", "--url", client.address).out
    monkeypatch.setenv("COLUMNS", "200")
    shown = command("index", "list", f"{two}*", "--url", client.address).out.splitlines()
    assert shown[0].split()[:3] == ["index", "aliases", "documents"]
    assert [line.split()[0] for line in shown[1:]] == [empty["index"], loaded["index"]]


def test_what_a_user_may_not_read_is_unknown(two: str, opensearch_url: str) -> None:
    def check(request: Request) -> Refusal | None:
        return (403, FORBIDDEN) if "_stats" in request.path or "_search" in request.path else None

    with secure_proxy(opensearch_url, check=check) as proxy:
        assert {(one.documents, one.bytes) for one in list_indexes(f"{two}*", url=proxy.url)} == {(None, None)}
        assert command("index", "list", f"{two}*", "--url", proxy.url).out.count("unknown") == 4


def test_without_the_right_to_list_all_indexes_the_message_advises_a_pattern(two: str, opensearch_url: str) -> None:
    def check(request: Request) -> Refusal | None:
        return (403, FORBIDDEN) if request.path.startswith(("/*", "/%2A")) else None

    with secure_proxy(opensearch_url, check=check) as proxy:
        code, out, err = command("index", "list", "--url", proxy.url)
        assert (code, out) == (1, "")
        assert "sparse-ingest index list 'NAME*'" in err and "loader" not in err
        assert len(list_indexes(f"{two}*", url=proxy.url)) == 2


def test_a_blocked_index_is_not_reported_as_a_missing_right(opensearch_url: str) -> None:
    reason = "index [x] blocked by: [FORBIDDEN/9/index metadata (api)];"
    blocked = {"error": {"type": "cluster_block_exception", "reason": reason}, "status": 403}
    with secure_proxy(opensearch_url, check=lambda one: (403, blocked) if "%2A" in one.path else None) as proxy:
        code, _, err = command("index", "list", "x*", "--url", proxy.url)
    assert code == 1 and "Remove the block: PUT /x/_settings" in err


def test_a_pattern_without_indexes_lists_none(client: Client) -> None:
    code, out, err = command("index", "list", "sparse-ingest-test-never*", "--url", client.address)
    assert (code, out) == (0, "") and "Found no index" in err
    assert command("index", "list", "_all", "--url", client.address).code == 2
