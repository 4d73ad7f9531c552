"""Safeguards of `load --alias`: never serve fewer documents or two indexes, never delete an index of another client."""

from __future__ import annotations

import json
import time
from pathlib import Path
from threading import Lock
from typing import Any

import pytest
from support.forked import Answer, command, start
from support.loads import MANY, StopBefore, into, name_of
from support.reporters import Recorder
from support.runs import DOCUMENTS, make_run
from support.secure_proxy import Request, secure_proxy

from sparse_ingest.cluster import aliases, indexes
from sparse_ingest.cluster.client import Client
from sparse_ingest.errors import ClusterError, Interrupted, RunError
from sparse_ingest.runs.run import Run

OTHER = {doc_id: {"river": 1.0} for doc_id in DOCUMENTS}


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return make_run(tmp_path / "run")


@pytest.fixture
def other(tmp_path: Path) -> Run:
    return make_run(tmp_path / "other", OTHER)


def load(client: Client, *arguments: object, url: str = "") -> Answer:
    return command("load", *arguments, "--url", url or client.address)


def serving(client: Client, alias: str) -> dict[str, Any]:
    """Return the indexes behind an alias, with its properties in each."""
    answer = client.call("GET", "/_alias", params={"filter_path": "*.aliases", "expand_wildcards": "all"})
    return {index: entry["aliases"][alias] for index, entry in answer.items() if alias in entry["aliases"]}


def add(client: Client, index: str, alias: str, **properties: Any) -> None:
    client.call("POST", "/_aliases", {"actions": [{"add": {"index": index, "alias": alias, **properties}}]})


# Fewer documents


def test_an_empty_run_is_loaded_only_if_allowed(client: Client, index_name: str, tmp_path: Path) -> None:
    empty = make_run(tmp_path / "empty", {})
    for target in ("--index", "--alias"):
        refused = load(client, empty.path, target, index_name)
        assert (refused.code, "has no documents to load" in refused.err) == (1, True)
        assert indexes.find_index(client, index_name) is None
    with pytest.raises(RunError, match="pass --allow-empty"):
        into(client, index_name, make_run(tmp_path / "begun", {}, complete=False), partial=True)
    assert load(client, empty.path, "--index", f"{index_name}-1", "--allow-empty").code == 0
    assert load(client, empty.path, "--alias", index_name, "--allow-empty").code == 0
    assert list(serving(client, index_name)) == [name_of(index_name, empty)]


def test_an_alias_does_not_move_to_an_empty_index_and_the_old_index_is_not_dropped(
    client: Client, index_name: str, run: Run, tmp_path: Path
) -> None:
    assert load(client, run.path, "--alias", index_name).code == 0
    empty = make_run(tmp_path / "empty", {})
    refused = load(client, empty.path, "--alias", index_name, "--drop-old", "--allow-empty")
    assert refused.code == 1
    assert f"'{name_of(index_name, empty)}' has 0 documents that its searches would find; " in refused.err
    assert f"'{name_of(index_name, run)}', which it serves, has 5. " in refused.err
    assert serving(client, index_name) == {name_of(index_name, run): {}}
    answer = load(client, empty.path, "--alias", index_name, "--drop-old", "--allow-empty", "--allow-fewer", "--json")
    assert json.loads(answer.out)["dropped"] == name_of(index_name, run)


@pytest.mark.parametrize(("documents", "code"), [(29, 1), (30, 0)])
def test_an_index_with_fewer_than_half_of_the_documents_is_refused_also_on_rollback(
    client: Client, index_name: str, tmp_path: Path, documents: int, code: int
) -> None:
    many = make_run(tmp_path / "many", MANY)
    few = make_run(tmp_path / "few", dict(list(MANY.items())[:documents]))
    assert load(client, many.path, "--alias", index_name).code == 0
    assert load(client, few.path, "--alias", index_name).code == code
    to = ["--alias", index_name, "--to", name_of(index_name, few)]
    assert load(client, *to).code == code
    assert load(client, *to, "--allow-fewer").code == 0
    assert list(serving(client, index_name)) == [name_of(index_name, few)]


