"""The Python API: encode rows in memory, load, search, evaluate and plan, with the results of the command line."""

from __future__ import annotations

import json
import multiprocessing
import pickle
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import datasets
import numpy as np
import opensearchpy
import pandas as pd
import polars
import pyarrow as pa
import pytest
from support.forked import command
from support.kept_models import keep_models
from support.reporters import Recorder
from support.run_contents import contents

import sparse_ingest as si

MODEL = "package:cognition/model"
TEXTS = ("bread is baked with yeast", "a river of stone", "sugar feeds the yeast", "how to catch an exception", "")
ROWS = [
    {"_id": f"d{number}", "title": f"part {number}", "text": TEXTS[number % 5], "lang": "en" if number % 2 else "de"}
    for number in range(20)
]
QUESTION = "how does bread rise with yeast"
OPTIONS: dict[str, Any] = {"model": MODEL, "dtype": "float32", "device": "cpu", "keep": ["lang"], "shard_rows": 8}


def write_corpus(folder: Path, rows: list[dict[str, Any]] = ROWS) -> Path:
    path = folder / "corpus.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def table(rows: list[dict[str, Any]] = ROWS) -> pa.Table:
    return pa.Table.from_pylist(rows)


CONTAINERS = {
    "list": lambda: ROWS,
    "generator": lambda: (row for row in ROWS),
    "pandas": lambda: pd.DataFrame(ROWS),
    "polars": lambda: polars.DataFrame(ROWS),
    "arrow": table,
    "reader": lambda: table().to_reader(max_chunksize=3),
    "dataset": lambda: datasets.Dataset.from_list(ROWS),
}


@pytest.fixture(scope="module", autouse=True)
def _kept_models() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        keep_models(patch)
        yield


