"""`index create`, `index show` and `index drop`, with pipelines, on a real server."""

from __future__ import annotations

import json
from collections.abc import Iterator
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
from sparse_ingest.cluster.client import Client, Connection, ResponseError
from sparse_ingest.cluster.index_admin import CreateOptions, create_index, drop_index, show_index
from sparse_ingest.cluster.installed import Installed
from sparse_ingest.errors import ClusterError, PipelineError, UsageError
from sparse_ingest.pipeline import EncodeSettings, IndexSettings, Pipeline, packaged_folder
from sparse_ingest.verification.verify import verify

YES = {"sure": lambda message: True}


@pytest.fixture
def index(client: Client, index_name: str) -> Iterator[str]:
    """An index name whose pipelines are deleted after the test; `index_name` deletes the index."""
    yield index_name
    for kind in ("search", "ingest"):
        for name in (f"{index_name}-{kind}", f"{index_name}-other-{kind}"):
            if found(client, kind, name) is not None:
                client.call("DELETE", address(kind, name))


def address(kind: str, name: str) -> str:
    return f"/_{kind}/pipeline/{name}"


def found(client: Client, kind: str, name: str) -> dict | None:
    return (client.find(address(kind, name)) or {}).get(name)


def create(client: Client, name: str, pipeline: Pipeline | None = None, **options):
    return create_index(
        name, pipeline=pipeline or Pipeline(), connection=Connection(client.address), options=CreateOptions(**options)
    )


def show(client: Client, name: str):
    return show_index(name, connection=Connection(client.address))


def drop(client: Client, name: str, **options):
    return drop_index(name, connection=Connection(client.address), **{**YES, **options})


def bodies() -> list[Path]:
    return sorted((packaged_folder() / "opensearch").glob("*/*.json"))


@pytest.mark.parametrize("path", bodies(), ids=lambda path: path.stem)
def test_a_packaged_pipeline_is_accepted_unchanged(client: Client, index: str, path: Path) -> None:
    kind = path.parent.name
    assert client.call("PUT", address(kind, f"{index}-other-{kind}"), path.read_bytes()) == {"acknowledged": True}


def test_every_packaged_pipeline_is_a_choice_on_the_command_line() -> None:
    names = {kind: {path.stem.replace("_", "-") for path in bodies() if path.parent.name == kind}
             for kind in ("search", "ingest")}  # fmt: skip
    assert names == {"search": set(installed.SEARCH), "ingest": set(installed.INGEST)}
    options: dict[str | None, Any] = {option.name: option for option in group.commands["create"].params}
    assert (set(options["search"].type.choices), set(options["ingest"].type.choices)) == (
        names["search"],
        names["ingest"],
    )


def test_a_created_index_has_the_mapping_of_a_load_and_can_be_loaded(
    client: Client, index: str, tmp_path: Path
) -> None:
    report = create(client, index)
    there = indexes.find_index(client, index)
    assert (there.name, there.uuid, there.stamp) == (report.index, report.uuid, None)
    run = make_run(tmp_path / "run")
    loaded = into(client, f"{index}-loaded", run)
    other = indexes.find_index(client, loaded.index)
    kept = {key: value for key, value in other.mappings.items() if key != "_meta"}
    assert {key: value for key, value in there.mappings.items() if key != "_meta"} == kept
    assert into(client, index, run).acknowledged == len(DOCUMENTS)
    assert verify(run.path, index=index, connection=Connection(client.address), sample=None).ok
    # The load's stamp keeps the record that `create` wrote.
    assert installed.made_of(indexes.find_index(client, index)) == []


