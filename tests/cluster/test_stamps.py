"""Stamps written by another client or release: unknown keys are kept, wrong types are reported."""

from __future__ import annotations

from typing import Any

import pytest
from support.forked import command
from support.loads import into, settings_of, stamped
from support.runs import make_run

from sparse_ingest.cluster import indexes, installed
from sparse_ingest.cluster.client import Client
from sparse_ingest.cluster.stamps import NO_PRUNING, Stamp, foreign_settings
from sparse_ingest.errors import ClusterError
from sparse_ingest.pipeline import Pipeline

STAMP = Stamp({"document": "m", "revision": "1"}, "ab" * 32, "sparse", "r" * 64, "r" * 64, ("r" * 64,))
WRONG = {
    "runs": [{}], "model": {"document": 5}, "pruning": {"top_k": "abc"}, "since": "x", "created_by": [], "load": "done",
    "field": None, "vocabulary_sha256": 7, "fields": {"a": 1}, "query": [], "replaced": "x", "replaced_by": {"a": 1},
    "settings": [], "format": "one", "run_id": {},
}  # fmt: skip
MORE_WRONG = [
    ("pruning", {"zzz": 3}), ("pruning", {"top_k": -1}), ("pruning", 3), ("load", {"state": "paused"}), ("load", None),
    ("model", {"document": "m", "query_side": "x"}), ("model", {"document": "m", "max_length": "long"}),
    ("model", "m"), ("runs", "abc"), ("since", 4),
]  # fmt: skip


def index_of(meta: object) -> indexes.Index:
    return indexes.Index("one", "uuid", {"_meta": {"sparse_ingest": meta}})


@pytest.mark.parametrize(("key", "value"), [*WRONG.items(), *MORE_WRONG])
def test_a_wrong_type_in_a_stamp_is_reported_with_its_key(key: str, value: object) -> None:
    index = index_of({**STAMP.as_meta(), key: value})
    assert index.stamp is None
    assert key in index.unreadable
    with pytest.raises(ClusterError, match=r"Index 'one' has a _meta.sparse_ingest that cannot be read \(.*PUT /one"):
        indexes.refuse_unreadable(index)


@pytest.mark.parametrize("meta", ["x", 5, [], [{}]])
def test_a_stamp_that_is_not_an_object_is_unreadable(meta: object) -> None:
    assert index_of(meta).unreadable
    assert (index_of(None).unreadable, index_of(None).stamp) == ("", None)


@pytest.mark.parametrize("pipelines", [None, 5, [{}], ["x"], [{"kind": [], "name": "a"}], {"a": 1}, [{"kind": "zzz"}]])
def test_malformed_records_of_pipelines_are_ignored(pipelines: object) -> None:
    index = indexes.Index("one", "uuid", {"_meta": {installed.MADE_KEY: {"format": 1, "pipelines": pipelines}}})
    assert installed.made_of(index) == []


def test_stamps_of_earlier_and_newer_releases_are_readable() -> None:
    names = ("model", "vocabulary_sha256", "field", "run_id", "format")
    first = {key: value for key, value in STAMP.as_meta().items() if key in names}
    found = index_of({**first, "load": {"state": "done"}}).stamp
    assert found is not None
    assert (found.created_by, found.load, found.pruning) == (None, "done", NO_PRUNING)
    newer = {**STAMP.as_meta(), "format": 2, "later_key": {"a": 1}, "load": {"state": "done", "since": 3}}
    newer["model"] = {**STAMP.model, "head": [1], "query_side": {"document": "q", "kind": "masked LM"}}
    found = index_of(newer).stamp
    assert found is not None
    assert (found.format, found.model) == (2, newer["model"])


