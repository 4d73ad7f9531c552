"""Pipeline files in `load`: [load] prunes, [query] is stored in the index and used by searches."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support.changes import existing_index, into, stamp_of, verify_all
from support.forked import command
from support.reporters import Recorder
from support.runs import make_run
from support.tables import write_table

import sparse_ingest as si
from sparse_ingest.cluster.client import Client, Connection
from sparse_ingest.errors import ClusterError, PipelineError
from sparse_ingest.loading.publish import publish
from sparse_ingest.pipeline import HybridSettings, IndexSettings, Pipeline, Pruning, QuerySettings
from sparse_ingest.runs.run import Run

DOCUMENTS = {
    "a": {"catch": 2.0, "except": 1.0, "an": 0.25, "river": 0.5},
    "b": {"catch": 1.0, "##ion": 2.0, "an": 0.125},
    "c": {"river": 3.0},
}
TEXT = "catch an exception"  # except 4.75, ##ion 2.5, catch 2.5, an 0.1
PLANNED = Pipeline(load=Pruning(top_k=2), query=QuerySettings(top_k=2))


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return make_run(tmp_path / "run", DOCUMENTS, model=str(write_table(tmp_path / "model")))


def meta(client: Client, index: str) -> dict[str, Any]:
    found: dict[str, Any] = existing_index(client, index).mappings["_meta"]["sparse_ingest"]
    return found


def query_tokens(client: Client, index: str, **settings: Any) -> list[str]:
    """Return the query tokens of a search of the index."""
    with si.open_index(index, url=client.address, **settings) as opened:
        return list(opened.query_weights(TEXT))


def test_every_command_applies_the_pipeline_file_of_a_plan(
    run: Run, client: Client, index_name: str, tmp_path: Path
) -> None:
    (tmp_path / "p.toml").write_text(
        "[encode]\ntop_k = 1\n[load]\ntop_k = 3\nmin_weight = 0.2\n[query]\ntop_k = 2\nengine = 'two-phase'\n"
    )
    to = ["--index", index_name, "--url", client.address]
    answer = command("load", run.path, "--pipeline", tmp_path / "p.toml", "--top-k", "2", *to)
    assert answer.code == 0, answer.err
    assert "The pipeline prunes documents: top_k 2, min_weight 0.2." in answer.err
    assert f"Searches of index {index_name!r} that name no pipeline use top_k 2, engine two-phase." in answer.err
    assert meta(client, index_name)["pruning"] == {"top_k": 2, "max_ratio": None, "min_weight": 0.2}
    assert meta(client, index_name)["query"] == {"top_k": 2, "engine": "two-phase"}
    assert verify_all(client, index_name, run).same
    found = json.loads(command("search", TEXT, "--json", *to).out)
    assert list(found["query"]) == ["except", "##ion"]
    assert [hit["id"] for hit in found["hits"]] == ["b", "a"]
    answer = command("query", TEXT, *to)
    body = json.loads(answer.out)
    assert list(body["query"]["neural_sparse"]["sparse"]["query_tokens"]) == ["except", "##ion"]
    assert "search_pipeline" in body and "top_k 2, engine two-phase. Pass --pipeline to use others." in answer.err
    (tmp_path / "queries.tsv").write_text(f"1\t{TEXT}\n")
    (tmp_path / "qrels.tsv").write_text("1\tb\t1\n")
    judged = ["--queries", tmp_path / "queries.tsv", "--qrels", tmp_path / "qrels.tsv", "--json"]
    (tmp_path / "other.toml").touch()
    for more, tokens in ([], 2), (["--set", "query.top_k=1"], 1), (["--pipeline", tmp_path / "other.toml"], 4):
        answer = command("evaluate", *judged, *to, *more)
        assert answer.code == 0, answer.err
        assert json.loads(answer.out)["queries"]["active_dimensions"] == tokens
    shown = json.loads(command("index", "show", "--json", *to).out)
    assert shown["query"] == {"top_k": 2, "engine": "two-phase"} and shown["pruning"]["min_weight"] == 0.2
    assert "query settings" in command("index", "show", *to).out


def test_a_search_uses_the_stored_settings_unless_a_pipeline_is_given(
    run: Run, client: Client, index_name: str
) -> None:
    into(client, index_name, run, pipeline=PLANNED)
    assert query_tokens(client, index_name) == ["except", "##ion"]
    model = run.manifest.model["document"]
    assert query_tokens(client, index_name, model=model, force=True) == ["except", "##ion"]
    assert len(query_tokens(client, index_name, pipeline=Pipeline())) == 4
    assert len(query_tokens(client, index_name, pipeline=Pipeline(query=QuerySettings(top_k=3)))) == 3


def test_a_search_is_hybrid_if_the_index_remembers_it(run: Run, client: Client, index_name: str) -> None:
    query = QuerySettings(hybrid=True, hybrid_weights=(0.25, 0.75), hybrid_normalization="l2")
    notes = Recorder()
    into(client, index_name, run, pipeline=Pipeline(query=query), progress=notes)
    stored = {"hybrid": True, "hybrid_weights": [0.25, 0.75], "hybrid_normalization": "l2"}
    assert meta(client, index_name)["query"] == stored
    assert "use hybrid on, hybrid_weights [0.25, 0.75], hybrid_normalization l2." in "".join(notes.notes)
    before = stamp_of(client, index_name)
    into(client, index_name, run, pipeline=None)
    assert stamp_of(client, index_name) == before
    with si.open_index(index_name, url=client.address) as opened:
        kept = HybridSettings(hybrid=True, hybrid_weights=(0.25, 0.75), hybrid_normalization="l2")
        assert opened.engine_for(si.SearchOptions()).hybrid == kept
        hits = opened.search(TEXT)
        assert hits and all(hit.sub_scores for hit in hits)
        assert opened.search(TEXT, hybrid=False)[0].sub_scores is None
        [ranked] = opened.rank([si.Query("q", TEXT)])
        assert ranked.doc_ids == [hit.id for hit in hits]
        with pytest.raises(si.UsageError, match="needs the text of the query"):
            opened.search({"catch": 1.0})
    with pytest.raises(PipelineError, match="Two-phase has no effect in a hybrid query"):
        into(client, index_name, run, pipeline=Pipeline(query=QuerySettings(hybrid=True, engine="two-phase")))
    with pytest.raises(si.UsageError, match="hybrid needs a server"):
        si.open_run(run.path, pipeline=Pipeline(query=query)).search(TEXT)


def test_a_load_without_a_pipeline_keeps_the_stored_settings(
    run: Run, client: Client, index_name: str, tmp_path: Path
) -> None:
    first, second, third = Recorder(), Recorder(), Recorder()
    into(client, index_name, run, pipeline=PLANNED)
    with pytest.raises(ClusterError, match="was loaded pruned by top_k 2, this load is unpruned"):
        into(client, index_name, run, pipeline=None)
    with pytest.raises(ClusterError, match="this load is pruned by top_k 3"):
        into(client, index_name, run, pipeline=PLANNED, top_k=3)
    into(client, index_name, run, pipeline=None, top_k=2, progress=first)
    assert meta(client, index_name)["query"] == {"top_k": 2} and "use top_k 2." in "".join(first.notes)
    newer = make_run(tmp_path / "new", {**DOCUMENTS, "d": {"catch": 1.0}}, model=run.manifest.model["document"])
    into(client, index_name, newer, pipeline=None, top_k=2, since=run.path)
    assert meta(client, index_name)["query"] == {"top_k": 2} and verify_all(client, index_name, newer).same
    # Nothing is left to send, and the pipeline file of another plan has other settings.
    other = Pipeline(load=Pruning(top_k=2), query=QuerySettings(engine="two-phase", two_phase={"prune_ratio": 0.3}))
    report = into(client, index_name, newer, pipeline=other, progress=second)
    assert report.loaded_shards == 0 and stamp_of(client, index_name).load == "done"
    assert meta(client, index_name)["query"] == {"engine": "two-phase", "two_phase": {"prune_ratio": 0.3}}
    assert "use engine two-phase, two_phase (prune_ratio 0.3)." in "".join(second.notes)
    into(client, index_name, newer, pipeline=Pipeline(load=Pruning(top_k=2)), progress=third)
    assert "query" not in meta(client, index_name) and "use no query settings" in "".join(third.notes)


def test_moving_an_alias_keeps_its_settings_and_reports_those_the_new_index_lacks(
    run: Run, client: Client, index_name: str, tmp_path: Path
) -> None:
    def serve(run: Run, pipeline: Pipeline | None) -> list[str]:
        recorder = Recorder()
        where = {"alias": index_name, "connection": Connection(client.address)}
        publish(run, pipeline=pipeline, progress=recorder, allow_fewer=True, **where)
        return recorder.notes

    serve(run, PLANNED)
    assert query_tokens(client, index_name) == ["except", "##ion"]
    newer = make_run(tmp_path / "new", {"d": {"catch": 1.0}}, model=run.manifest.model["document"])
    notes = "".join(serve(newer, None))
    assert f"'{index_name}-{run.manifest.run_id[:8]}' has pruning top_k 2 and query settings top_k 2" in notes
    assert len(query_tokens(client, index_name)) == 4


def test_unusable_query_settings_are_refused_before_loading(run: Run, client: Client, index_name: str) -> None:
    wrong = Pipeline(query=QuerySettings(engine="seismic"))
    with pytest.raises(PipelineError, match="The engine seismic cannot search a rank_features field"):
        into(client, index_name, run, pipeline=wrong)
    fits = Pipeline(index=IndexSettings(kind="sparse_vector"), query=QuerySettings(engine="exact"))
    with pytest.raises(PipelineError, match="The engine exact cannot search a sparse_vector field"):
        into(client, index_name, run, pipeline=fits)
    assert client.find(f"/{index_name}") is None


def test_unknown_settings_stored_by_a_newer_release_are_reported(run: Run, client: Client, index_name: str) -> None:
    into(client, index_name, run, pipeline=PLANNED)
    changed = {**existing_index(client, index_name).mappings["_meta"]}
    changed["sparse_ingest"] = {**changed["sparse_ingest"], "query": {"rerank": True}}
    client.call("PUT", f"/{index_name}/_mapping", {"_meta": changed})
    with pytest.raises(PipelineError, match=r"_meta.sparse_ingest.query: unknown key rerank"):
        query_tokens(client, index_name)
    assert len(query_tokens(client, index_name, pipeline=Pipeline())) == 4


@pytest.mark.parametrize("option", [["--top-k", "3"], ["--set", "load.top_k=3"], ["--merge"], ["--pipeline", "demo"]])
def test_load_options_are_refused_if_nothing_is_loaded(option: list[str]) -> None:
    for target in ["--alias", "a", "--to", "b"], ["--index", "a", "--restore"]:
        answer = command("load", *target, *option)
        assert answer.code == 2 and f"{option[0]} has no effect with --to or --restore" in answer.err