def test_documents_are_counted_through_the_filter_of_the_alias(client: Client, index_name: str, run: Run) -> None:
    old = f"{index_name}-old"
    properties = {"tags": {"type": "nested"}, "lang": {"type": "keyword"}}
    client.call("PUT", f"/{old}", {"mappings": {"properties": properties}, "settings": {"refresh_interval": "-1"}})
    # Nested objects do not count as documents; an unrefreshed document does.
    for number in range(11):
        document = {"lang": "en" if number < 10 else "fr", "tags": [{"a": one} for one in range(20)]}
        client.call("PUT", f"/{old}/_doc/{number}", document)
    add(client, old, index_name, filter={"term": {"lang": "en"}})
    refused = load(client, run.path, "--alias", index_name)
    assert refused.code == 1
    assert "has 0 documents that its searches would find" in refused.err
    assert f"'{old}', which it serves, has 10" in refused.err
    add(client, old, index_name)
    assert "has 5 documents" in load(client, run.path, "--alias", index_name).err
    client.call("DELETE", f"/{old}/_doc/10")
    assert load(client, run.path, "--alias", index_name).code == 0


def test_an_old_index_that_cannot_be_counted_is_reported_with_advice(client: Client, index_name: str, run: Run) -> None:
    client.call("PUT", f"/{index_name}-old", {"aliases": {index_name: {}}})
    client.call("POST", f"/{index_name}-old/_close")
    refused = load(client, run.path, "--alias", index_name)
    assert refused.code == 1
    assert "index_closed_exception" in refused.err
    assert f"To move alias '{index_name}' without counting documents, add --allow-fewer." in refused.err
    assert load(client, run.path, "--alias", index_name, "--allow-fewer").code == 0


def test_a_new_alias_does_not_point_to_an_empty_index_unless_allowed(client: Client, index_name: str) -> None:
    client.call("PUT", f"/{index_name}-1")
    to = ["--alias", index_name, "--to", f"{index_name}-1"]
    assert "has 0 documents that its searches would find; it serves nothing yet" in load(client, *to).err
    assert load(client, *to, "--allow-fewer").code == 0
    assert load(client, "--alias", index_name, "--to", f"{index_name}-1", "--allow-empty").code == 2
    assert load(client, "--index", index_name, "--restore", "--allow-fewer").code == 2


# Several loads behind one alias


SLOW_LOADS = [
    pytest.param(*case, marks=pytest.mark.slow) for case in ((2, 0.0), (2, 0.1), (2, 0.3), (2, 1.0), (3, 0.2))
]


@pytest.mark.parametrize(("loads", "delay_s"), [(3, 0.0), *SLOW_LOADS])
def test_concurrent_first_loads_leave_one_index_behind_the_alias(
    client: Client, index_name: str, tmp_path: Path, loads: int, delay_s: float
) -> None:
    runs = [make_run(tmp_path / str(number), OTHER, model=f"m{number}") for number in range(loads)]
    logs = [tmp_path / f"log{number}" for number in range(loads)]
    processes = []
    for run, log in zip(runs, logs, strict=True):
        processes.append(start("load", run.path, "--alias", index_name, "--url", client.address, log=log))
        time.sleep(delay_s)
    for process in processes:
        process.join(120)
    codes, said = [process.exitcode for process in processes], [log.read_text() for log in logs]
    assert set(codes) <= {0, 1} and 0 in codes, said
    (served,) = serving(client, index_name)
    assert serving(client, index_name)[served] == {}
    winners = [run for run, code in zip(runs, codes, strict=True) if code == 0]
    assert served in {name_of(index_name, run) for run in winners}
    for code, text in zip(codes, said, strict=True):
        moved = "Another client moved alias" in text
        assert moved == (code == 1), text
    # Loads that do not overlap may all succeed; then each replaced the previous one.
    assert sum("is kept" in text and "previous index" in text for text in said) == len(winners) - 1
    # A load that lost succeeds when it is repeated.
    for run, code in zip(runs, codes, strict=True):
        if code == 1:
            assert load(client, run.path, "--alias", index_name).code == 0
            assert serving(client, index_name) == {name_of(index_name, run): {}}


