"""The settings guard: index settings are saved before a load changes them, and restored afterwards."""

from __future__ import annotations

from dataclasses import replace

import pytest
from support.reporters import NoNotes, Recorder

from sparse_ingest.cluster import indexes, settings_guard
from sparse_ingest.cluster.client import Client
from sparse_ingest.cluster.stamps import Stamp
from sparse_ingest.errors import ClusterError

STAMP = Stamp({"document": "m"}, "ab" * 32, "sparse", "r" * 64, "r" * 64, ("r" * 64,))
LOADING = settings_guard.LOADING


@pytest.fixture
def index(client: Client, index_name: str) -> indexes.Index:
    mappings = {"properties": {"sparse": {"type": "rank_features"}}, "_meta": {"sparse_ingest": STAMP.as_meta()}}
    return indexes.create_index(client, index_name, {"settings": {"number_of_replicas": 1}, "mappings": mappings})


def now(client: Client, index: indexes.Index) -> indexes.Index:
    return indexes.check_uuid(client, index)


def both(client: Client, index: indexes.Index) -> tuple[str | None, str | None]:
    there = now(client, index)
    return there.setting("refresh_interval"), there.setting("number_of_replicas")


def put(client: Client, index: indexes.Index, **settings: object) -> None:
    client.call("PUT", f"/{index.name}/_settings", {"index": settings})


def saved_settings(client: Client, index: indexes.Index) -> dict[str, dict[str, str | None]]:
    stamp = now(client, index).stamp
    assert stamp is not None
    return stamp.settings


NEVER = NoNotes()


def test_the_old_values_are_saved_and_restored(client: Client, index: indexes.Index) -> None:
    settings_guard.tune(client, index, LOADING, NEVER)
    assert both(client, index) == ("-1", "0")
    assert saved_settings(client, index) == {
        "refresh_interval": {"before": None, "loading": "-1"},
        "number_of_replicas": {"before": "1", "loading": "0"},
    }
    assert settings_guard.restore(client, index, NEVER) == ["number_of_replicas", "refresh_interval"]
    assert both(client, index) == (None, "1")
    assert saved_settings(client, index) == {}
    assert settings_guard.restore(client, index, NEVER) == []


def test_the_stamp_of_another_load_keeps_the_old_values(client: Client, index: indexes.Index) -> None:
    settings_guard.tune(client, index, LOADING, NEVER)
    indexes.stamp_index(client, index, replace(STAMP, run_id="s" * 64))
    assert saved_settings(client, index).keys() == LOADING.keys()


def test_the_old_values_are_saved_before_the_first_change(
    client: Client, index: indexes.Index, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[str, str]] = []
    call = Client.call
    monkeypatch.setattr(Client, "call", lambda self, *a, **k: (calls.append(a[:2]), call(self, *a, **k))[1])
    settings_guard.tune(client, index, LOADING, NEVER)
    puts = [path.rpartition("/")[2] for method, path in calls if method == "PUT"]
    assert puts == ["_mapping", "_settings"]
    calls.clear()
    settings_guard.restore(client, index, NEVER)
    assert [path.rpartition("/")[2] for method, path in calls if method == "PUT"] == ["_settings", "_mapping"]


def test_a_load_after_a_killed_one_restores_the_original_values(client: Client, index: indexes.Index) -> None:
    put(client, index, refresh_interval="7s")
    settings_guard.tune(client, index, LOADING, NEVER)
    settings_guard.tune(client, index, LOADING | settings_guard.ASYNC_TRANSLOG, NEVER)
    assert now(client, index).setting("translog.durability") == "async"
    settings_guard.restore(client, index, NEVER)
    assert both(client, index) == ("7s", "1")
    assert now(client, index).setting("translog.durability") != "async"


