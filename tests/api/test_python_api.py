"""The stages from Python: rows in memory to a run, to an index, to answers, as the command line gives them."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import opensearchpy
import pandas as pd
import polars
import pyarrow as pa
import pytest
from support.forked import command
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
HOW: dict[str, Any] = {"model": MODEL, "dtype": "float32", "device": "cpu", "keep": ["lang"], "shard_rows": 8}


def written(folder: Path, rows: list[dict[str, Any]] = ROWS) -> Path:
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


@pytest.fixture(scope="module")
def of_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that the command line makes of the same rows in a file."""
    folder = tmp_path_factory.mktemp("file")
    answer = command("encode", "--model", MODEL, "--corpus", written(folder), "--out", folder / "run", "--dtype",
                     "float32", "--device", "cpu", "--keep", "lang", "--shard-rows", 8)  # fmt: skip
    assert answer.code == 0, answer.err
    return folder / "run"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> si.SearchableRun:
    return si.encode(ROWS, tmp_path_factory.mktemp("memory") / "run", **HOW)


@pytest.fixture
def loaded(run: si.SearchableRun, opensearch_url: str, index_name: str) -> Iterator[si.SearchableIndex]:
    si.load(run, index=index_name, url=opensearch_url)
    with si.open_index(index_name, url=opensearch_url) as index:
        yield index


# encode


@pytest.mark.parametrize("kind", CONTAINERS)
def test_rows_in_memory_give_the_shards_of_the_same_rows_in_a_file(
    kind: str, of_file: Path, run: si.SearchableRun, tmp_path: Path
) -> None:
    made = si.encode(CONTAINERS[kind](), tmp_path / "run", **HOW)
    assert contents(made.path / "shards") == contents(of_file / "shards")
    assert made.manifest.run_id == run.manifest.run_id != si.open_run(of_file).manifest.run_id
    assert made.manifest.identity["corpus"] == [{"name": "memory", "rows": 20, "sha256": made_hash(run)}]
    # The same rows resume: nothing is left to do.
    again = Recorder()
    si.encode(CONTAINERS[kind](), tmp_path / "run", progress=again, **HOW)
    assert again.notes == []
    assert again.done == 20


def made_hash(run: si.SearchableRun) -> str:
    return run.manifest.identity["corpus"][0]["sha256"]


def test_other_rows_are_another_run(run: si.SearchableRun) -> None:
    with pytest.raises(si.RunError, match="sha256"):
        si.encode(ROWS[:-1], run.path, **HOW)


@pytest.mark.parametrize("kind", ["text", "path", "list of paths", "folder"])
def test_files_are_named_as_on_the_command_line(kind: str, of_file: Path, tmp_path: Path) -> None:
    file = written(tmp_path)
    named = {"text": str(file), "path": file, "list of paths": [file], "folder": tmp_path}[kind]
    made = si.encode(named, tmp_path.parent / f"{tmp_path.name}-run", **HOW)
    assert made.manifest.run_id == si.open_run(of_file).manifest.run_id
    assert contents(made.path / "shards") == contents(of_file / "shards")


def test_what_encode_returns_is_what_open_run_returns(run: si.SearchableRun) -> None:
    opened = si.open_run(str(run.path))
    assert type(opened) is type(run) is si.SearchableRun
    assert opened.report == run.report
    assert (run.report.rows, run.report.shards, run.report.skipped) == (20, 3, 0)
    assert run.report.to_dict()["run_id"] == run.manifest.run_id
    assert "20 rows" in repr(run)


def test_threads_may_encode_at_the_same_time(run: si.SearchableRun, tmp_path: Path) -> None:
    with ThreadPoolExecutor(3) as pool:
        made = list(pool.map(lambda number: si.encode(ROWS, tmp_path / f"run{number}", **HOW), range(3)))
    for one in made:
        assert contents(one.path / "shards") == contents(run.path / "shards")


def test_a_bad_row_is_named_by_its_position_or_left_out(tmp_path: Path) -> None:
    rows = [*ROWS[:2], {"_id": "broken", "text": 3}, *ROWS[2:]]
    with pytest.raises(si.CorpusError, match=r'^memory: row 3: the text in "text" is 3'):
        si.encode(rows, tmp_path / "run", **HOW)
    skipping = si.encode(rows, tmp_path / "skipping", on_bad_document="skip", **HOW)
    assert (skipping.report.rows, skipping.report.skipped) == (20, 1)