@pytest.fixture(scope="module")
def file_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that `sparse-ingest encode` writes for the same rows in a file."""
    folder = tmp_path_factory.mktemp("file")
    answer = command("encode", "--model", MODEL, "--corpus", write_corpus(folder), "--out", folder / "run", "--dtype",
                     "float32", "--device", "cpu", "--keep", "lang", "--shard-rows", 8)  # fmt: skip
    assert answer.code == 0, answer.err
    return folder / "run"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> si.SearchableRun:
    return si.encode(ROWS, tmp_path_factory.mktemp("memory") / "run", **OPTIONS)


@pytest.fixture
def loaded(run: si.SearchableRun, opensearch_url: str, index_name: str) -> Iterator[si.SearchableIndex]:
    si.load(run, index=index_name, url=opensearch_url)
    with si.open_index(index_name, url=opensearch_url) as index:
        yield index


# encode


# tests/corpora/test_memory_corpora.py compares the documents of every container.
@pytest.mark.parametrize(
    "kind",
    [
        "generator",
        "pandas",
        *(pytest.param(one, marks=pytest.mark.slow) for one in ("list", "polars", "arrow", "reader", "dataset")),
    ],
)
def test_rows_in_memory_give_the_same_shards_as_in_a_file(
    kind: str, file_run: Path, run: si.SearchableRun, tmp_path: Path
) -> None:
    encoded = si.encode(CONTAINERS[kind](), tmp_path / "run", **OPTIONS)
    assert contents(encoded.path / "shards") == contents(file_run / "shards")
    assert encoded.manifest.run_id == run.manifest.run_id != si.open_run(file_run).manifest.run_id
    assert encoded.manifest.identity["corpus"] == [{"name": "memory", "rows": 20, "sha256": rows_sha256(run)}]
    # Encoding the same rows again finds the run complete.
    again = Recorder()
    si.encode(CONTAINERS[kind](), tmp_path / "run", progress=again, **OPTIONS)
    assert again.notes == []
    assert again.done == 20


def rows_sha256(run: si.SearchableRun) -> str:
    return run.manifest.identity["corpus"][0]["sha256"]


def test_other_rows_in_the_same_run_folder_are_refused(run: si.SearchableRun) -> None:
    with pytest.raises(si.RunError, match="sha256"):
        si.encode(ROWS[:-1], run.path, **OPTIONS)


@pytest.mark.parametrize(
    "kind", ["list of paths", "folder", *(pytest.param(one, marks=pytest.mark.slow) for one in ("text", "path"))]
)
def test_files_are_given_as_on_the_command_line(kind: str, file_run: Path, tmp_path: Path) -> None:
    file = write_corpus(tmp_path)
    named = {"text": str(file), "path": file, "list of paths": [file], "folder": tmp_path}[kind]
    encoded = si.encode(named, tmp_path.parent / f"{tmp_path.name}-run", **OPTIONS)
    assert encoded.manifest.run_id == si.open_run(file_run).manifest.run_id
    assert contents(encoded.path / "shards") == contents(file_run / "shards")


def test_encode_and_open_run_return_the_same(run: si.SearchableRun) -> None:
    opened = si.open_run(str(run.path))
    assert type(opened) is type(run) is si.SearchableRun
    assert opened.report == run.report
    assert (run.report.rows, run.report.shards, run.report.skipped) == (20, 3, 0)
    assert run.report.to_dict()["run_id"] == run.manifest.run_id
    assert "20 rows" in repr(run)


def test_threads_can_encode_in_parallel(run: si.SearchableRun, tmp_path: Path) -> None:
    with ThreadPoolExecutor(3) as pool:
        encoded = list(pool.map(lambda number: si.encode(ROWS, tmp_path / f"run{number}", **OPTIONS), range(3)))
    for one in encoded:
        assert contents(one.path / "shards") == contents(run.path / "shards")


def test_a_bad_row_is_reported_with_its_position_or_skipped(tmp_path: Path) -> None:
    rows = [*ROWS[:2], {"_id": "broken", "text": 3}, *ROWS[2:]]
    with pytest.raises(si.CorpusError, match=r'^memory: row 3: the text in "text" is 3'):
        si.encode(rows, tmp_path / "run", **OPTIONS)
    skipping = si.encode(rows, tmp_path / "skipping", on_bad_document="skip", **OPTIONS)
    assert (skipping.report.rows, skipping.report.skipped) == (20, 1)


def test_options_are_keywords_or_an_options_object(tmp_path: Path, run: si.SearchableRun) -> None:
    settings = {name: value for name, value in OPTIONS.items() if name != "model"} | {"keep": ("lang",)}
    encoded = si.encode(ROWS, tmp_path / "run", model=MODEL, options=si.EncodeOptions(**settings))
    assert contents(encoded.path / "shards") == contents(run.path / "shards")
    with pytest.raises(si.UsageError, match=r"pass options= or keywords such as top_k="):
        si.encode(ROWS, tmp_path / "no", model=MODEL, options=si.EncodeOptions(), top_k=3)
    with pytest.raises(si.UsageError, match=r"encode\(\): unknown key topk; known here: .*top_k"):
        si.encode(ROWS, tmp_path / "no", model=MODEL, topk=3)
    with pytest.raises(si.UsageError, match=r"top_k = 'three'; expected an integer"):
        si.encode(ROWS, tmp_path / "no", model=MODEL, top_k="three")
    with pytest.raises(si.UsageError, match="No model"):
        si.encode(ROWS, tmp_path / "no")
    assert not (tmp_path / "no").exists()


def test_a_pipeline_gives_the_model_and_keywords_override_it(tmp_path: Path, run: si.SearchableRun) -> None:
    pipeline = si.Pipeline(model=si.ModelSettings(document=MODEL), encode=si.EncodeSettings(dtype="float32", top_k=3))
    options = {name: value for name, value in OPTIONS.items() if name not in ("model", "dtype")}
    pruned = si.encode(ROWS, tmp_path / "run", pipeline=pipeline, **options)
    assert pruned.manifest.identity["top_k"] == 3
    assert 0 < pruned.report.terms <= 3 * 20 < run.report.terms
    overridden = si.encode(ROWS, tmp_path / "overridden", pipeline=pipeline, top_k=2, **options)
    assert overridden.manifest.identity["top_k"] == 2


def test_a_dry_run_writes_nothing(tmp_path: Path) -> None:
    found = si.dry_run(ROWS, model=MODEL)
    assert (found.rows, found.bad, found.empty) == (20, 0, 0)
    assert found.tokens is not None
    assert list(tmp_path.iterdir()) == []


# search


def test_searching_a_run_gives_the_hits_of_the_command_line(run: si.SearchableRun) -> None:
    answer = command("search", "--run", run.path, "--json", "-k", 3, QUESTION)
    printed = json.loads(answer.out)["hits"]
    hits = run.search(QUESTION, k=3)
    assert [(hit.id, hit.score, hit.fields) for hit in hits] == [
        (hit["id"], hit["score"], hit["fields"]) for hit in printed
    ]
    assert [[term._asdict() for term in hit.terms] for hit in hits] == [hit["terms"] for hit in printed]
    assert run.search(run.query_weights(QUESTION), k=3) == hits
    assert run.search(MappingProxyType(run.query_weights(QUESTION)), k=3) == hits


def test_searching_an_index_gives_the_hits_of_the_command_line(loaded: si.SearchableIndex, opensearch_url: str) -> None:
    target_options = ("--index", loaded.name, "--url", opensearch_url)
    printed = json.loads(
        command("search", *target_options, "--json", "--filter", '{"match": {"title": "part 2"}}', QUESTION).out
    )
    hits = loaded.search(QUESTION, k=10, filter={"match": {"title": "part 2"}})
    assert hits
    assert [(hit.id, hit.score) for hit in hits] == [(hit["id"], hit["score"]) for hit in printed["hits"]]
    hybrid = json.loads(command("search", *target_options, "--json", "--hybrid", QUESTION).out)["hits"]
    assert [hit.id for hit in loaded.search(QUESTION, hybrid=True)] == [hit["id"] for hit in hybrid]


def test_run_and_index_give_the_same_scores(run: si.SearchableRun, loaded: si.SearchableIndex) -> None:
    run_scores = {hit.id: hit.score for hit in run.search(QUESTION, k=20, stored=True)}
    assert {hit.id: hit.score for hit in loaded.search(QUESTION, k=20)} == run_scores


def test_an_invalid_query_or_filter_is_named(run: si.SearchableRun, loaded: si.SearchableIndex) -> None:
    searches = [call for one in (run, loaded) for call in (one.search, partial(one.explain, doc_id="d1"))]
    for given in (["bread"], None, si.SparseEncoder(MODEL).encode_query(["bread"])):
        for search in searches:
            with pytest.raises(si.UsageError, match="expected a text, or a mapping from tokens to weights"):
                search(given)
    with pytest.raises(si.UsageError, match="cannot be written as JSON: .* Use only lists"):
        loaded.search(QUESTION, filter={"terms": {"lang": {"en"}}})
    for several in ({}, {"exists": {"field": "lang"}, "term": {"lang": "en"}}):
        with pytest.raises(si.UsageError, match="filter must be one query"):
            loaded.search(QUESTION, filter=several)


def test_wrong_arguments_are_named(run: si.SearchableRun) -> None:
    calls: dict[str, Callable[[], object]] = {
        "has no field 'language' for collapse; it has title, text, lang": lambda: run.search("a", collapse="language"),
        "collapse is for the search of one query": lambda: run.rank([], collapse="lang"),
        "concurrency needs a server": lambda: run.rank([], concurrency=2),
        "SearchOptions: k = -1; expected an integer above zero": lambda: run.search("a", si.SearchOptions(k=-1)),
        "Pipeline: query.top_k = -3": lambda: si.open_run(run, pipeline=si.Pipeline(query=si.QuerySettings(top_k=-3))),
        "Pipeline: encode.top_k = -1": lambda: si.SparseEncoder(si.Pipeline(encode=si.EncodeSettings(top_k=-1))),
        "One of the queries is 'bread'; expected Query": lambda: list(run.rank(["bread"])),
        r"The text of a query is 'bread \\ud800'": lambda: run.search("bread \ud800"),
        "The text of a query is 5": lambda: run.query_weights(5),
        "The document id is 5; expected a string": lambda: run.explain("a", 5),
        "The document id is ''": lambda: run.show("d1", ""),
        "model is int; expected a hub id": lambda: si.open_run(run, model=5),
        "pipeline is 5; expected a file": lambda: si.open_run(run, pipeline=5),
        "connection= is str; expected a Connection": lambda: si.open_index("a", connection="http://127.0.0.1:1"),
        "progress is 'yes'; expected True, False or a Reporter": lambda: si.open_run(run, progress="yes"),
        "port = 99999; expected a number from 0 to 65535": lambda: si.serve(run, port=99999),
        "SearchOptions: k = '3'; expected an integer": lambda: run.search("a", si.SearchOptions(k="3")),
        "A path is None; expected a string or Path": lambda: si.open_run(None),
        "A path is 5; expected a string or Path": lambda: si.encode(ROWS, 5, model=MODEL),
        "url is int; expected a string": lambda: si.open_index("a", url=9200),
        "model is NoneType; expected a hub id": lambda: si.query_weights("a", None),
    }
    for message, call in calls.items():
        with pytest.raises(si.UsageError, match=message):
            call()
    assert run.search(QUESTION, k=np.int64(3)) == run.search(QUESTION, k=3)


def test_a_searched_run_works_in_pickled_and_in_forked_processes(run: si.SearchableRun) -> None:
    found = run.search(QUESTION, k=3)  # starts the thread that encodes queries
    assert pickle.loads(pickle.dumps(run)).search(QUESTION, k=3) == found
    context = multiprocessing.get_context("fork")
    answers = context.SimpleQueue()
    child = context.Process(target=lambda: answers.put(run.query_weights("a river of stone")), daemon=True)
    child.start()
    child.join(60)
    assert child.exitcode == 0, "the forked process waits for a thread that it does not have"
    assert answers.get() == pytest.approx(run.query_weights("a river of stone"))


def test_forked_processes_do_not_share_the_connections_of_an_index(loaded: si.SearchableIndex) -> None:
    questions = [{"yeast": 1.0}, {"river": 1.0}, {"exception": 1.0}]
    found = [loaded.search(one) for one in questions]

    def search_all() -> None:
        assert all([loaded.search(one) for one in questions] == found for _ in range(10))

    children = [multiprocessing.get_context("fork").Process(target=search_all, daemon=True) for _ in range(4)]
    for child in children:
        child.start()
    for child in children:
        child.join(60)
    assert [child.exitcode for child in children] == [0] * 4


def test_errors_can_be_pickled_for_other_processes(opensearch_url: str) -> None:
    with si.connect(url=opensearch_url) as client, pytest.raises(si.ClusterError) as refused:
        client.search("/_all", {"query": {"nothing": {}}}, expected=dict)
    for error in (refused.value, si.MissingExtraError("serve", "This")):
        copy = pickle.loads(pickle.dumps(error))
        assert (type(copy), str(copy), vars(copy)) == (type(error), str(error), vars(error))


def test_sixteen_threads_get_the_hits_of_one(run: si.SearchableRun, loaded: si.SearchableIndex) -> None:
    questions = [f"{word} and {other}" for word in ("bread", "river", "sugar") for other in ("yeast", "stone", "catch")]
    for target in (si.open_run(run.path), loaded):
        alone = [target.search(question, k=5) for question in questions]
        with ThreadPoolExecutor(16) as pool:
            assert list(pool.map(partial(target.search, k=5), questions * 4)) == alone * 4


def test_rank_keeps_the_order_of_the_queries(run: si.SearchableRun, loaded: si.SearchableIndex) -> None:
    queries = [si.Query("a", "bread yeast"), si.Query("b", "river stone")]
    for target in (run, loaded):
        ranked = list(target.rank(queries, k=2))
        assert [one.query_id for one in ranked] == ["a", "b"]
        assert ranked[0].doc_ids == [hit.id for hit in target.search("bread yeast", k=2)]


def test_options_without_effect_are_refused(run: si.SearchableRun, loaded: si.SearchableIndex) -> None:
    with pytest.raises(si.UsageError, match="filter needs a server"):
        run.search(QUESTION, filter={"match_all": {}})
    with pytest.raises(si.UsageError, match="stored is for a run"):
        loaded.search(QUESTION, stored=True)
    with pytest.raises(si.UsageError, match="unknown key size"):
        loaded.search(QUESTION, size=3)


# load and verify


def test_load_and_verify_return_what_the_command_line_prints(
    run: si.SearchableRun, opensearch_url: str, index_name: str
) -> None:
    report = si.load(run, index=index_name, url=opensearch_url)
    assert (report.acknowledged, report.refused, report.index) == (20, 0, index_name)
    again = json.loads(command("load", run.path, "--index", index_name, "--url", opensearch_url, "--json").out)
    expected = report.to_dict() | {"loaded_shards": 0}
    assert {**again, "seconds": 0} == {**expected, "seconds": 0}
    checked = si.verify(str(run.path), index=index_name, url=opensearch_url, sample=None)
    assert checked.ok
    assert checked.checked_documents == 20
    assert checked.to_dict()["same"] is True


def test_a_difference_is_in_the_report_and_raises_nothing(
    run: si.SearchableRun, loaded: si.SearchableIndex, opensearch_url: str
) -> None:
    loaded.client.call("DELETE", f"/{loaded.name}/_doc/d3", params={"refresh": "true"})
    report = si.verify(run, index=loaded.name, url=opensearch_url)
    assert not report.ok
    assert report.missing_ids == ["d3"]


def test_an_opensearchpy_client_is_accepted_and_stays_open(
    run: si.SearchableRun, opensearch_url: str, index_name: str
) -> None:
    own_client = opensearchpy.OpenSearch(opensearch_url, headers={"x-of": "mine"})
    assert si.load(run, index=index_name, connection=own_client).acknowledged == 20
    assert si.verify(run, index=index_name, connection=own_client).ok
    with si.open_index(index_name, connection=own_client) as index:
        assert index.search(QUESTION, k=1)
    assert own_client.indices.exists(index=index_name)


def test_url_and_connection_exclude_each_other_and_the_variable_is_the_default(
    run: si.SearchableRun, opensearch_url: str, index_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(si.UsageError, match="url= or connection="):
        si.load(run, index=index_name, url=opensearch_url, connection=si.Connection(opensearch_url))
    monkeypatch.setenv("SPARSE_INGEST_URL", opensearch_url)
    assert si.load(run, index=index_name).acknowledged == 20
    assert si.show_index(index_name).documents == 20


def test_an_alias_is_published_and_rolled_back(run: si.SearchableRun, opensearch_url: str, index_name: str) -> None:
    published = si.publish(run, alias=index_name, url=opensearch_url)
    assert (published.serves, published.moved, published.load.acknowledged) == (published.load.index, True, 20)
    with si.open_index(index_name, url=opensearch_url) as index:
        assert index.search(QUESTION, k=1)
    assert si.roll_back(index_name, published.load.index, url=opensearch_url) == published.load.index


def test_an_index_is_created_shown_and_dropped(opensearch_url: str, index_name: str) -> None:
    created = si.create_index(index_name, url=opensearch_url, field="vector", search=("two-phase",))
    assert (created.field, created.search_pipeline) == ("vector", f"{index_name}-search")
    assert si.show_index(index_name, url=opensearch_url).documents == 0
    dropped = si.drop_index(index_name, url=opensearch_url)
    assert dropped is not None
    assert dropped.pipelines == [f"{index_name}-search"]


# evaluate and plan


@pytest.fixture
def collection(tmp_path: Path) -> Path:
    folder = tmp_path / "collection"
    (folder / "qrels").mkdir(parents=True)
    queries = [{"_id": f"q{number}", "text": TEXTS[number]} for number in range(4)]
    (folder / "queries.jsonl").write_text("".join(json.dumps(query) + "\n" for query in queries))
    lines = [f"q{number}\td{number}\t1\n" for number in range(4)]
    (folder / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\n" + "".join(lines))
    return folder


def test_evaluate_gives_the_measures_of_the_command_line(
    run: si.SearchableRun, loaded: si.SearchableIndex, collection: Path
) -> None:
    printed = json.loads(command("evaluate", "--run", run.path, "--queries", collection, "--json").out)
    assert si.evaluate(run, queries=collection, qrels=collection).measures["nDCG@10"] == printed["nDCG@10"]
    assert si.evaluate(str(run.path), queries=str(collection)).measures["nDCG@10"] == printed["nDCG@10"]
    index_report = si.evaluate(loaded, queries=collection, qrels=collection, k=20, measures=["Success@1"], cost=False)
    assert index_report.bm25 is not None
    assert index_report.measures["nDCG@10"] == si.evaluate(run, queries=collection, stored=True).measures["nDCG@10"]
    assert "Success@1" in index_report.to_dict() and index_report.documents is index_report.flops is None


def test_plan_writes_its_files(run: si.SearchableRun, tmp_path: Path) -> None:
    queries = [si.Query(f"q{number}", f"{text} {number}") for number, text in enumerate(TEXTS[:4] * 3)]
    report = si.plan(run, queries=queries, out=tmp_path / "plan", loss=0.5)
    assert report.queries == 12
    assert {path.name for path in report.written} == {path.name for path in (tmp_path / "plan").iterdir()}
    assert report.to_dict()["run_id"] == run.manifest.run_id


# Output and progress


def test_stages_print_nothing_by_default(run: si.SearchableRun, tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        si.encode(ROWS, tmp_path / "run", **OPTIONS)
        run.search("zzzz", k=1)
    assert capfd.readouterr() == ("", "")


def test_progress_is_a_tqdm_bar_or_a_reporter(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    si.encode(ROWS, tmp_path / "bar", progress=True, **OPTIONS)
    out, err = capfd.readouterr()
    assert out == ""
    assert "20/20" in err or "20 documents" in err
    reporter = Recorder()
    si.encode(ROWS, tmp_path / "reporter", progress=reporter, **OPTIONS)
    assert reporter.done == 20
    assert any("Encoding with" in note for note in reporter.notes)


def test_a_stop_request_keeps_finished_shards(tmp_path: Path) -> None:
    with pytest.raises(si.Interrupted, match="keeps the finished shards"):
        si.encode(ROWS, tmp_path / "run", progress=Recorder(stop_at=8), **OPTIONS)
    assert si.open_run(tmp_path / "run").done_shards() == [0]
    assert si.encode(ROWS, tmp_path / "run", **OPTIONS).report.rows == 20
