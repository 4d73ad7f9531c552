"""The settings guard: the old values are kept before anything changes, and come back whoever asks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace

import pytest
from support.reporters import Recorder

from sparse_ingest.cluster import indexes, settings_guard
from sparse_ingest.cluster.client import Client, Connection, connect
from sparse_ingest.cluster.stamps import Stamp
from sparse_ingest.errors import ClusterError
from sparse_ingest.reporting import SilentReporter

STAMP = Stamp({"document": "m"}, "ab" * 32, "sparse", "r" * 64, "r" * 64, ("r" * 64,))
LOADING = settings_guard.LOADING


@pytest.fixture(scope="module")
def client(opensearch_url: str) -> Iterator[Client]:
    with closing(connect(Connection(opensearch_url))) as client:
        yield client


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


def kept(client: Client, index: indexes.Index) -> dict[str, dict[str, str | None]]:
    stamp = now(client, index).stamp
    assert stamp is not None
    return stamp.settings


class NoNotes(SilentReporter):
    """Fails the test when there is something to say."""

    def note(self, message: str) -> None:
        raise AssertionError(message)


NEVER = NoNotes()


def test_the_old_values_are_kept_and_come_back(client: Client, index: indexes.Index) -> None:
    settings_guard.tune(client, index, LOADING, NEVER)
    assert both(client, index) == ("-1", "0")
    assert kept(client, index) == {
        "refresh_interval": {"before": None, "loading": "-1"},
        "number_of_replicas": {"before": "1", "loading": "0"},
    }
    assert settings_guard.restore(client, index, NEVER) == ["number_of_replicas", "refresh_interval"]
    assert both(client, index) == (None, "1")
    assert kept(client, index) == {}
    assert settings_guard.restore(client, index, NEVER) == []


def test_the_old_values_are_kept_before_the_first_setting_changes(
    client: Client, index: indexes.Index, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, str]] = []
    call = Client.call
    monkeypatch.setattr(Client, "call", lambda self, *a, **k: (asked.append(a[:2]), call(self, *a, **k))[1])
    settings_guard.tune(client, index, LOADING, NEVER)
    puts = [path.rpartition("/")[2] for method, path in asked if method == "PUT"]
    assert puts == ["_mapping", "_settings"]
    asked.clear()
    settings_guard.restore(client, index, NEVER)
    assert [path.rpartition("/")[2] for method, path in asked if method == "PUT"] == ["_settings", "_mapping"]


def test_a_second_load_does_not_take_the_settings_of_a_killed_one_for_the_old_ones(
    client: Client, index: indexes.Index
) -> None:
    put(client, index, refresh_interval="7s")
    settings_guard.tune(client, index, LOADING, NEVER)
    settings_guard.tune(client, index, LOADING | settings_guard.ASYNC_TRANSLOG, NEVER)
    assert settings_guard.confirms_early(now(client, index))
    settings_guard.restore(client, index, NEVER)
    assert both(client, index) == ("7s", "1")
    assert not settings_guard.confirms_early(now(client, index))


def test_what_somebody_set_after_a_killed_load_comes_back_after_the_next_one(
    client: Client, index: indexes.Index
) -> None:
    put(client, index, refresh_interval="7s")
    settings_guard.tune(client, index, LOADING, NEVER)
    put(client, index, refresh_interval="9s")
    settings_guard.tune(client, index, LOADING, NEVER)
    assert both(client, index) == ("-1", "0")
    settings_guard.restore(client, index, NEVER)
    assert both(client, index) == ("9s", "1")


def test_the_end_of_one_load_does_not_end_another_that_began_meanwhile(client: Client, index: indexes.Index) -> None:
    settings_guard.restore(client, index, NEVER, finished="another run")
    assert now(client, index).stamp == replace(STAMP, load="loading")
    settings_guard.restore(client, index, NEVER, finished=STAMP.run_id)
    assert now(client, index).stamp == replace(STAMP, load="done")


def test_killed_between_keeping_and_changing_there_is_nothing_to_put_back(client: Client, index: indexes.Index) -> None:
    saved = {"refresh_interval": {"before": None, "loading": "-1"}}
    indexes.update_stamp(client, index, lambda stamp: replace(stamp, settings=saved))
    assert settings_guard.restore(client, index, NEVER) == []
    assert kept(client, index) == {}


def test_what_somebody_set_during_the_load_stays(client: Client, index: indexes.Index) -> None:
    settings_guard.tune(client, index, LOADING, NEVER)
    put(client, index, refresh_interval="42s")
    recorder = Recorder()
    assert settings_guard.restore(client, index, recorder) == ["number_of_replicas"]
    assert both(client, index) == ("42s", "1")
    assert recorder.notes == [
        f"Index {index.name!r}: another client set refresh_interval to 42s during the load, which is kept."
    ]


def test_a_setting_that_the_cluster_refuses_is_said_and_the_others_change(client: Client, index: indexes.Index) -> None:
    recorder = Recorder()
    settings_guard.tune(client, index, {**LOADING, "no_such_setting": "1"}, recorder)
    assert both(client, index) == ("-1", "0")
    assert "no_such_setting" not in kept(client, index)
    [note] = recorder.notes
    assert "keeps its no_such_setting during the load: the cluster refuses the change " in note
    settings_guard.restore(client, index, NEVER)


def test_replicas_that_the_cluster_counts_itself_are_left_to_it(client: Client, index: indexes.Index) -> None:
    put(client, index, auto_expand_replicas="0-1")
    settings_guard.tune(client, index, LOADING, NEVER)
    assert kept(client, index).keys() == {"refresh_interval"}


def test_what_cannot_be_put_back_is_an_error_and_stays_kept(client: Client, index: indexes.Index) -> None:
    settings_guard.tune(client, index, LOADING, NEVER)
    put(client, index, **{"blocks.read_only": True})
    with pytest.raises(
        ClusterError, match=r"still has settings for loading: number_of_replicas, refresh_interval.*--restore"
    ):
        settings_guard.restore(client, index, NEVER)
    put(client, index, **{"blocks.read_only": False})
    assert settings_guard.restore(client, index, NEVER) == ["number_of_replicas", "refresh_interval"]


def test_only_the_maker_of_an_index_that_nobody_searches_may_tune_unasked(client: Client, index: indexes.Index) -> None:
    run_id = STAMP.run_id
    assert settings_guard.may_tune(index, run_id)
    assert not settings_guard.may_tune(index, "another run")
    indexes.add_private_alias(client, index, run_id)
    assert settings_guard.may_tune(now(client, index), run_id)
    client.call("POST", "/_aliases", {"actions": [{"add": {"index": index.name, "alias": f"{index.name}-searched"}}]})
    assert not settings_guard.may_tune(now(client, index), run_id)


def test_an_index_without_a_stamp_is_left_alone(client: Client, index_name: str) -> None:
    bare = indexes.create_index(client, index_name, {"settings": {"number_of_replicas": 1}})
    recorder = Recorder()
    settings_guard.tune(client, bare, LOADING, recorder)
    assert both(client, bare) == (None, "1")
    assert "no stamp" in recorder.notes[0]