def test_options_are_keywords_or_one_object(tmp_path: Path, run: si.SearchableRun) -> None:
    settings = {name: value for name, value in HOW.items() if name != "model"} | {"keep": ("lang",)}
    made = si.encode(ROWS, tmp_path / "run", model=MODEL, options=si.EncodeOptions(**settings))
    assert contents(made.path / "shards") == contents(run.path / "shards")
    with pytest.raises(si.UsageError, match=r"pass options= or keywords such as top_k="):
        si.encode(ROWS, tmp_path / "no", model=MODEL, options=si.EncodeOptions(), top_k=3)
    with pytest.raises(si.UsageError, match=r"encode\(\): unknown key topk; known here: .*top_k"):
        si.encode(ROWS, tmp_path / "no", model=MODEL, topk=3)
    with pytest.raises(si.UsageError, match=r"top_k = 'three'; expected an integer"):
        si.encode(ROWS, tmp_path / "no", model=MODEL, top_k="three")
    with pytest.raises(si.UsageError, match="No model"):
        si.encode(ROWS, tmp_path / "no")
    assert not (tmp_path / "no").exists()


def test_a_pipeline_stands_in_for_the_model(tmp_path: Path, run: si.SearchableRun) -> None:
    pipeline = si.Pipeline(model=si.ModelSettings(document=MODEL), encode=si.EncodeSettings(dtype="float32", top_k=3))
    how = {name: value for name, value in HOW.items() if name not in ("model", "dtype")}
    pruned = si.encode(ROWS, tmp_path / "run", pipeline=pipeline, **how)
    assert pruned.manifest.identity["top_k"] == 3
    assert 0 < pruned.report.terms <= 3 * 20 < run.report.terms
    unlike = si.encode(ROWS, tmp_path / "unlike", pipeline=pipeline, top_k=2, **how)
    assert unlike.manifest.identity["top_k"] == 2


def test_a_dry_run_writes_nothing(tmp_path: Path) -> None:
    found = si.dry_run(ROWS, model=MODEL)
    assert (found.rows, found.bad, found.empty) == (20, 0, 0)
    assert found.tokens is not None
    assert list(tmp_path.iterdir()) == []


# search


def test_a_run_answers_as_the_command_line_does(run: si.SearchableRun) -> None:
    answer = command("search", "--run", run.path, "--json", "-k", 3, QUESTION)
    told = json.loads(answer.out)["hits"]
    hits = run.search(QUESTION, k=3)
    assert [(hit.id, hit.score, hit.fields) for hit in hits] == [
        (hit["id"], hit["score"], hit["fields"]) for hit in told
    ]
    assert [[term._asdict() for term in hit.terms] for hit in hits] == [hit["terms"] for hit in told]
    assert run.search(run.query_weights(QUESTION), k=3) == hits


def test_an_index_answers_as_the_command_line_does(loaded: si.SearchableIndex, opensearch_url: str) -> None:
    where = ("--index", loaded.name, "--url", opensearch_url)
    told = json.loads(command("search", *where, "--json", "--filter", '{"match": {"title": "part 2"}}', QUESTION).out)
    hits = loaded.search(QUESTION, k=10, filter={"match": {"title": "part 2"}})
    assert hits
    assert [(hit.id, hit.score) for hit in hits] == [(hit["id"], hit["score"]) for hit in told["hits"]]
    hybrid = json.loads(command("search", *where, "--json", "--hybrid", QUESTION).out)["hits"]
    assert [hit.id for hit in loaded.search(QUESTION, hybrid=True)] == [hit["id"] for hit in hybrid]


def test_run_and_index_give_the_same_scores(run: si.SearchableRun, loaded: si.SearchableIndex) -> None:
    of_run = {hit.id: hit.score for hit in run.search(QUESTION, k=20, stored=True)}
    assert {hit.id: hit.score for hit in loaded.search(QUESTION, k=20)} == of_run