def test_a_change_after_a_killed_load_is_restored_by_the_next_load(client: Client, index: indexes.Index) -> None:
    put(client, index, refresh_interval="7s")
    settings_guard.tune(client, index, LOADING, NEVER)
    put(client, index, refresh_interval="9s")
    settings_guard.tune(client, index, LOADING, NEVER)
    assert both(client, index) == ("-1", "0")
    settings_guard.restore(client, index, NEVER)
    assert both(client, index) == ("9s", "1")


def test_a_finished_load_does_not_mark_another_run_as_done(client: Client, index: indexes.Index) -> None:
    settings_guard.restore(client, index, NEVER, finished="another run")
    assert now(client, index).stamp == replace(STAMP, load="loading")
    settings_guard.restore(client, index, NEVER, finished=STAMP.run_id)
    assert now(client, index).stamp == replace(STAMP, load="done")


def test_saved_but_unchanged_settings_need_no_restore(client: Client, index: indexes.Index) -> None:
    saved = {"refresh_interval": {"before": None, "loading": "-1"}}
    indexes.update_stamp(client, index, lambda stamp: replace(stamp, settings=saved))
    assert settings_guard.restore(client, index, NEVER) == []
    assert saved_settings(client, index) == {}


def test_a_change_by_another_client_during_the_load_is_kept(client: Client, index: indexes.Index) -> None:
    settings_guard.tune(client, index, LOADING, NEVER)
    put(client, index, refresh_interval="42s")
    recorder = Recorder()
    assert settings_guard.restore(client, index, recorder) == ["number_of_replicas"]
    assert both(client, index) == ("42s", "1")
    assert recorder.notes == [
        f"Index {index.name!r}: another client set refresh_interval to 42s during the load, which is kept."
    ]


def test_a_refused_setting_is_reported_and_the_others_change(client: Client, index: indexes.Index) -> None:
    recorder = Recorder()
    settings_guard.tune(client, index, {**LOADING, "no_such_setting": "1"}, recorder)
    assert both(client, index) == ("-1", "0")
    assert "no_such_setting" not in saved_settings(client, index)
    [note] = recorder.notes
    assert "keeps its no_such_setting during the load: the cluster refuses the change " in note
    settings_guard.restore(client, index, NEVER)


def test_auto_expanded_replicas_are_not_changed(client: Client, index: indexes.Index) -> None:
    put(client, index, auto_expand_replicas="0-1")
    settings_guard.tune(client, index, LOADING, NEVER)
    assert saved_settings(client, index).keys() == {"refresh_interval"}


def test_settings_that_cannot_be_restored_are_an_error_and_stay_saved(client: Client, index: indexes.Index) -> None:
    settings_guard.tune(client, index, LOADING, NEVER)
    put(client, index, **{"blocks.read_only": True})
    with pytest.raises(
        ClusterError, match=r"still has settings for loading: number_of_replicas, refresh_interval.*--restore"
    ):
        settings_guard.restore(client, index, NEVER)
    put(client, index, **{"blocks.read_only": False})
    assert settings_guard.restore(client, index, NEVER) == ["number_of_replicas", "refresh_interval"]


def test_only_the_run_that_created_an_unserved_index_may_tune_it(client: Client, index: indexes.Index) -> None:
    run_id = STAMP.run_id
    assert settings_guard.may_tune(index, run_id)
    assert not settings_guard.may_tune(index, "another run")
    indexes.add_private_alias(client, index, run_id)
    assert settings_guard.may_tune(now(client, index), run_id)
    client.call("POST", "/_aliases", {"actions": [{"add": {"index": index.name, "alias": f"{index.name}-searched"}}]})
    assert not settings_guard.may_tune(now(client, index), run_id)


def test_an_index_without_a_stamp_is_not_changed(client: Client, index_name: str) -> None:
    bare = indexes.create_index(client, index_name, {"settings": {"number_of_replicas": 1}})
    recorder = Recorder()
    settings_guard.tune(client, bare, LOADING, recorder)
    assert both(client, bare) == (None, "1")
    assert "no stamp" in recorder.notes[0]