@pytest.mark.parametrize("kind", ["rank_features", "sparse_vector"])
def test_show_reports_field_kind_load_and_size(client: Client, index: str, tmp_path: Path, kind: str) -> None:
    pipeline = Pipeline(index=IndexSettings(kind=kind, field="vector"))
    create(client, index, pipeline)
    found = show(client, index)
    assert (found.field, found.kind, found.documents, found.load, found.ours) == ("vector", kind, 0, None, True)
    run = make_run(tmp_path / "run")
    into(client, index, run, pipeline=pipeline)
    found = show(client, index)
    assert (found.documents, found.run_id, found.load) == (len(DOCUMENTS), run.manifest.run_id, "done")
    assert found.model["document"] == "made-by-hand"
    assert found.segments > 0
    assert found.bytes > 0


def test_show_resolves_an_alias_and_reads_an_index_of_another_client(client: Client, index: str) -> None:
    mappings = {"properties": {"a": {"properties": {"b": {"type": "rank_features"}}}}}
    client.call("PUT", f"/{index}", {"mappings": mappings})
    client.call("POST", "/_aliases", {"actions": [{"add": {"index": index, "alias": f"{index}-alias"}}]})
    found = show(client, f"{index}-alias")
    assert (found.index, found.aliases, found.field, found.ours) == (index, [f"{index}-alias"], "a.b", False)


def test_one_default_pipeline_serves_two_phase_and_hybrid_searches(client: Client, index: str) -> None:
    report = create(client, index, search=("two-phase", "hybrid"), default=True)
    assert (report.search_pipeline, report.default) == (f"{index}-search", True)
    assert show(client, index).search_pipeline == report.search_pipeline
    for doc_id, weight in (("a", 2.0), ("b", 1.0)):
        document = {"text": f"river {doc_id}", "sparse": {"river": weight, "stone": 0.25}}
        client.call("PUT", f"/{index}/_doc/{doc_id}", document, params={"refresh": "true"})
    sparse = {"neural_sparse": {"sparse": {"query_tokens": {"river": 1.0, "stone": 0.125}}}}
    found = client.call("POST", f"/{index}/_search", {"query": sparse})
    assert [(hit["_id"], hit["_score"]) for hit in found["hits"]["hits"]] == [("a", 2.03125), ("b", 1.03125)]
    both = {"hybrid": {"queries": [{"match": {"text": "river a"}}, sparse]}}
    hits = client.call("POST", f"/{index}/_search", {"query": both})["hits"]["hits"]
    # min_max normalization: the best hit of each subquery has score 1.
    assert hits[0]["_id"] == "a"
    assert hits[0]["_score"] == 1.0
    # The two-phase processor is active: it refuses a search that sorts.
    with pytest.raises(ResponseError, match="rescore"):
        client.call("POST", f"/{index}/_search", {"query": sparse, "sort": [{"_doc": "asc"}]})


def test_reciprocal_rank_fusion_scores_by_rank(client: Client, index: str) -> None:
    create(client, index, search=("rrf",), default=True)
    for doc_id, text in (("a", "river river"), ("b", "river")):
        client.call("PUT", f"/{index}/_doc/{doc_id}", {"text": text}, params={"refresh": "true"})
    legs = [{"match": {"text": "river"}}, {"term": {"text": "river"}}]
    hits = client.call("POST", f"/{index}/_search", {"query": {"hybrid": {"queries": legs}}})["hits"]["hits"]
    assert [hit["_score"] for hit in hits] == pytest.approx([2 / 61, 2 / 62])


def test_verify_bypasses_a_default_search_pipeline(client: Client, index: str, tmp_path: Path) -> None:
    create(client, index, search=("two-phase",), default=True)
    run = make_run(tmp_path / "run")
    into(client, index, run)
    assert verify(run.path, index=index, connection=Connection(client.address), sample=None).ok