def test_sixteen_threads_give_the_answers_of_one(run: si.SearchableRun, loaded: si.SearchableIndex) -> None:
    questions = [f"{word} and {other}" for word in ("bread", "river", "sugar") for other in ("yeast", "stone", "catch")]
    for target in (si.open_run(run.path), loaded):
        alone = [target.search(question, k=5) for question in questions]
        with ThreadPoolExecutor(16) as pool:
            assert list(pool.map(partial(target.search, k=5), questions * 4)) == alone * 4


def test_many_queries_are_ranked_in_their_order(run: si.SearchableRun, loaded: si.SearchableIndex) -> None:
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


def test_load_and_verify_report_what_the_command_line_prints(
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


def test_a_difference_is_a_report_and_no_exception(
    run: si.SearchableRun, loaded: si.SearchableIndex, opensearch_url: str
) -> None:
    loaded.client.call("DELETE", f"/{loaded.name}/_doc/d3", params={"refresh": "true"})
    report = si.verify(run, index=loaded.name, url=opensearch_url)
    assert not report.ok
    assert report.missing_ids == ["d3"]


def test_a_client_of_the_users_own_is_used_and_stays_open(
    run: si.SearchableRun, opensearch_url: str, index_name: str
) -> None:
    own = opensearchpy.OpenSearch(opensearch_url, headers={"x-of": "mine"})
    assert si.load(run, index=index_name, connection=own).acknowledged == 20
    assert si.verify(run, index=index_name, connection=own).ok
    with si.open_index(index_name, connection=own) as index:
        assert index.search(QUESTION, k=1)
    assert own.indices.exists(index=index_name)


def test_where_the_cluster_is_comes_from_one_place(
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


def test_measures_are_those_of_the_command_line(
    run: si.SearchableRun, loaded: si.SearchableIndex, collection: Path
) -> None:
    told = json.loads(command("evaluate", "--run", run.path, "--queries", collection, "--json").out)
    assert si.evaluate(run, queries=collection, qrels=collection).measures["nDCG@10"] == told["nDCG@10"]
    assert si.evaluate(str(run.path), queries=str(collection)).measures["nDCG@10"] == told["nDCG@10"]
    of_index = si.evaluate(loaded, queries=collection, qrels=collection, k=20, measures=["Success@1"])
    assert of_index.bm25 is not None
    assert of_index.measures["nDCG@10"] == si.evaluate(run, queries=collection, stored=True).measures["nDCG@10"]
    assert "Success@1" in of_index.to_dict()


def test_a_plan_is_made_and_written(run: si.SearchableRun, tmp_path: Path) -> None:
    queries = [si.Query(f"q{number}", f"{text} {number}") for number, text in enumerate(TEXTS[:4] * 3)]
    report = si.plan(run, queries=queries, out=tmp_path / "plan", loss=0.5)
    assert report.queries == 12
    assert {path.name for path in report.written} == {path.name for path in (tmp_path / "plan").iterdir()}
    assert report.to_dict()["run_id"] == run.manifest.run_id


# What is shown


def test_stages_are_silent_unless_asked(run: si.SearchableRun, tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        si.encode(ROWS, tmp_path / "run", **HOW)
        run.search("zzzz", k=1)
    assert capfd.readouterr() == ("", "")


def test_progress_is_a_tqdm_bar_or_a_reporter(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    si.encode(ROWS, tmp_path / "bar", progress=True, **HOW)
    out, err = capfd.readouterr()
    assert out == ""
    assert "20/20" in err or "20 documents" in err
    reporter = Recorder()
    si.encode(ROWS, tmp_path / "reporter", progress=reporter, **HOW)
    assert reporter.done == 20
    assert any("Encoding with" in note for note in reporter.notes)


def test_a_stop_request_keeps_what_is_done(tmp_path: Path) -> None:
    with pytest.raises(si.Interrupted, match="keeps the finished shards"):
        si.encode(ROWS, tmp_path / "run", progress=Recorder(stop_at=8), **HOW)
    assert si.open_run(tmp_path / "run").done_shards() == [0]
    assert si.encode(ROWS, tmp_path / "run", **HOW).report.rows == 20