def test_of_two_concurrent_moves_of_a_new_alias_one_fails(
    client: Client, index_name: str, run: Run, other: Run
) -> None:
    for one in (run, other):
        into(client, name_of(index_name, one), one)
    first, second = (indexes.need_index(client, name_of(index_name, one), "") for one in (run, other))
    alias = index_name
    seen = aliases.served_by(client, alias)
    # State left by a load killed between claiming the alias and completing the move.
    client.call("POST", f"{first.path}/_alias/{alias}", {"is_hidden": True, "is_write_index": True})
    with pytest.raises(ClusterError, match=f"it served nothing when .*, now '{first.name}'"):
        aliases.move_alias(client, alias, seen, second)
    aliases.move_alias(client, alias, seen, first)
    assert serving(client, alias) == {first.name: {}}
    with pytest.raises(ClusterError, match=f"it served nothing when .*, now '{first.name}'"):
        aliases.move_alias(client, alias, seen, second)
    assert serving(client, alias) == {first.name: {}}


@pytest.mark.parametrize("again", [pytest.param("same run", marks=pytest.mark.slow), "other run", "--to"])
def test_a_load_killed_after_claiming_the_alias_is_finished_by_the_next_load(
    client: Client, index_name: str, run: Run, other: Run, again: str
) -> None:

    def fail(request: Request) -> tuple[int, object] | None:
        """Answer the request that completes the alias like a proxy whose OpenSearch died."""
        completes = f'"alias":"{index_name}"'.encode() in request.body and b"is_hidden" not in request.body
        return (502, "Bad Gateway") if completes else None

    with secure_proxy(client.address, check=fail) as proxy:
        assert load(client, run.path, "--alias", index_name, url=proxy.url).code == 1
    assert serving(client, index_name) == {name_of(index_name, run): {"is_hidden": True, "is_write_index": True}}
    chosen = other if again == "other run" else run
    arguments = ["--to", name_of(index_name, run)] if again == "--to" else [chosen.path]
    answer = load(client, *arguments, "--alias", index_name)
    assert answer.code == 0, answer.err
    assert serving(client, index_name) == {name_of(index_name, chosen): {}}


def test_an_alias_that_another_client_moved_during_the_load_is_left_alone(
    client: Client, index_name: str, run: Run, other: Run
) -> None:
    assert load(client, other.path, "--alias", index_name).code == 0
    client.call("PUT", f"/{index_name}-by-hand")

    first = Lock()

    def move(request: Request) -> None:
        # Once: requests of other shards may come at the same time, when the alias is not there to be removed.
        if "_bulk" in request.path and first.acquire(blocking=False):
            remove = {"remove": {"index": name_of(index_name, other), "alias": index_name}}
            client.call("POST", "/_aliases", {"actions": [remove]})
            add(client, f"{index_name}-by-hand", index_name)

    with secure_proxy(client.address, check=lambda request: move(request)) as proxy:
        answer = load(client, run.path, "--alias", index_name, "--drop-old", url=proxy.url)
    assert answer.code == 1
    assert f"it served '{name_of(index_name, other)}' when" in answer.err
    assert f", now '{index_name}-by-hand'." in answer.err
    assert serving(client, index_name) == {f"{index_name}-by-hand": {}}
    assert indexes.find_index(client, name_of(index_name, other))


def test_a_first_load_removes_its_index_from_an_alias_that_another_client_created(
    client: Client, index_name: str, run: Run
) -> None:
    client.call("PUT", f"/{index_name}-by-hand")
    moved: list[str] = []

    def join(request: Request) -> None:
        if f'"alias":"{index_name}"'.encode() in request.body and b"is_hidden" not in request.body:
            moved.append(request.path)
        elif moved == ["/_aliases"] and request.path == f"/{index_name}":  # the check after the move
            moved.append(request.path)
            add(client, f"{index_name}-by-hand", index_name)

    with secure_proxy(client.address, check=lambda request: join(request)) as proxy:
        answer = load(client, run.path, "--alias", index_name, url=proxy.url)
    assert answer.code == 1
    assert f"it served nothing when this command started, now '{index_name}-by-hand'." in answer.err
    assert serving(client, index_name) == {f"{index_name}-by-hand": {}}


