"""Indexes made empty, looked at and dropped, with their pipelines, on a real server."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from support.loads import ids_in, into
from support.runs import DOCUMENTS, make_run
from support.secure_proxy import secure_proxy

from sparse_ingest.cli.indexing import index as group
from sparse_ingest.cluster import indexes, installed
from sparse_ingest.cluster.client import Client, Connection, ResponseError, connect
from sparse_ingest.cluster.index_admin import CreateOptions, create_index, drop_index, show_index
from sparse_ingest.cluster.installed import Installed
from sparse_ingest.errors import ClusterError, PipelineError, UsageError
from sparse_ingest.pipeline import EncodeSettings, IndexSettings, Pipeline, packaged_folder
from sparse_ingest.verification.verify import verify

YES = {"sure": lambda sentence: True}


@pytest.fixture(scope="module")
def client(opensearch_url: str) -> Iterator[Client]:
    with closing(connect(Connection(opensearch_url))) as client:
        yield client


@pytest.fixture
def made(client: Client, index_name: str) -> Iterator[str]:
    """A name whose pipelines are removed afterwards; its index goes with `index_name`."""
    yield index_name
    for kind in ("search", "ingest"):
        for name in (f"{index_name}-{kind}", f"{index_name}-other-{kind}"):
            if found(client, kind, name) is not None:
                client.call("DELETE", address(kind, name))


def address(kind: str, name: str) -> str:
    return f"/_{kind}/pipeline/{name}"


def found(client: Client, kind: str, name: str) -> dict | None:
    """The pipeline of that name on the server."""
    return (client.find(address(kind, name)) or {}).get(name)


def made_with(client: Client, name: str, pipeline: Pipeline | None = None, **options):
    return create_index(
        name, pipeline=pipeline or Pipeline(), connection=Connection(client.address), options=CreateOptions(**options)
    )


def shown(client: Client, name: str):
    return show_index(name, connection=Connection(client.address))


def dropped(client: Client, name: str, **options):
    return drop_index(name, connection=Connection(client.address), **{**YES, **options})


def bodies() -> list[Path]:
    return sorted((packaged_folder() / "opensearch").glob("*/*.json"))


@pytest.mark.parametrize("path", bodies(), ids=lambda path: path.stem)
def test_a_packaged_pipeline_is_accepted_as_it_lies_there(client: Client, made: str, path: Path) -> None:
    kind = path.parent.name
    assert client.call("PUT", address(kind, f"{made}-other-{kind}"), path.read_bytes()) == {"acknowledged": True}


def test_every_packaged_pipeline_has_a_name_on_the_command_line() -> None:
    names = {kind: {path.stem.replace("_", "-") for path in bodies() if path.parent.name == kind}
             for kind in ("search", "ingest")}  # fmt: skip
    assert names == {"search": set(installed.SEARCH), "ingest": set(installed.INGEST)}
    options: dict[str | None, Any] = {option.name: option for option in group.commands["create"].params}
    assert (set(options["search"].type.choices), set(options["ingest"].type.choices)) == (
        names["search"],
        names["ingest"],
    )


def test_a_made_index_has_the_body_of_a_load_and_a_load_fills_it(client: Client, made: str, tmp_path: Path) -> None:
    report = made_with(client, made)
    there = indexes.find_index(client, made)
    assert (there.name, there.uuid, there.stamp) == (report.index, report.uuid, None)
    run = make_run(tmp_path / "run")
    loaded = into(client, f"{made}-loaded", run)
    other = indexes.find_index(client, loaded.index)
    kept = {key: value for key, value in other.mappings.items() if key != "_meta"}
    assert {key: value for key, value in there.mappings.items() if key != "_meta"} == kept
    assert into(client, made, run).acknowledged == len(DOCUMENTS)
    assert verify(run.path, index=made, connection=Connection(client.address), sample=None).ok
    # What we know of our own index outlives the load's stamp.
    assert installed.made_of(indexes.find_index(client, made)) == []


@pytest.mark.parametrize("kind", ["rank_features", "sparse_vector"])
def test_show_says_field_kind_load_and_size(client: Client, made: str, tmp_path: Path, kind: str) -> None:
    pipeline = Pipeline(index=IndexSettings(kind=kind, field="vector"))
    made_with(client, made, pipeline)
    found = shown(client, made)
    assert (found.field, found.kind, found.documents, found.load, found.ours) == ("vector", kind, 0, None, True)
    run = make_run(tmp_path / "run")
    into(client, made, run, pipeline=pipeline)
    found = shown(client, made)
    assert (found.documents, found.run_id, found.load) == (len(DOCUMENTS), run.manifest.run_id, "done")
    assert found.model["document"] == "made-by-hand"
    assert found.segments > 0
    assert found.bytes > 0


def test_show_finds_an_index_behind_an_alias_and_one_that_others_made(client: Client, made: str) -> None:
    mappings = {"properties": {"a": {"properties": {"b": {"type": "rank_features"}}}}}
    client.call("PUT", f"/{made}", {"mappings": mappings})
    client.call("POST", "/_aliases", {"actions": [{"add": {"index": made, "alias": f"{made}-alias"}}]})
    found = shown(client, f"{made}-alias")
    assert (found.index, found.aliases, found.field, found.ours) == (made, [f"{made}-alias"], "a.b", False)


def test_two_phase_and_hybrid_in_one_default_pipeline_answer_both_kinds_of_search(client: Client, made: str) -> None:
    report = made_with(client, made, search=("two-phase", "hybrid"), default=True)
    assert (report.search_pipeline, report.default) == (f"{made}-search", True)
    assert shown(client, made).search_pipeline == report.search_pipeline
    for doc_id, weight in (("a", 2.0), ("b", 1.0)):
        document = {"text": f"river {doc_id}", "sparse": {"river": weight, "stone": 0.25}}
        client.call("PUT", f"/{made}/_doc/{doc_id}", document, params={"refresh": "true"})
    sparse = {"neural_sparse": {"sparse": {"query_tokens": {"river": 1.0, "stone": 0.125}}}}
    found = client.call("POST", f"/{made}/_search", {"query": sparse})
    assert [(hit["_id"], hit["_score"]) for hit in found["hits"]["hits"]] == [("a", 2.03125), ("b", 1.03125)]
    both = {"hybrid": {"queries": [{"match": {"text": "river a"}}, sparse]}}
    hits = client.call("POST", f"/{made}/_search", {"query": both})["hits"]["hits"]
    # min_max of two documents: the best of a leg is 1.
    assert hits[0]["_id"] == "a"
    assert hits[0]["_score"] == 1.0
    # Two-phase is at work: a search that sorts is refused.
    with pytest.raises(ResponseError, match="rescore"):
        client.call("POST", f"/{made}/_search", {"query": sparse, "sort": [{"_doc": "asc"}]})


def test_rank_fusion_ranks_by_places(client: Client, made: str) -> None:
    made_with(client, made, search=("rrf",), default=True)
    for doc_id, text in (("a", "river river"), ("b", "river")):
        client.call("PUT", f"/{made}/_doc/{doc_id}", {"text": text}, params={"refresh": "true"})
    legs = [{"match": {"text": "river"}}, {"term": {"text": "river"}}]
    hits = client.call("POST", f"/{made}/_search", {"query": {"hybrid": {"queries": legs}}})["hits"]["hits"]
    assert [hit["_score"] for hit in hits] == pytest.approx([2 / 61, 2 / 62])


def test_verify_goes_past_a_default_search_pipeline(client: Client, made: str, tmp_path: Path) -> None:
    made_with(client, made, search=("two-phase",), default=True)
    run = make_run(tmp_path / "run")
    into(client, made, run)
    assert verify(run.path, index=made, connection=Connection(client.address), sample=None).ok


def test_a_load_goes_past_the_default_ingest_pipeline(client: Client, made: str, tmp_path: Path) -> None:
    """The model is not there: whatever goes through the pipeline is refused."""
    made_with(client, made, ingest="sparse-encoding", model_id="nowhere", default=True)
    assert shown(client, made).ingest_pipeline == f"{made}-ingest"
    with pytest.raises(ResponseError):
        client.call("PUT", f"/{made}/_doc/a", {"text": "river"})
    run = make_run(tmp_path / "run")
    assert into(client, made, run).acknowledged == len(DOCUMENTS)
    assert ids_in(client, made) == set(DOCUMENTS)
    assert verify(run.path, index=made, connection=Connection(client.address), sample=None).ok


def test_a_load_that_replaces_the_index_keeps_its_pipelines(client: Client, made: str, tmp_path: Path) -> None:
    made_with(client, made, search=("two-phase",), ingest="text-chunking", model_id="nowhere", default=True)
    before = shown(client, made)
    run = make_run(tmp_path / "run")
    into(client, made, run, replace=True)
    after = shown(client, made)
    assert after.uuid != before.uuid
    for name in ("search_pipeline", "ingest_pipeline", "installed"):
        assert getattr(after, name) == getattr(before, name)
    mapping = indexes.find_index(client, made).mappings
    assert mapping["properties"]["passage_vectors"]["type"] == "nested"
    assert verify(run.path, index=made, connection=Connection(client.address), sample=None).ok
    assert sorted(dropped(client, made).pipelines) == [f"{made}-ingest", f"{made}-search"]


def test_a_load_refuses_a_final_pipeline_that_encodes(client: Client, made: str, tmp_path: Path) -> None:
    made_with(client, made, ingest="sparse-encoding", model_id="nowhere")
    client.call("PUT", f"/{made}/_settings", {"index.final_pipeline": f"{made}-ingest"})
    with pytest.raises(ClusterError, match=r"final pipeline '.*-ingest', which encodes into 'sparse'"):
        into(client, made, make_run(tmp_path / "run"))
    client.call("PUT", f"/{made}/_settings", {"index.final_pipeline": None})


def test_bodies_are_filled_with_field_model_and_the_pruning_of_encode() -> None:
    body = installed.ingest_body("sparse-encoding", "vector", "m1", EncodeSettings(max_ratio=0.25))
    [encoding] = [one["sparse_encoding"] for one in body["processors"] if "sparse_encoding" in one]
    assert encoding["field_map"] == {"title_and_text": "vector"}
    assert (encoding["model_id"], encoding["prune_type"], encoding["prune_ratio"]) == ("m1", "max_ratio", 0.25)
    unpruned = installed.ingest_body("text-chunking", "vector", "m1", EncodeSettings())["processors"][1]
    assert "prune_type" not in unpruned["sparse_encoding"]
    with pytest.raises(PipelineError, match="more than one of max_ratio, top_k"):
        installed.ingest_body("sparse-encoding", "vector", "m1", EncodeSettings(max_ratio=0.25, top_k=3))
    enriched = installed.search_body(("neural-query-enricher", "two-phase"), "vector", "m1")["request_processors"]
    assert enriched[0]["neural_query_enricher"] == {"neural_field_default_id": {"vector": "m1"}}
    assert len(enriched) == 2


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"search": ("hybrid", "rrf")}, "Pass one."),
        ({"search": ("neural-query-enricher",)}, "pass its --model-id"),
        ({"ingest": "sparse-encoding"}, "pass its --model-id"),
        ({"model_id": "m"}, "--model-id needs"),
        ({"default": True}, "--default needs"),
        ({"search": ("three-phase",)}, "Expected one of two-phase, neural-query-enricher, hybrid, rrf"),
    ],
)
def test_options_that_do_not_go_together_are_refused_before_the_server_is_asked(options, sentence) -> None:
    with pytest.raises(UsageError, match=sentence):
        create_index(
            "x", pipeline=Pipeline(), connection=Connection("http://127.0.0.1:1"), options=CreateOptions(**options)
        )


def test_two_phase_is_refused_for_a_sparse_vector_field() -> None:
    pipeline = Pipeline(index=IndexSettings(kind="sparse_vector"))
    with pytest.raises(PipelineError, match="searches rank_features fields"):
        create_index(
            "x", pipeline=pipeline, connection=Connection("http://127.0.0.1:1"), options=CreateOptions(("two-phase",))
        )


def test_an_index_or_a_pipeline_that_is_there_is_left_as_it_is(client: Client, made: str) -> None:
    theirs = {"request_processors": [], "description": "theirs"}
    client.call("PUT", address("search", f"{made}-search"), theirs)
    with pytest.raises(ClusterError, match=f"Another search pipeline '{made}-search' exists"):
        made_with(client, made, search=("two-phase",))
    assert indexes.find_index(client, made) is None
    assert found(client, "search", f"{made}-search") == theirs
    made_with(client, made)
    with pytest.raises(ClusterError, match="' exists"):
        made_with(client, made)


def test_pipelines_go_again_when_the_index_cannot_be_made(client: Client, made: str, tmp_path: Path) -> None:
    body = tmp_path / "body.json"
    properties = {"sparse": {"type": "rank_features"}, "x": {"type": "nonsense"}}
    body.write_text(json.dumps({"mappings": {"properties": properties}}))
    with pytest.raises(ResponseError, match="nonsense"):
        made_with(client, made, Pipeline(index=IndexSettings(body=str(body))), search=("two-phase",))
    assert found(client, "search", f"{made}-search") is None


def test_a_create_that_was_killed_before_its_index_is_taken_up(client: Client, made: str) -> None:
    made_with(client, made, search=("two-phase",))
    client.call("DELETE", f"/{made}")
    made_with(client, made, search=("two-phase",))
    assert dropped(client, made).pipelines == [f"{made}-search"]


def test_drop_deletes_the_index_and_its_own_pipelines(client: Client, made: str) -> None:
    made_with(client, made, search=("two-phase",), ingest="sparse-encoding", model_id="m", default=True)
    asked: list[str] = []
    assert dropped(client, made, sure=lambda sentence: bool(asked.append(sentence))) is None
    assert asked[0].startswith(f"Delete index {made!r} at {client.address} with 0 documents and its pipelines")
    report = dropped(client, made)
    assert (report.pipelines, report.kept) == ([f"{made}-search", f"{made}-ingest"], [])
    assert indexes.find_index(client, made) is None
    assert found(client, "search", f"{made}-search") is None
    assert found(client, "ingest", f"{made}-ingest") is None
    with pytest.raises(ClusterError, match="There is no index or alias"):
        dropped(client, made)


def test_drop_keeps_a_pipeline_that_was_replaced_or_that_another_index_uses(client: Client, made: str) -> None:
    made_with(client, made, search=("two-phase",), ingest="sparse-encoding", model_id="m")
    client.call("PUT", address("search", f"{made}-search"), {"request_processors": []})
    client.call("PUT", f"/{made}-other", {"settings": {"index.default_pipeline": f"{made}-ingest"}})
    report = dropped(client, made)
    assert report.pipelines == []
    assert "another client replaced" in report.kept[0]
    assert f"{made}-other use it too" in report.kept[1]
    assert found(client, "search", f"{made}-search") == {"request_processors": []}
    assert found(client, "ingest", f"{made}-ingest") is not None


def test_drop_refuses_aliases_served_indexes_and_those_of_others_unless_forced(client: Client, made: str) -> None:
    made_with(client, made)
    client.call("POST", "/_aliases", {"actions": [{"add": {"index": made, "alias": f"{made}-alias"}}]})
    with pytest.raises(UsageError, match=f"is an alias of '{made}'"):
        dropped(client, f"{made}-alias", force=True)
    with pytest.raises(ClusterError, match="whose searches would find nothing"):
        dropped(client, made)
    client.call("PUT", f"/{made}-theirs")
    with pytest.raises(ClusterError, match="neither created nor loaded by sparse-ingest"):
        dropped(client, f"{made}-theirs")
    assert dropped(client, f"{made}-theirs", force=True) is not None
    assert dropped(client, made, force=True) is not None


def test_a_red_index_is_dropped_only_when_forced_and_its_documents_are_unknown(client: Client, made: str) -> None:
    made_with(client, made)
    red, nowhere = f"{made}-red", {"index.routing.allocation.require.box": "none"}
    mappings = client.call("GET", f"/{made}/_mapping")[made]["mappings"]
    body = {"settings": nowhere, "mappings": mappings}
    client.call("PUT", f"/{red}", body, params={"wait_for_active_shards": "0"})
    with pytest.raises(ClusterError, match=r"cannot be counted \(.*To delete it anyway, pass --force"):
        dropped(client, red)
    arguments = ["drop", "--index", red, "--yes", "--force", "--json", "--url", client.address]
    shown = CliRunner().invoke(group, arguments)
    assert (shown.exit_code, json.loads(shown.stdout)["documents"]) == (0, None)
    assert indexes.find_index(client, red) is None


def test_a_loaded_index_is_dropped_without_having_been_made(client: Client, made: str, tmp_path: Path) -> None:
    into(client, made, make_run(tmp_path / "run"))
    assert dropped(client, made).documents == len(DOCUMENTS)


def test_chunks_have_a_nested_field_that_is_kept_out_of_source(client: Client, made: str) -> None:
    made_with(client, made, ingest="text-chunking", model_id="m")
    mapping = indexes.find_index(client, made).mappings
    assert mapping["properties"]["passage_vectors"]["type"] == "nested"
    assert set(mapping["_source"]["excludes"]) == {"sparse", "passage_vectors"}


def test_a_missing_plugin_is_one_sentence(client: Client, made: str) -> None:
    broken = {"request_processors": [{"no_such_processor": {}}], "description": "d"}
    with pytest.raises(ClusterError, match=r"refuses the search pipeline .*needs the neural-search plugin"):
        installed.install(client, Installed("search", f"{made}-search"), broken, made)


@pytest.mark.parametrize(
    ("rule", "value", "server"),
    [("max_ratio", 0.2, "max_ratio"), ("top_k", 5, "top_k"), ("min_weight", 0.5, "abs_value"),
     ("alpha_mass", 0.9, "alpha_mass")],
)  # fmt: skip
def test_the_server_takes_each_of_our_rules(client: Client, made: str, rule: str, value: float, server: str) -> None:
    encode = EncodeSettings(**{rule: value})
    report = made_with(client, made, Pipeline(encode=encode), ingest="sparse-encoding", model_id="m")
    body = found(client, "ingest", report.ingest_pipeline)
    [encoding] = [one["sparse_encoding"] for one in body["processors"] if "sparse_encoding" in one]
    assert (encoding["prune_type"], encoding["prune_ratio"]) == (server, value)


def test_without_pipelines_no_right_on_the_cluster_is_needed(opensearch_url: str, index_name: str) -> None:
    with secure_proxy(opensearch_url, cluster_rights=False) as proxy:
        connection = Connection(proxy.url)
        create_index(index_name, pipeline=Pipeline(), connection=connection)
        assert show_index(index_name, connection=connection).ours
        assert drop_index(index_name, connection=connection, **YES).documents == 0


def test_who_may_not_see_other_indexes_leaves_the_pipeline(client: Client, opensearch_url: str, made: str) -> None:
    made_with(client, made, search=("two-phase",))
    forbidden = {"error": {"type": "security_exception", "reason": "no permissions for [indices:monitor/settings/get]"}}
    with secure_proxy(opensearch_url, check=lambda one: (403, forbidden) if "/_all/" in one.path else None) as proxy:
        report = drop_index(made, connection=Connection(proxy.url), **YES)
    assert report.pipelines == []
    assert "was kept: " in report.kept[0]
    assert "grant the right" in report.kept[0]
    assert indexes.find_index(client, made) is None


def test_the_commands_print_json_and_ask_before_they_drop(client: Client, made: str) -> None:
    def run(*arguments: str):
        return CliRunner().invoke(group, [*arguments, "--index", made, "--url", client.address], standalone_mode=False)

    created = json.loads(run("create", "--search-pipeline", "two-phase", "--json").stdout)
    assert created["search_pipeline"] == f"{made}-search"
    assert json.loads(run("show", "--json").stdout)["installed"] == [f"{made}-search"]
    assert f"installed  {made}-search" in run("show").stdout
    unanswered = run("drop")
    assert isinstance(unanswered.exception, UsageError)
    assert "pass --yes" in str(unanswered.exception)
    assert f"was deleted, with 0 documents.\nIts pipelines were deleted: {made}-search." in run("drop", "--yes").stdout


def test_what_a_load_stamps_is_kept_beside_what_create_wrote(client: Client, made: str, tmp_path: Path) -> None:
    made_with(client, made, search=("two-phase",))
    into(client, made, make_run(tmp_path / "run"))
    there = indexes.find_index(client, made)
    assert there.stamp is not None
    assert replace(there.stamp, load="done").created_by is None
    assert installed.made_of(there) == [Installed("search", f"{made}-search")]
