"""Kept fields: `load` maps each of them, so that searches can filter by it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support.forked import command
from support.loads import StopBefore, into, stamped
from support.reporters import Recorder
from support.runs import make_run

from sparse_ingest.cluster import indexes
from sparse_ingest.cluster.client import Client, Connection
from sparse_ingest.cluster.index_admin import create_index, show_index
from sparse_ingest.cluster.kept_fields import MAX_FIELDS, KeptFields
from sparse_ingest.cluster.search_bodies import Engine
from sparse_ingest.errors import ClusterError, Interrupted, RunError, UsageError
from sparse_ingest.loading.publish import publish
from sparse_ingest.pipeline import IndexSettings, Pipeline, read_pipeline
from sparse_ingest.runs.run import Run
from sparse_ingest.searching.index_search import rank_index, search_hybrid, search_index
from sparse_ingest.searching.search import open_index
from sparse_ingest.verification.verify import verify

SHOP: dict[str, dict[str, Any]] = {
    "1": {"text": "red shoes", "category": "shoes", "price": "27.99", "zip": "00501", "day": "2026-01-05", "left": 3,
          "open": True, "tags": ["a", "b"], "deep": {"a": {"b": [1, [2]]}}, "mixed": 1, "big": 2**70},
    "2": {"text": "blue shoes", "category": "shoes", "price": "-3", "zip": "10001", "day": "2026-02-05T10:00:00Z",
          "left": None, "open": False, "tags": [], "deep": {"a": {"c": "x"}}, "mixed": {"a": 1}, "bad": {"": 1}},
    "3": {"text": "a chair", "category": "chairs", "price": "5", "zip": "94110", "day": "2025-12-31", "left": 40,
          "open": True, "tags": "b", "long": "x" * 300},
}  # fmt: skip
TYPES = {
    "category": "keyword", "price": "double", "zip": "keyword", "day": "date", "left": "long", "open": "boolean",
    "tags": "keyword", "deep.a.b": "long", "deep.a.c": "keyword", "mixed": None, "big": "keyword", "bad": None,
    "long": "keyword",
}  # fmt: skip
FILTERS: list[tuple[dict[str, Any], set[str]]] = [
    ({"term": {"category": "shoes"}}, {"1", "2"}),
    ({"range": {"price": {"gt": 4}}}, {"1", "3"}),
    ({"term": {"zip": "00501"}}, {"1"}),
    ({"range": {"day": {"gte": "2026-01-01"}}}, {"1", "2"}),
    ({"term": {"left": 40}}, {"3"}),
    ({"term": {"open": True}}, {"1", "3"}),
    ({"term": {"tags": "b"}}, {"1", "3"}),
    ({"term": {"deep.a.b": 2}}, {"1"}),
    ({"term": {"big": str(2**70)}}, {"1"}),
]


def run_of(folder: Path, fields: dict[str, dict[str, Any]], **settings: Any) -> Run:
    return make_run(folder, {doc_id: {"river": 1.0} for doc_id in fields}, fields=fields, shard_rows=2, **settings)


def mapped(client: Client, index: str) -> dict[str, str]:
    """Return the types of the fields in an index other than text, title and the vector."""
    properties = client.call("GET", f"/{index}")[index]["mappings"]["properties"]
    return {name: entry.get("type", "object") for name, entry in properties.items()
            if name not in ("title", "text", "parent", "sparse")}  # fmt: skip


def found(client: Client, index: str, query: dict[str, Any]) -> set[str]:
    return {hit["_id"] for hit in client.call("POST", f"/{index}/_search", {"query": query})["hits"]["hits"]}


def test_every_kept_field_is_mapped_and_reported_and_source_is_unchanged(
    client: Client, index_name: str, tmp_path: Path
) -> None:
    recorder = Recorder()
    assert into(client, index_name, run_of(tmp_path / "run", SHOP), progress=recorder).refused == 0
    assert stamped(client, index_name).fields == TYPES
    assert show_index(index_name, connection=Connection(client.address)).fields == TYPES
    assert [found(client, index_name, query) for query, _ in FILTERS] == [ids for _, ids in FILTERS]
    assert client.call("GET", f"/{index_name}/_doc/1")["_source"] == SHOP["1"]
    notes = "\n".join(recorder.notes)
    for words in ("price (double, from strings)", "day (date, from strings)", "category (keyword)",
                  "zip ('00501' is not how that number is printed)", f"big ({2**70} is over 64 bits)",
                  "Values too long for a keyword", "matches them: long (1)",
                  "mixed (it has objects and other values)", 'bad (it has a field "" (an empty name))'):  # fmt: skip
        assert words in notes


def test_a_field_without_values_is_mapped_and_reported(client: Client, index_name: str, tmp_path: Path) -> None:
    recorder = Recorder()
    into(client, index_name, run_of(tmp_path / "run", {"1": {"a": None}}), progress=recorder)
    assert stamped(client, index_name).fields == {"a": "keyword"}
    assert any("No document has a value of: a." in note for note in recorder.notes)


def test_a_declared_type_overrides_the_found_one_and_the_flag_overrides_the_file(
    client: Client, index_name: str, tmp_path: Path
) -> None:
    path = tmp_path / "pipeline.toml"
    path.write_text('[index.fields]\nprice = "long"\nleft = "text"\ndeep.a.b = "float"\ntitle = "keyword"\n')
    pipeline, run = read_pipeline(str(path)), run_of(tmp_path / "run", SHOP)
    with pytest.raises(RunError, match=r'\'price\' does not fit the type long, which is declared .*"1": "27.99"'):
        into(client, index_name, run, pipeline=pipeline)
    assert indexes.find_index(client, index_name) is None
    recorder = Recorder()
    into(client, index_name, run, pipeline=pipeline, fields={"price": "float"}, progress=recorder)
    assert not any("No document has a declared field" in note for note in recorder.notes), "all have a title"
    fields = stamped(client, index_name).fields or {}
    assert [fields[name] for name in ("price", "left", "deep.a.b", "category")] == ["float", "text", "float", "keyword"]
    there = client.call("GET", f"/{index_name}")[index_name]["mappings"]["properties"]
    assert there["title"]["type"] == "keyword"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"price": "flaot"}, "expected .* keyword, text, integer"),
        ({"sparse.x": "keyword"}, "is the sparse field"),
        ({"_id": "keyword"}, "a metadata field"),
        ({"text.raw": "keyword"}, "a part of its name is text"),
        ({"a.b": "keyword", "a": "keyword"}, "it has the field 'b'"),
    ],
)
def test_an_invalid_declaration_is_refused(
    client: Client, index_name: str, tmp_path: Path, fields: Any, message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        into(client, index_name, run_of(tmp_path / "run", SHOP), fields=fields)
    assert indexes.find_index(client, index_name) is None


def test_a_resumed_load_changes_no_type(client: Client, index_name: str, tmp_path: Path) -> None:
    values: list[Any] = [1, 2.5, 3, 4, "x", 6]
    fields = {str(place): {"a": value, "b": place} for place, value in enumerate(values)}
    run = run_of(tmp_path / "run", fields)
    with pytest.raises(Interrupted):
        into(client, index_name, run, progress=StopBefore(1))
    assert stamped(client, index_name).fields == {"a": "keyword", "b": "long"}
    recorder = Recorder()
    assert into(client, index_name, run, progress=recorder).acknowledged == 6
    assert stamped(client, index_name).fields == {"a": "keyword", "b": "long"}
    assert mapped(client, index_name) == {"a": "keyword", "b": "long"}
    assert not [note for note in recorder.notes if "fields" in note]


@pytest.mark.parametrize("later", [{"m": {"x": 2}}, {"m": 5, "new": "z"}], ids=str)
def test_a_partial_load_keeps_its_types_and_maps_what_comes_later(
    client: Client, index_name: str, tmp_path: Path, later: dict[str, Any]
) -> None:
    run = run_of(tmp_path / "run", {"1": {"a": 1}, "2": {"m": 1}, "3": later}, complete=False)
    done = run.path / "done" / "part-00001.json"
    content = done.read_bytes()
    done.unlink()
    into(client, index_name, run, partial=True)
    done.write_bytes(content)
    if "new" in later:
        into(client, index_name, run, partial=True)
        assert stamped(client, index_name).fields == {"a": "long", "m": "long", "new": "keyword"}
        return
    with pytest.raises(RunError, match=r"'m' does not fit the type long, which index .* maps .*\"3\": ..x.: 2"):
        into(client, index_name, run, partial=True)
    assert stamped(client, index_name).fields == {"a": "long", "m": "long"}


def test_loading_into_a_filled_index_adds_new_fields_and_checks_values_of_mapped_ones(
    client: Client, index_name: str, tmp_path: Path
) -> None:
    into(client, index_name, run_of(tmp_path / "one", {"1": {"price": 5, "mixed": 1}, "2": {"mixed": {"a": 1}}}))
    recorder = Recorder()
    more = run_of(tmp_path / "two", {"3": {"price": 6, "color": "red", "mixed": 7}}, more="2")
    into(client, index_name, more, progress=recorder)
    assert stamped(client, index_name).fields == {"price": "long", "mixed": None, "color": "keyword"}
    assert mapped(client, index_name) == {"price": "long", "color": "keyword"}
    assert any("Adding to the mapping of index" in note and "color" in note for note in recorder.notes)
    for value in (27.99, "x", True, {"a": 1}):
        with pytest.raises(RunError, match="'price' does not fit the type long, which index"):
            into(client, index_name, run_of(tmp_path / repr(value), {"4": {"price": value}}, more=repr(value)))
    with pytest.raises(ClusterError, match="maps 'price' as long, but float is declared"):
        into(client, index_name, more, fields={"price": "float"})
    assert found(client, index_name, {"range": {"price": {"gte": 5}}}) == {"1", "3"}


def test_an_index_of_another_client_keeps_its_mapping_and_gets_missing_fields(
    client: Client, index_name: str, tmp_path: Path
) -> None:
    properties = {"sparse": {"type": "rank_features"}, "category": {"type": "text"}, "price": {"type": "float"},
                  "where": {"type": "geo_point"}, "deep": {"properties": {"a": {"enabled": False}}},
                  "left": {"type": "byte", "ignore_malformed": True},
                  "parts": {"type": "nested", "properties": {"a": {"type": "long"}}}}  # fmt: skip
    client.call("PUT", f"/{index_name}", {"mappings": {"dynamic": "strict", "properties": properties}})
    fields = {"1": {"category": "shoes", "price": 27.99, "where": [1.5, 2.5], "deep": {"a": {"b": 1}}, "left": 1000,
                    "day": "2026-01-05", "parts": [{"a": 1, "b": "x"}, {"a": 2, "b": "y"}],
                    "title": "Red", "text": "Red shoes"}}  # fmt: skip
    assert into(client, index_name, run_of(tmp_path / "run", fields)).refused == 0
    types = {
        "category": "text",
        "price": "float",
        "where": "geo_point",
        "deep": "object",
        "left": "byte",
        "day": "date",
        "parts": "nested",
    }
    assert mapped(client, index_name) == types
    for name in ("title", "text"):
        assert found(client, index_name, {"match": {name: "red"}}) == {"1"}
    inner = {"bool": {"filter": [{"term": {"parts.a": 2}}, {"term": {"parts.b": "y"}}]}}
    assert found(client, index_name, {"nested": {"path": "parts", "query": inner}}) == {"1"}


@pytest.mark.parametrize("carried", [{}, {"text": "a"}, {"title": "a", "price": 5}], ids=str)
def test_a_strict_mapping_gets_only_the_fields_that_documents_have(
    client: Client, index_name: str, tmp_path: Path, carried: dict[str, Any]
) -> None:
    mapping = {"dynamic": "strict", "properties": {"sparse": {"type": "rank_features"}}}
    client.call("PUT", f"/{index_name}", {"mappings": mapping})
    recorder = Recorder()
    assert into(client, index_name, run_of(tmp_path / "run", {"1": carried}), progress=recorder).refused == 0
    properties = client.call("GET", f"/{index_name}")[index_name]["mappings"]["properties"]
    assert properties.keys() == {"sparse", *carried}
    assert any("Adding to the mapping" in note for note in recorder.notes) == bool(carried)
    assert KeptFields([], mapping, {}).is_needed, "a run that keeps no field may have texts"


def test_the_templates_of_a_strict_mapping_map_title_and_text(client: Client, index_name: str, tmp_path: Path) -> None:
    template = {"match": "t*", "mapping": {"type": "keyword"}}
    mapping = {"dynamic": "strict_allow_templates", "dynamic_templates": [{"words": template}]}
    properties = {"sparse": {"type": "rank_features"}}
    client.call("PUT", f"/{index_name}", {"mappings": mapping | {"properties": properties}})
    assert into(client, index_name, run_of(tmp_path / "run", {"1": {"title": "a", "text": "b c"}})).refused == 0
    assert found(client, index_name, {"term": {"text": "b c"}}) == {"1"}
    properties = client.call("GET", f"/{index_name}")[index_name]["mappings"]["properties"]
    assert [properties[name]["type"] for name in ("title", "text")] == ["keyword", "keyword"]


@pytest.mark.elasticsearch_only
def test_fields_with_dotted_names_in_the_mapping_are_found_and_checked(
    client: Client, index_name: str, tmp_path: Path
) -> None:
    properties = {"ml.sparse": client.dialect.field_entry(), "deep.b": {"type": "byte"}}
    client.call("PUT", f"/{index_name}", {"mappings": {"subobjects": False, "properties": properties}})
    run = run_of(tmp_path / "run", {"1": {"deep": {"a": 5, "b": 1}}, "2": {"deep.a": 7}})
    assert into(client, index_name, run, field="ml.sparse").refused == 0
    assert verify(run, index=index_name, url=client.address).ok
    with open_index(index_name, url=client.address) as index:
        hits = index.search({"river": 1.0}, filter={"range": {"deep.a": {"gt": 5}}})
    assert [hit.id for hit in hits] == ["2"]
    more = run_of(tmp_path / "more", {"3": {"deep": {"a": 8}}}, more="2")
    assert into(client, index_name, more, field="ml.sparse").refused == 0
    for name, value in (("a", "x"), ("b", 1000)):
        with pytest.raises(RunError, match=f"'deep.{name}' does not fit the type (long|byte), which index"):
            into(
                client,
                index_name,
                run_of(tmp_path / name, {"4": {"deep": {name: value}}}, more=name),
                field="ml.sparse",
            )


@pytest.mark.parametrize("dynamic", [False, "strict"])
def test_the_mapping_of_an_index_loaded_by_an_older_release_is_not_changed(
    client: Client, index_name: str, tmp_path: Path, dynamic: bool | str
) -> None:
    run = run_of(tmp_path / "run", {"1": {"a": 1, "text": "b"}})
    into(client, index_name, run)
    there = indexes.find_index(client, index_name)
    assert there is not None
    client.call("DELETE", f"/{index_name}")
    meta = there.mappings["_meta"]
    del meta["sparse_ingest"]["fields"]
    properties = {"sparse": {"type": "rank_features"}}
    client.call("PUT", f"/{index_name}", {"mappings": {"dynamic": dynamic, "_meta": meta, "properties": properties}})
    recorder = Recorder()
    assert into(client, index_name, run, progress=recorder).acknowledged == (0 if dynamic else 1)
    assert client.call("GET", f"/{index_name}")[index_name]["mappings"]["properties"].keys() == {"sparse"}
    assert any("did not map kept fields, so these are not mapped: a." in note for note in recorder.notes)
    assert stamped(client, index_name).fields == {"a": None}


def test_since_keeps_types_and_update_sends_no_fields(client: Client, index_name: str, tmp_path: Path) -> None:
    old = run_of(tmp_path / "old", {"1": {"a": 1}, "2": {"a": 2}})
    new = run_of(tmp_path / "new", {"1": {"a": 1}, "2": {"a": 3, "b": True}}, more="new")
    into(client, index_name, old)
    into(client, index_name, new, since=old.path)
    assert stamped(client, index_name).fields == {"a": "long", "b": "boolean"}
    assert found(client, index_name, {"term": {"a": 3}}) == {"2"}
    wrong = run_of(tmp_path / "wrong", {"1": {"a": "x"}}, more="wrong")
    with pytest.raises(RunError, match="'a' does not fit the type long"):
        into(client, index_name, wrong, since=new.path)
    with pytest.raises(UsageError, match="--map is for kept fields"):
        into(client, index_name, wrong, update=True, fields={"a": "long"})


def test_a_published_index_and_one_that_was_created_empty_have_the_types(
    client: Client, index_name: str, tmp_path: Path
) -> None:
    run, connection = run_of(tmp_path / "run", SHOP), Connection(client.address)
    published = publish(run.path, alias=index_name, connection=connection, fields={"price": "float"})
    assert (stamped(client, published.load.index).fields or {})["price"] == "float"
    empty = f"{index_name}-empty"
    fields: Any = {"price": "float", "deep.a.b": "integer", "long": "keyword"}
    create_index(empty, connection=connection, pipeline=Pipeline(index=IndexSettings(fields=fields)))
    assert mapped(client, empty) == {"price": "float", "deep": "object", "long": "keyword"}
    recorder = Recorder()
    into(client, empty, run, progress=recorder)
    assert stamped(client, empty).fields == TYPES | fields
    assert any("matches them: long (1)" in note for note in recorder.notes)
    assert [found(client, empty, query) for query, _ in FILTERS] == [ids for _, ids in FILTERS]


def test_objects_with_unbounded_keys_are_not_mapped_and_their_documents_are_loaded(
    client: Client, index_name: str, tmp_path: Path
) -> None:
    deep: Any = 1
    for _ in range(25):
        deep = {"a": deep}
    wide = {f"key{number}": number for number in range(MAX_FIELDS + 1)}
    recorder = Recorder()
    run = run_of(tmp_path / "run", {"1": {"wide": wide, "deep": deep, "fine": {"x.y": 1}}})
    assert into(client, index_name, run, progress=recorder).refused == 0
    types = {"wide": None, "deep": None, "fine.x.y": "long"}
    assert stamped(client, index_name).fields == types
    assert any(f"wide (it has more than {MAX_FIELDS} fields)" in note for note in recorder.notes)
    for number, fine in enumerate(({"x": {"y": 2, "z": deep}}, {"x": {"y": 3}} | wide)):
        more = run_of(tmp_path / f"{number}", {f"{2 * number}": {"fine": fine}}, more=f"{number}")
        assert into(client, index_name, more, progress=recorder).refused == 0
        assert stamped(client, index_name).fields == types | {"fine.x.z": None}
    assert any(f"fine (it has more than {MAX_FIELDS} fields)" in note for note in recorder.notes)
    assert found(client, index_name, {"range": {"fine.x.y": {"lt": 5}}}) == {"0", "1", "2"}


@pytest.mark.parametrize(
    ("carried", "message"),
    [
        ({"_id": 5}, '"_id" .a metadata field'),
        ({"a..b": 5}, "nothing between or before its dots"),
        ({"sparse.y": 1}, "carry a field 'sparse'"),
        ({"sparse.": {"y": 1}}, "carry a field 'sparse'"),
        ({"title.x": 1}, "'title' does not fit the type text"),
        ({"lists": json.loads("[" * 21 + "]" * 21)}, "lists in more than 20 levels"),
    ],
)
def test_documents_that_the_server_would_refuse_are_reported_before_sending(
    client: Client, index_name: str, tmp_path: Path, carried: dict[str, Any], message: str
) -> None:
    with pytest.raises(RunError, match=message):
        into(client, index_name, run_of(tmp_path / "run", {"one": carried}))
    assert indexes.find_index(client, index_name) is None


def test_a_kept_field_inside_a_mapped_one_is_a_conflict_of_the_documents_that_have_it() -> None:
    kept = KeptFields(["host.name"], {"properties": {"host": {"type": "keyword"}}}, {})
    assert kept.read(["one"], ['{"text": "a"}']) == []
    ((rule, example),) = kept.read(["two"], ['{"host.name": "a"}'])
    assert "'host' does not fit the type keyword" in rule
    assert example == '"two": "a"'


def test_the_command_takes_types(client: Client, index_name: str, tmp_path: Path) -> None:
    run, url = run_of(tmp_path / "run", SHOP), ("--url", client.address)
    for wrong, text in ((("--map", "price"), "'price' is not FIELD=TYPE"), (("--map", "a=b"), "'b'; expected one of"),
                        (("--map", "a=long", "--map", "a=text"), "'a' is long and text")):  # fmt: skip
        answer = command("load", run.path, "--index", index_name, *wrong, *url)
        assert (answer.code, text in answer.err) == (2, True), answer.err
    assert command("load", run.path, "--index", index_name, "--map", "price=float", *url).code == 0
    assert mapped(client, index_name)["price"] == "float"


def test_a_filter_on_an_unmapped_field_is_refused_with_every_engine(
    client: Client, index_name: str, tmp_path: Path
) -> None:
    into(client, index_name, run_of(tmp_path / "run", SHOP))
    weights, unknown = {"river": 1.0}, {"bool": {"filter": [{"range": {"prise": {"gt": 1}}}]}}
    for ask in (
        lambda: search_index(client, index_name, weights, size=5, filter=unknown),
        lambda: search_index(client, index_name, weights, size=5, engine=Engine("two-phase"), filter=unknown),
        lambda: search_index(client, index_name, weights, size=5, collapse="prise"),
        lambda: search_hybrid(client, index_name, "red", weights, size=5, filter=unknown),
        lambda: list(rank_index(client, index_name, [("q", weights)], Engine(), size=5, filter=unknown)),
    ):
        with pytest.raises(UsageError, match=r"'prise' of .* Mapped fields: .*price \(double\)"):
            ask()
    hits = search_index(client, index_name, weights, size=5, filter={"range": {"price": {"gt": 1}}})
    assert {hit.id for hit in hits} == {"1", "3"}


def test_a_run_without_kept_fields_has_no_types(client: Client, index_name: str, tmp_path: Path) -> None:
    into(client, index_name, run_of(tmp_path / "run", {"1": {"text": "a"}}))
    assert stamped(client, index_name).fields == {}
