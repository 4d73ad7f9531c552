"""`load --alias`: the alias moves atomically to a verified index, and back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support.loads import broken_titles, name_of, run_with_bad_titles
from support.reporters import Recorder
from support.runs import DOCUMENTS, make_run

from sparse_ingest.cli import loading
from sparse_ingest.cluster import indexes
from sparse_ingest.cluster.client import Client, Connection
from sparse_ingest.errors import ClusterError, RunError, UsageError
from sparse_ingest.loading.load import load
from sparse_ingest.loading.publish import PublishReport, publish, roll_back
from sparse_ingest.pipeline import IndexSettings, Pipeline
from sparse_ingest.runs.run import Run

pytestmark = pytest.mark.both_products(quick=False)

OTHER = {f"new-{number}": {"river": 1.0 + number} for number in range(3)}


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return make_run(tmp_path / "run")


def serve(client: Client, alias: str, run: Run, **options: Any) -> PublishReport:
    pipeline = options.pop("pipeline", Pipeline())
    return publish(run.path, alias=alias, pipeline=pipeline, connection=Connection(client.address), **options)


def serving(client: Client, alias: str) -> list[str]:
    answer = client.call("GET", "/_alias", params={"filter_path": "*.aliases"})
    return sorted(index for index, entry in answer.items() if alias in entry["aliases"])


def command(client: Client, *arguments: object) -> int:
    given = [*map(str, arguments), "--url", client.address]
    return int(loading.load.main(given, standalone_mode=False))


def test_the_alias_moves_from_run_to_run_and_the_old_index_stays_until_it_is_dropped(
    client: Client, index_name: str, run: Run, tmp_path: Path
) -> None:
    recorder = Recorder()
    first = serve(client, index_name, run, progress=recorder)
    assert (first.serves, first.previous, first.moved, first.verified) == (name_of(index_name, run), None, True, 5)
    assert any("2 copies of each shard, but the cluster has 1 data node" in note for note in recorder.notes)
    other = make_run(tmp_path / "other", model="another-model")
    second = serve(client, index_name, other)
    assert (second.serves, second.previous) == (name_of(index_name, other), name_of(index_name, run))
    assert serving(client, index_name) == [name_of(index_name, other)]
    again = serve(client, index_name, other, drop_old=True)
    assert (again.moved, again.load.loaded_shards, again.dropped) == (False, 0, name_of(index_name, run))
    assert indexes.find_index(client, name_of(index_name, run)) is None
    assert serving(client, index_name) == [name_of(index_name, other)]


def test_rolling_back_and_forward_moves_the_alias_atomically(
    client: Client, index_name: str, run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = make_run(tmp_path / "another", OTHER)
    for one in (run, other):
        assert command(client, one.path, "--alias", index_name) == 0
    shown = capsys.readouterr().out
    assert f"To go back: sparse-ingest load --alias {index_name} --to {name_of(index_name, run)}" in shown
    assert command(client, "--alias", index_name, "--to", name_of(index_name, run)) == 0
    assert serving(client, index_name) == [name_of(index_name, run)]
    assert command(client, "--alias", index_name, "--to", name_of(index_name, run), "--json") == 0
    shown = capsys.readouterr().out
    assert json.loads(shown[shown.index("{") :])["serves"] == name_of(index_name, run)
    assert command(client, other.path, "--alias", index_name, "--drop-old", "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["moved"], report["dropped"], report["acknowledged"]) == (True, name_of(index_name, run), 3)


def test_the_index_behind_the_alias_is_not_tuned_and_not_replaced(client: Client, index_name: str, run: Run) -> None:
    serve(client, index_name, run)
    for path in run.path.glob("load/*/*/journal.jsonl"):
        path.unlink()
    seen: set[str | None] = set()

    def look(documents: int) -> None:
        there = indexes.find_index(client, index_name)
        seen.add(there.setting("refresh_interval") if there else "gone")

    assert serve(client, index_name, run, progress=Recorder(look)).load.loaded_shards == 2
    assert seen == {None}
    with pytest.raises(UsageError, match="which --replace would delete"):
        serve(client, index_name, run, replace=True)


@pytest.mark.parametrize("shards", [1, 3])
def test_an_alias_that_searches_some_of_the_shards_is_noted(
    client: Client, index_name: str, run: Run, tmp_path: Path, shards: int
) -> None:
    client.call("PUT", f"/{index_name}-old", {"aliases": {index_name: {"search_routing": "a"}}})
    body, mapped = tmp_path / "body.json", {"properties": {"sparse": client.dialect.field_entry()}}
    body.write_text(json.dumps({"settings": {"number_of_shards": shards}, "mappings": mapped}))
    pipeline, publishing, loading_again = Pipeline(index=IndexSettings(body=str(body))), Recorder(), Recorder()
    serve(client, index_name, run, pipeline=pipeline, progress=publishing)
    load(run.path, index=index_name, connection=Connection(client.address), progress=loading_again)
    client.call("POST", f"/{index_name}/_refresh")
    found = client.call("GET", f"/{index_name}/_count")["count"]
    assert (found == len(DOCUMENTS)) == (shards == 1)
    for recorder in (publishing, loading_again):
        assert any("has search_routing 'a'" in note for note in recorder.notes) == (shards > 1)


@pytest.mark.opensearch_only
def test_default_pipelines_that_the_new_index_lacks_are_reported(
    client: Client, index_name: str, run: Run, tmp_path: Path
) -> None:
    old, pipeline = f"{index_name}-old", {"index.search.default_pipeline": f"{index_name}-search"}
    create = {"settings": pipeline, "aliases": {index_name: {}}}
    client.call("PUT", f"/_search/pipeline/{index_name}-search", {"request_processors": []})
    try:
        client.call("PUT", f"/{old}", create)
        recorder = Recorder()
        assert serve(client, index_name, run, progress=recorder).moved
        [note] = [note for note in recorder.notes if "default pipelines" in note]
        assert f"Index '{old}' has default pipelines that '{name_of(index_name, run)}' lacks" in note
        client.call("PUT", f"/{name_of(index_name, run)}/_settings", pipeline)
        assert note.endswith(f"PUT /{name_of(index_name, run)}/_settings {json.dumps(pipeline)}")
        other = make_run(tmp_path / "other", OTHER)
        body = tmp_path / "body.json"
        mapped = {"properties": {"sparse": client.dialect.field_entry()}}
        body.write_text(json.dumps({"settings": pipeline, "mappings": mapped}))
        recorder = Recorder()
        assert serve(
            client, index_name, other, pipeline=Pipeline(index=IndexSettings(body=str(body))), progress=recorder
        )
        assert not [note for note in recorder.notes if "default pipelines" in note]
    finally:
        client.call("DELETE", f"/{index_name}*")
        client.call("DELETE", f"/_search/pipeline/{index_name}-search")


def test_the_alias_stays_if_documents_are_refused_unless_allowed(
    client: Client, index_name: str, tmp_path: Path
) -> None:
    run = run_with_bad_titles(tmp_path / "run", ("words",))
    recorder = Recorder()
    report = serve(client, index_name, run, pipeline=broken_titles(tmp_path, client), progress=recorder)
    assert (report.serves, report.moved, report.load.refused) == (None, False, 1)
    assert f"load --alias {index_name} --to {name_of(index_name, run)}" in recorder.notes[-1]
    assert serving(client, index_name) == []
    roll_back(index_name, name_of(index_name, run), connection=Connection(client.address))
    assert serving(client, index_name) == [name_of(index_name, run)]


def test_the_alias_does_not_move_to_an_index_that_differs_from_the_run(
    client: Client, index_name: str, run: Run
) -> None:
    name = name_of(index_name, run)
    load(run.path, index=name, pipeline=Pipeline(), connection=Connection(client.address))
    client.call("PUT", f"/{name}/_doc/words", {"sparse": {"river": 9.0}}, params={"refresh": "true"})
    with pytest.raises(RunError, match="differs from .* so alias .* was not moved"):
        serve(client, index_name, run)
    assert serving(client, index_name) == []


def test_an_index_named_like_the_alias_is_refused_before_anything_is_created(
    client: Client, index_name: str, run: Run
) -> None:
    client.call("PUT", f"/{index_name}")
    with pytest.raises(UsageError, match="is an index, so it cannot be an alias"):
        serve(client, index_name, run)
    assert indexes.find_index(client, name_of(index_name, run)) is None


def test_an_alias_of_several_indexes_is_refused_before_anything_is_created(
    client: Client, index_name: str, run: Run
) -> None:
    for number in (1, 2):
        client.call("PUT", f"/{index_name}-{number}", {"aliases": {index_name: {}}})
    with pytest.raises(UsageError, match="points to 2 indexes"):
        serve(client, index_name, run)
    assert indexes.find_index(client, name_of(index_name, run)) is None


def test_an_index_of_another_client_with_the_name_of_the_run_is_refused(
    client: Client, index_name: str, run: Run
) -> None:
    properties = {"sparse": client.dialect.field_entry()}
    client.call("PUT", f"/{name_of(index_name, run)}", {"mappings": {"properties": properties}})
    with pytest.raises(ClusterError, match="exists and was created by another client"):
        serve(client, index_name, run)
    assert serving(client, index_name) == []


def test_an_index_behind_another_alias_is_not_dropped(
    client: Client, index_name: str, run: Run, tmp_path: Path
) -> None:
    serve(client, index_name, run)
    old = name_of(index_name, run)
    add = {"add": {"index": old, "alias": f"{index_name}-archive"}}
    client.call("POST", "/_aliases", {"actions": [add]})
    other, recorder = make_run(tmp_path / "other", OTHER), Recorder()
    report = serve(client, index_name, other, drop_old=True, progress=recorder)
    assert (report.previous, report.dropped) == (old, None)
    assert recorder.notes[-1] == f"Index {old!r} was not dropped: it serves {index_name}-archive."


def test_rolling_back_to_an_unfinished_or_missing_index_is_refused(
    client: Client, index_name: str, tmp_path: Path
) -> None:
    connection = Connection(client.address)
    run = make_run(tmp_path / "run", complete=False)
    load(run.path, index=f"{index_name}-half", pipeline=Pipeline(), connection=connection, partial=True)
    with pytest.raises(ClusterError, match="is not finished"):
        roll_back(index_name, f"{index_name}-half", connection=connection)
    with pytest.raises(ClusterError, match="There is no index"):
        roll_back(index_name, f"{index_name}-none", connection=connection)
    client.call("POST", f"/{index_name}-half/_close")
    with pytest.raises(ClusterError, match="is closed, so its searches would fail"):
        roll_back(index_name, f"{index_name}-half", allow_fewer=True, connection=connection)
    with pytest.raises(UsageError, match="--alias serves complete runs"):
        serve(client, index_name, run, partial=True)
    with pytest.raises(UsageError, match="which has nothing to change"):
        serve(client, index_name, run, since=run.path)
    assert serving(client, index_name) == []


def test_verification_applies_the_pruning_of_the_load(client: Client, index_name: str, run: Run) -> None:
    report = serve(client, index_name, run, top_k=3)
    assert (report.moved, report.verified) == (True, len(DOCUMENTS))