def test_only_settings_that_loads_change_are_read_from_a_stamp() -> None:
    ours = {
        "refresh_interval": {"before": "30s", "loading": "-1"},
        "number_of_replicas": {"before": None, "loading": "0"},
        "translog.durability": {"before": "REQUEST", "loading": "async"},
    }
    forged = {
        "blocks.read_only": {"before": "true", "loading": None},
        "default_pipeline": {"before": "evil", "loading": None},
        "max_result_window": {"before": "1", "loading": "2"},
    }
    index = index_of({**STAMP.as_meta(), "settings": {**ours, **forged}})
    assert index.stamp is not None
    assert index.stamp.settings == ours
    assert foreign_settings(index.meta) == forged
    for before in (5, ["1s"], "evil", "0-5", {"a": 1}, True):
        wrong = {"refresh_interval": {"before": before, "loading": "-1"}}
        index = index_of({**STAMP.as_meta(), "settings": wrong})
        assert index.stamp is not None
        assert (index.stamp.settings, foreign_settings(index.meta)) == ({}, wrong)


def rewrite_stamp(client: Client, index: str, **changes: Any) -> dict[str, Any]:
    there = indexes.need_index(client, index, "")
    meta = {**there.mappings["_meta"]["sparse_ingest"], **changes}
    client.call("PUT", f"/{index}/_mapping", {"_meta": {"sparse_ingest": meta}})
    return meta


def test_a_load_keeps_unknown_keys_and_foreign_settings_of_a_stamp(client: Client, index_name: str, tmp_path) -> None:
    run = make_run(tmp_path / "run")
    into(client, index_name, run)
    rewrite_stamp(
        client, index_name, later_key=[1, 2], format=2, settings={"codec": {"before": "lz4", "loading": "zstd"}}
    )
    more = make_run(tmp_path / "more", {"new": {"river": 1.0}})
    into(client, index_name, more)
    meta = indexes.need_index(client, index_name, "").mappings["_meta"]["sparse_ingest"]
    assert (meta["run_id"], meta["later_key"], meta["format"]) == (more.manifest.run_id, [1, 2], 2)
    assert meta["settings"] == {"codec": {"before": "lz4", "loading": "zstd"}}


def test_restore_ignores_foreign_settings_and_reports_them(client: Client, index_name: str, tmp_path) -> None:
    into(client, index_name, make_run(tmp_path / "run"))
    forged = {name: {"before": "1", "loading": None} for name in ("max_result_window", "blocks.write")}
    rewrite_stamp(client, index_name, settings={**forged, "refresh_interval": {"before": "7s", "loading": None}})
    answer = command("load", "--index", index_name, "--restore", "--url", client.address)
    assert answer.code == 0
    assert "nothing to restore" in answer.out
    assert "max_result_window (before 1)" in answer.err and "blocks.write (before 1)" in answer.err
    there = indexes.need_index(client, index_name, "")
    assert (there.setting("max_result_window"), there.setting("blocks.write")) == (None, None)
    assert settings_of(client, index_name) == (None, "1", None)


@pytest.mark.parametrize(
    "changes",
    [
        {"model": {"document": 5}},
        *(pytest.param(one, marks=pytest.mark.slow) for one in ({"runs": [{}]}, {"pruning": {"zzz": 3}})),
    ],
)
def test_every_command_reports_an_unreadable_stamp(
    client: Client, index_name: str, tmp_path, changes: dict[str, Any]
) -> None:
    run = make_run(tmp_path / "run")
    into(client, index_name, run)
    rewrite_stamp(client, index_name, **changes)
    (key,) = changes
    for arguments in (
        ["load", run.path, "--index", index_name],
        ["load", "--index", index_name, "--restore"],
        ["verify", run.path, "--index", index_name],
        ["search", "river", "--index", index_name],
        ["index", "drop", "--index", index_name, "--yes"],
    ):
        answer = command(*arguments, "--url", client.address)
        assert answer.code == 1, (arguments, answer)
        assert "_meta.sparse_ingest that cannot be read (" in answer.err, arguments
        assert key in answer.err
        assert "Traceback" not in answer.err
    shown = command("index", "show", "--index", index_name, "--url", client.address)
    assert "has a _meta.sparse_ingest that cannot be read (" in shown.out
    into(client, index_name, run, replace=True, from_scratch=True, pipeline=Pipeline())
    assert stamped(client, index_name).load == "done"