def test_an_index_added_to_the_alias_during_the_move_is_reported_and_to_removes_it(
    client: Client, index_name: str, run: Run, other: Run
) -> None:
    assert load(client, other.path, "--alias", index_name).code == 0
    client.call("PUT", f"/{index_name}-by-hand")

    def join(request: Request) -> None:
        if request.path == "/_aliases" and b'"must_exist"' in request.body:
            add(client, f"{index_name}-by-hand", index_name)

    with secure_proxy(client.address, check=lambda request: join(request)) as proxy:
        answer = load(client, run.path, "--alias", index_name, url=proxy.url)
    assert answer.code == 1
    assert f"--alias {index_name} --to INDEX" in answer.err
    again = load(client, run.path, "--alias", index_name)
    assert (again.code, f"load --alias {index_name} --to INDEX" in again.err) == (2, True)
    assert load(client, "--alias", index_name, "--to", f"{index_name}-none").code == 2
    assert load(client, "--alias", index_name, "--to", name_of(index_name, run)).code == 0
    assert serving(client, index_name) == {name_of(index_name, run): {}}


# What is deleted


def test_replace_refuses_an_index_that_an_alias_serves(client: Client, index_name: str, run: Run, other: Run) -> None:
    into(client, index_name, run)
    add(client, index_name, f"{index_name}-alias")
    add(client, index_name, f"{index_name}--sparse-ingest-prod")
    refused = load(client, other.path, "--index", index_name, "--replace")
    assert refused.code == 1
    assert f"Index '{index_name}' serves '{index_name}--sparse-ingest-prod', '{index_name}-alias'" in refused.err
    assert "load the run behind it (--alias NAME" in refused.err
    assert load(client, run.path, "--index", index_name, "--replace", "--from-scratch").code == 1
    assert list(serving(client, f"{index_name}-alias")) == [index_name]
    add(client, index_name, f"{index_name}--sparse-ingest-0123abcd")  # left by a killed load
    for alias in (f"{index_name}-alias", f"{index_name}--sparse-ingest-prod"):
        client.call("POST", "/_aliases", {"actions": [{"remove": {"index": index_name, "alias": alias}}]})
    assert load(client, other.path, "--index", index_name, "--replace").code == 0


def test_replace_checks_the_aliases_again_right_before_deleting(
    client: Client, index_name: str, run: Run, other: Run
) -> None:
    into(client, index_name, run)

    def serve(request: Request) -> None:
        if request.path.startswith("/_nodes/http"):  # checked once while the load is prepared
            add(client, index_name, f"{index_name}-alias")

    with secure_proxy(client.address, check=lambda request: serve(request)) as proxy:
        refused = load(client, other.path, "--index", index_name, "--replace", url=proxy.url)
    assert (refused.code, f"serves '{index_name}-alias'" in refused.err) == (1, True)
    assert list(serving(client, f"{index_name}-alias")) == [index_name]


def forge(client: Client, index: str, **changes: Any) -> None:
    there = indexes.need_index(client, index, "")
    meta = {**there.mappings["_meta"]["sparse_ingest"], **changes}
    client.call("PUT", f"/{index}/_mapping", {"_meta": {"sparse_ingest": meta}})