def test_a_load_bypasses_the_default_ingest_pipeline(client: Client, index: str, tmp_path: Path) -> None:
    """The pipeline's model does not exist, so it fails for every document."""
    create(client, index, ingest="sparse-encoding", model_id="nowhere", default=True)
    assert show(client, index).ingest_pipeline == f"{index}-ingest"
    with pytest.raises(ResponseError):
        client.call("PUT", f"/{index}/_doc/a", {"text": "river"})
    run = make_run(tmp_path / "run")
    assert into(client, index, run).acknowledged == len(DOCUMENTS)
    assert ids_in(client, index) == set(DOCUMENTS)
    assert verify(run.path, index=index, connection=Connection(client.address), sample=None).ok


def test_a_load_that_replaces_the_index_keeps_its_pipelines(client: Client, index: str, tmp_path: Path) -> None:
    create(client, index, search=("two-phase",), ingest="text-chunking", model_id="nowhere", default=True)
    before = show(client, index)
    run = make_run(tmp_path / "run")
    into(client, index, run, replace=True)
    after = show(client, index)
    assert after.uuid != before.uuid
    for name in ("search_pipeline", "ingest_pipeline", "installed"):
        assert getattr(after, name) == getattr(before, name)
    mapping = indexes.find_index(client, index).mappings
    assert mapping["properties"]["passage_vectors"]["type"] == "nested"
    assert verify(run.path, index=index, connection=Connection(client.address), sample=None).ok
    assert sorted(drop(client, index).pipelines) == [f"{index}-ingest", f"{index}-search"]


def test_a_load_refuses_a_final_pipeline_that_encodes(client: Client, index: str, tmp_path: Path) -> None:
    create(client, index, ingest="sparse-encoding", model_id="nowhere")
    client.call("PUT", f"/{index}/_settings", {"index.final_pipeline": f"{index}-ingest"})
    with pytest.raises(ClusterError, match=r"final pipeline '.*-ingest', which encodes into 'sparse'"):
        into(client, index, make_run(tmp_path / "run"))
    client.call("PUT", f"/{index}/_settings", {"index.final_pipeline": None})


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
    ("options", "message"),
    [
        ({"search": ("hybrid", "rrf")}, "Pass one."),
        ({"search": ("neural-query-enricher",)}, "pass its --model-id"),
        ({"ingest": "sparse-encoding"}, "pass its --model-id"),
        ({"model_id": "m"}, "--model-id needs"),
        ({"default": True}, "--default needs"),
        ({"search": ("three-phase",)}, "Expected one of two-phase, neural-query-enricher, hybrid, rrf"),
    ],
)
def test_conflicting_options_are_refused_before_any_request(options, message) -> None:
    with pytest.raises(UsageError, match=message):
        create_index(
            "x", pipeline=Pipeline(), connection=Connection("http://127.0.0.1:1"), options=CreateOptions(**options)
        )


def test_two_phase_is_refused_for_a_sparse_vector_field() -> None:
    pipeline = Pipeline(index=IndexSettings(kind="sparse_vector"))
    with pytest.raises(PipelineError, match="searches rank_features fields"):
        create_index(
            "x", pipeline=pipeline, connection=Connection("http://127.0.0.1:1"), options=CreateOptions(("two-phase",))
        )


def test_an_existing_index_or_pipeline_is_not_changed(client: Client, index: str) -> None:
    theirs = {"request_processors": [], "description": "theirs"}
    client.call("PUT", address("search", f"{index}-search"), theirs)
    with pytest.raises(ClusterError, match=f"Another search pipeline '{index}-search' exists"):
        create(client, index, search=("two-phase",))
    assert indexes.find_index(client, index) is None
    assert found(client, "search", f"{index}-search") == theirs
    create(client, index)
    with pytest.raises(ClusterError, match="' exists"):
        create(client, index)


def test_pipelines_are_deleted_if_the_index_cannot_be_created(client: Client, index: str, tmp_path: Path) -> None:
    body = tmp_path / "body.json"
    properties = {"sparse": {"type": "rank_features"}, "x": {"type": "nonsense"}}
    body.write_text(json.dumps({"mappings": {"properties": properties}}))
    with pytest.raises(ResponseError, match="nonsense"):
        create(client, index, Pipeline(index=IndexSettings(body=str(body))), search=("two-phase",))
    assert found(client, "search", f"{index}-search") is None


