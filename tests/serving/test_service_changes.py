"""An index that is replaced, deleted or moved behind its alias while it is served."""

from __future__ import annotations

import traceback
from pathlib import Path
from typing import Any

import pytest
from support.deadlines import until
from support.gate import gate
from support.loads import into
from support.runs import make_run
from support.services import Served, served
from support.tables import TOKENS, write_table

from sparse_ingest import open_index
from sparse_ingest.cluster.client import Client
from sparse_ingest.errors import ClusterError
from sparse_ingest.pipeline import IndexSettings, Pipeline
from sparse_ingest.serving.targets import LiveIndex


def ids(service: Served, **keys: object) -> list[str]:
    answer = service.ask("GET", "/search", q="catch", **keys)
    return [hit["id"] for hit in answer.body.get("hits", ())]


def point(client: Client, alias: str, index: str) -> None:
    actions: list[dict[str, Any]] = [
        {"remove": {"index": f"{alias}-*", "alias": alias, "must_exist": False}},
        {"add": {"index": index, "alias": alias}},
    ]
    client.call("POST", "/_aliases", {"actions": actions})


def test_an_alias_is_followed_to_an_index_with_another_model_and_another_kind_of_field(
    tmp_path: Path, client: Client, index_name: str
) -> None:
    old, new = (str(write_table(tmp_path / name)) for name in ("old", "new"))
    (tmp_path / "new" / "idf.json").write_text('{"catch": 7.0}')
    first = make_run(tmp_path / "first", {"one": {"catch": 1.0}}, model=old, vocabulary=TOKENS)
    second = make_run(tmp_path / "second", {"two": {"catch": 1.0}}, model=new, vocabulary=TOKENS)
    into(client, f"{index_name}-1", first)
    into(client, f"{index_name}-2", second, pipeline=Pipeline(index=IndexSettings(kind="sparse_vector")))
    point(client, index_name, f"{index_name}-1")
    with served("--index", index_name, "--url", client.address) as service:
        assert ids(service) == ["one"]
        assert service.get("/search", q="catch")["query"] == {"catch": 2.5}
        point(client, index_name, f"{index_name}-2")
        until(lambda: service.get("/search", q="catch")["query"] == {"catch": 7.0}, service.log)
        assert ids(service) == ["two"]
        [target] = service.get("/targets")["targets"]
        assert (target["model"], target["engine"], target["engines"]) == (new, "seismic", ["seismic", "bm25"])
        client.call("POST", "/_aliases", {"actions": [{"add": {"index": f"{index_name}-1", "alias": index_name}}]})
        answer = until(lambda: (one := service.ask("GET", "/search", q="catch")).status != 200 and one, service.log)
        assert (answer.status, "is an alias of" in answer.message) == (502, True)


def test_a_deleted_index_is_502_until_it_is_loaded_again(tmp_path: Path, client: Client, index_name: str) -> None:
    model = str(write_table(tmp_path / "model"))
    run = make_run(tmp_path / "run", {"one": {"catch": 1.0}}, model=model, vocabulary=TOKENS)
    again = make_run(tmp_path / "again", {"two": {"catch": 1.0}}, model=model, vocabulary=TOKENS)
    into(client, index_name, run)
    with served("--index", index_name, "--url", client.address) as service:
        assert ids(service) == ["one"]
        client.call("PUT", f"/{index_name}/_settings", {"index.blocks.read": True})
        answer = service.ask("GET", "/search", q="catch")
        assert (answer.status, "index.blocks.read" in answer.message) == (502, True)
        client.call("POST", f"/{index_name}/_close")
        answer = service.ask("GET", "/search", q="catch")
        assert (answer.status, f"POST /{index_name}/_open" in answer.message) == (502, True)
        client.call("DELETE", f"/{index_name}")
        answer = service.ask("GET", "/search", q="catch")
        assert answer.status == 502
        assert index_name in answer.message
        assert "sparse-ingest load" in answer.message
        into(client, index_name, again)
        until(lambda: ids(service) == ["two"], service.log)


def test_every_request_is_refused_while_another_client_has_replaced_the_index(
    tmp_path: Path, client: Client, index_name: str
) -> None:
    run = make_run(tmp_path / "run", {"one": {"catch": 1.0}}, model=str(write_table(tmp_path)), vocabulary=TOKENS)
    into(client, index_name, run)
    with gate(client.address) as cluster, served("--index", index_name, "--url", cluster.url) as service:
        assert ids(service) == ["one"]
        client.call("DELETE", f"/{index_name}")
        client.call("PUT", f"/{index_name}", {"mappings": {"properties": {"sparse": {"type": "rank_features"}}}})
        client.call("PUT", f"/{index_name}/_doc/two", {"sparse": {"catch": 1.0}}, params={"refresh": "true"})
        until(lambda: service.ask("GET", "/search", q="catch").status == 502, service.log)
        # The index is looked up once a second; the requests between must not search it with the weights of a model.
        answers = [service.ask("GET", path, q="catch", id="two") for path in ("/explain", "/document")]
        answers += [service.ask("GET", "/search", q="catch", engine=engine) for engine in ("", "exact", "bm25")]
        assert {answer.status for answer in answers} == {502}
        assert all("does not name its model" in answer.message for answer in answers)
        cluster.is_down = True
        until(lambda: service.ask("GET", "/search", q="catch").status == 503, service.log)
        assert service.ask("GET", "/search", q="catch").status == 503  # between two lookups
        cluster.is_down = False
        client.call("DELETE", f"/{index_name}")
        into(client, index_name, run)
        until(lambda: ids(service) == ["one"], service.log)


def test_a_refused_index_does_not_keep_the_frames_of_requests(tmp_path: Path, client: Client, index_name: str) -> None:
    run = make_run(tmp_path / "run", {"one": {"catch": 1.0}}, model=str(write_table(tmp_path)), vocabulary=TOKENS)
    into(client, index_name, run)
    live = LiveIndex(open_index(index_name, url=client.address))
    client.call("DELETE", f"/{index_name}")
    client.call("PUT", f"/{index_name}", {"mappings": {"properties": {"sparse": {"type": "rank_features"}}}})
    frames = []
    for _ in range(3):
        with pytest.raises(ClusterError, match="does not name its model") as caught:
            live.current(look=True)
        for _ in range(3):
            with pytest.raises(ClusterError) as caught:
                live.current()
        frames.append(len(traceback.extract_tb(caught.value.__traceback__)))
    assert frames == [2, 2, 2]


def test_a_run_is_compared_with_an_index_of_another_model(tmp_path: Path, client: Client, index_name: str) -> None:
    here, there = (str(write_table(tmp_path / name)) for name in ("here", "there"))
    (tmp_path / "there" / "idf.json").write_text('{"catch": 7.0}')
    run = make_run(tmp_path / "run", {"one": {"catch": 1.0}}, model=here, vocabulary=TOKENS)
    into(client, index_name, make_run(tmp_path / "other", {"two": {"catch": 1.0}}, model=there, vocabulary=TOKENS))
    with served("--run", run.path, "--compare", index_name, "--url", client.address) as service:
        assert [one["name"] for one in service.get("/targets")["targets"]] == [str(run.path), index_name]
        assert ids(service) == ids(service, target=0) == ["one"]
        assert ids(service, target=1) == ids(service, target=index_name) == ["two"]
        assert service.get("/search", q="catch", target=1)["query"] == {"catch": 7.0}