@pytest.mark.parametrize(
    "victim",
    ["foreign", "ours, of another alias", *(pytest.param(one, marks=pytest.mark.slow) for one in ("ours", "hidden"))],
)
def test_a_forged_replaced_record_deletes_nothing(
    client: Client, index_name: str, run: Run, other: Run, tmp_path: Path, victim: str
) -> None:
    name = f".{index_name}-victim" if victim == "hidden" else f"{index_name}-victim"
    if victim == "foreign":
        client.call("PUT", f"/{name}")
    elif victim == "ours":
        into(client, name, other)
    elif victim == "hidden":
        client.call("PUT", f"/{name}", {"settings": {"index.hidden": True}})
    else:
        more = make_run(tmp_path / "more", OTHER, model="more")
        for one in (other, more):
            assert load(client, one.path, "--alias", f"{index_name}-2").code == 0
        name = name_of(f"{index_name}-2", other)
    assert load(client, run.path, "--alias", index_name).code == 0
    uuid = indexes.need_index(client, name, "").uuid
    forge(client, name_of(index_name, run), replaced={"index": name, "uuid": uuid})
    answer = load(client, run.path, "--alias", index_name, "--drop-old")
    assert answer.code == 0
    assert indexes.need_index(client, name, "").uuid == uuid
    assert f"Index '{name}' was not dropped: " in answer.err
    client.call("DELETE", f"/{name}")


@pytest.mark.parametrize(
    "name",
    [
        "{0}*",
        "_all",
        "{0}-alias",
        *(pytest.param(one, marks=pytest.mark.slow) for one in ("*", "{0}-a,{0}-b", "", "..")),
    ],
)
def test_a_forged_wildcard_or_alias_deletes_nothing(client: Client, index_name: str, run: Run, name: str) -> None:
    for one in ("a", "b"):
        client.call("PUT", f"/{index_name}-{one}", {"aliases": {f"{index_name}-alias": {}} if one == "a" else {}})
    assert load(client, run.path, "--alias", index_name).code == 0
    uuid = indexes.need_index(client, f"{index_name}-a", "").uuid
    forge(client, name_of(index_name, run), replaced={"index": name.format(index_name), "uuid": uuid})
    answer = load(client, run.path, "--alias", index_name, "--drop-old", "--json")
    assert (answer.code, json.loads(answer.out)["dropped"]) == (0, None)
    for one in (f"{index_name}-a", f"{index_name}-b", name_of(index_name, run)):
        assert indexes.find_index(client, one)


def test_an_index_replaced_by_an_earlier_release_is_kept_with_advice(
    client: Client, index_name: str, run: Run, other: Run
) -> None:
    for one in (run, other):
        assert load(client, one.path, "--alias", index_name).code == 0
    old = name_of(index_name, run)
    forge(client, old, replaced_by=None)
    answer = load(client, other.path, "--alias", index_name, "--drop-old")
    assert answer.code == 0
    assert f"If it is not needed: sparse-ingest index drop --index {old}" in answer.err
    assert "--drop-old deletes it" not in answer.out
    assert command("index", "drop", "--index", old, "--yes", "--url", client.address).code == 0


# The private alias


def test_documents_go_to_one_index_if_another_client_reused_an_old_private_alias(
    client: Client, index_name: str, tmp_path: Path
) -> None:
    run = make_run(tmp_path / "run", MANY, shard_rows=20)
    with pytest.raises(Interrupted):
        into(client, index_name, run, progress=StopBefore(1))
    private = indexes.private_alias(index_name, run.manifest.run_id)
    client.call("PUT", f"/{index_name}-copy", {"aliases": {private: {"is_write_index": True}}})
    add(client, index_name, private, is_write_index=False)
    report = into(client, index_name, run)  # with a private alias of its own
    assert (report.acknowledged, report.refused) == (60, 0)
    assert client.call("GET", f"/{index_name}-copy/_count")["count"] == 0
    assert index_name not in serving(client, private)


def test_a_private_alias_that_gets_a_second_index_stops_the_load_without_dead_letters(
    client: Client, index_name: str, tmp_path: Path
) -> None:
    run = make_run(tmp_path / "run", MANY, shard_rows=20)
    client.call("PUT", f"/{index_name}-copy")
    private = indexes.private_alias(index_name, run.manifest.run_id)

    def join(documents: int) -> None:
        if not documents:
            add(client, f"{index_name}-copy", private)

    with pytest.raises(ClusterError, match="Another client changed the alias of this load: no write index is defined"):
        into(client, index_name, run, progress=Recorder(join))
    assert not list(run.path.glob("load/*/*/dead.jsonl"))
    report = into(client, index_name, run)
    assert (report.acknowledged, report.refused) == (60, 0)