def test_create_continues_after_it_was_killed_before_the_index_existed(client: Client, index: str) -> None:
    create(client, index, search=("two-phase",))
    client.call("DELETE", f"/{index}")
    create(client, index, search=("two-phase",))
    assert drop(client, index).pipelines == [f"{index}-search"]


def test_drop_deletes_the_index_and_its_own_pipelines(client: Client, index: str) -> None:
    create(client, index, search=("two-phase",), ingest="sparse-encoding", model_id="m", default=True)
    prompts: list[str] = []
    assert drop(client, index, sure=lambda message: bool(prompts.append(message))) is None
    assert prompts[0].startswith(f"Delete index {index!r} at {client.address} with 0 documents and its pipelines")
    report = drop(client, index)
    assert (report.pipelines, report.kept) == ([f"{index}-search", f"{index}-ingest"], [])
    assert indexes.find_index(client, index) is None
    assert found(client, "search", f"{index}-search") is None
    assert found(client, "ingest", f"{index}-ingest") is None
    with pytest.raises(ClusterError, match="There is no index or alias"):
        drop(client, index)


def test_drop_keeps_a_pipeline_that_was_changed_or_is_used_by_another_index(client: Client, index: str) -> None:
    create(client, index, search=("two-phase",), ingest="sparse-encoding", model_id="m")
    client.call("PUT", address("search", f"{index}-search"), {"request_processors": []})
    client.call("PUT", f"/{index}-other", {"settings": {"index.default_pipeline": f"{index}-ingest"}})
    report = drop(client, index)
    assert report.pipelines == []
    assert "another client replaced" in report.kept[0]
    assert f"{index}-other use it too" in report.kept[1]
    assert found(client, "search", f"{index}-search") == {"request_processors": []}
    assert found(client, "ingest", f"{index}-ingest") is not None


def test_drop_refuses_aliases_and_without_force_served_and_foreign_indexes(client: Client, index: str) -> None:
    create(client, index)
    client.call("POST", "/_aliases", {"actions": [{"add": {"index": index, "alias": f"{index}-alias"}}]})
    with pytest.raises(UsageError, match=f"is an alias of '{index}'"):
        drop(client, f"{index}-alias", force=True)
    with pytest.raises(ClusterError, match="whose searches would find nothing"):
        drop(client, index)
    client.call("PUT", f"/{index}-theirs")
    with pytest.raises(ClusterError, match="neither created nor loaded by sparse-ingest"):
        drop(client, f"{index}-theirs")
    assert drop(client, f"{index}-theirs", force=True) is not None
    assert drop(client, index, force=True) is not None


def test_a_red_index_is_dropped_only_with_force_and_its_count_is_unknown(client: Client, index: str) -> None:
    create(client, index)
    red, nowhere = f"{index}-red", {"index.routing.allocation.require.box": "none"}
    mappings = client.call("GET", f"/{index}/_mapping")[index]["mappings"]
    body = {"settings": nowhere, "mappings": mappings}
    client.call("PUT", f"/{red}", body, params={"wait_for_active_shards": "0"})
    with pytest.raises(ClusterError, match=r"cannot be counted \(.*To delete it anyway, pass --force"):
        drop(client, red)
    arguments = ["drop", "--index", red, "--yes", "--force", "--json", "--url", client.address]
    result = CliRunner().invoke(group, arguments)
    assert (result.exit_code, json.loads(result.stdout)["documents"]) == (0, None)
    assert indexes.find_index(client, red) is None


def test_an_index_that_load_created_can_be_dropped(client: Client, index: str, tmp_path: Path) -> None:
    into(client, index, make_run(tmp_path / "run"))
    assert drop(client, index).documents == len(DOCUMENTS)


def test_chunks_have_a_nested_field_that_source_excludes(client: Client, index: str) -> None:
    create(client, index, ingest="text-chunking", model_id="m")
    mapping = indexes.find_index(client, index).mappings
    assert mapping["properties"]["passage_vectors"]["type"] == "nested"
    assert set(mapping["_source"]["excludes"]) == {"sparse", "passage_vectors"}


def test_a_missing_plugin_is_named(client: Client, index: str) -> None:
    broken = {"request_processors": [{"no_such_processor": {}}], "description": "d"}
    with pytest.raises(ClusterError, match=r"refuses the search pipeline .*needs the neural-search plugin"):
        installed.install(client, Installed("search", f"{index}-search"), broken, index)


@pytest.mark.parametrize(
    ("rule", "value", "server"),
    [("max_ratio", 0.2, "max_ratio"), ("top_k", 5, "top_k"), ("min_weight", 0.5, "abs_value"),
     ("alpha_mass", 0.9, "alpha_mass")],
)  # fmt: skip
def test_the_server_accepts_each_pruning_rule(client: Client, index: str, rule: str, value: float, server: str) -> None:
    encode = EncodeSettings(**{rule: value})
    report = create(client, index, Pipeline(encode=encode), ingest="sparse-encoding", model_id="m")
    body = found(client, "ingest", report.ingest_pipeline)
    [encoding] = [one["sparse_encoding"] for one in body["processors"] if "sparse_encoding" in one]
    assert (encoding["prune_type"], encoding["prune_ratio"]) == (server, value)


def test_without_pipelines_no_cluster_permission_is_needed(opensearch_url: str, index_name: str) -> None:
    with secure_proxy(opensearch_url, cluster_rights=False) as proxy:
        connection = Connection(proxy.url)
        create_index(index_name, pipeline=Pipeline(), connection=connection)
        assert show_index(index_name, connection=connection).ours
        assert drop_index(index_name, connection=connection, **YES).documents == 0


def test_drop_keeps_a_pipeline_if_it_may_not_see_other_indexes(client: Client, opensearch_url: str, index: str) -> None:
    create(client, index, search=("two-phase",))
    forbidden = {"error": {"type": "security_exception", "reason": "no permissions for [indices:monitor/settings/get]"}}
    with secure_proxy(opensearch_url, check=lambda one: (403, forbidden) if "/_all/" in one.path else None) as proxy:
        report = drop_index(index, connection=Connection(proxy.url), **YES)
    assert report.pipelines == []
    assert "was kept: " in report.kept[0]
    assert "grant the right" in report.kept[0]
    assert indexes.find_index(client, index) is None


def test_the_commands_print_json_and_drop_asks_for_confirmation(client: Client, index: str) -> None:
    def run(*arguments: str):
        return CliRunner().invoke(group, [*arguments, "--index", index, "--url", client.address], standalone_mode=False)

    created = json.loads(run("create", "--search-pipeline", "two-phase", "--json").stdout)
    assert created["search_pipeline"] == f"{index}-search"
    assert json.loads(run("show", "--json").stdout)["installed"] == [f"{index}-search"]
    assert f"installed  {index}-search" in run("show").stdout
    unanswered = run("drop")
    assert isinstance(unanswered.exception, UsageError)
    assert "pass --yes" in str(unanswered.exception)
    assert f"was deleted, with 0 documents.\nIts pipelines were deleted: {index}-search." in run("drop", "--yes").stdout


def test_the_stamp_of_a_load_and_the_record_of_create_are_both_kept(client: Client, index: str, tmp_path: Path) -> None:
    create(client, index, search=("two-phase",))
    into(client, index, make_run(tmp_path / "run"))
    there = indexes.find_index(client, index)
    assert there.stamp is not None
    assert replace(there.stamp, load="done").created_by is None
    assert installed.made_of(there) == [Installed("search", f"{index}-search")]
