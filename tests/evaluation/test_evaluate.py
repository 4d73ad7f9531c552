"""`evaluate` on the command line: figures of runs and indexes, run files, and errors."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from support.forked import Answer, command
from support.runs import make_run
from support.tables import TOKENS, write_table

from sparse_ingest.cluster.client import Connection
from sparse_ingest.evaluation.measures import DEFAULT_MEASURES
from sparse_ingest.loading.load import load
from sparse_ingest.pipeline import IndexSettings, Pipeline

DOCUMENTS = {
    "first": {"catch": 1.5, "except": 0.5},
    "second": {"except": 2.0, "##ion": 1.0, "river": 3.0},
    "third": {"river": 1.0},
    "fourth": {},
}
FIELDS = {
    "first": {"title": "Catching", "text": "how to catch it"},
    "second": {"title": "", "text": "an exception"},
    "third": {"title": "River", "text": "a river runs"},
    "fourth": {"title": "", "text": ""},
}
PASSAGES = {
    "first#0": {"catch": 1.5},
    "first#1": {"except": 0.5},
    **{f"second#{number}": {"except": float(number)} for number in range(1, 8)},
    "third#0": {"river": 1.0},
}
FIELDS_OF_PASSAGES = {
    name: {"parent": name.partition("#")[0], "title": "", "text": "how to catch it" if name == "first#0" else "else"}
    for name in PASSAGES
}
# "catch" finds first; "exception" finds second, first; "zebra" finds nothing; "an" has no judgment.
QUERIES = {"1": "catch", "2": "exception", "3": "zebra", "4": "an"}
QRELS = {("1", "first"): 1, ("2", "first"): 1, ("3", "third"): 1}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_table(tmp_path / "model")


@pytest.fixture
def run_path(tmp_path: Path, model: Path) -> Path:
    return make_run(tmp_path / "run", DOCUMENTS, fields=FIELDS, model=str(model), vocabulary=TOKENS).path


@pytest.fixture
def collection(tmp_path: Path) -> Path:
    return write_collection(tmp_path / "collection", QUERIES, QRELS)


def write_collection(folder: Path, queries: dict[str, str], qrels: dict[tuple[str, str], int]) -> Path:
    (folder / "qrels").mkdir(parents=True)
    rows = [json.dumps({"_id": query_id, "text": text}) + "\n" for query_id, text in queries.items()]
    (folder / "queries.jsonl").write_text("".join(rows))
    lines = [f"{query_id}\t{doc_id}\t{score}\n" for (query_id, doc_id), score in qrels.items()]
    (folder / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\n" + "".join(lines))
    return folder


def evaluate_json(*arguments: object) -> dict:
    answer = command("evaluate", *arguments, "--json")
    assert answer.code == 0, answer.err
    return json.loads(answer.out)


def error_of(code: int, *arguments: object) -> str:
    answer: Answer = command("evaluate", *arguments)
    assert (answer.code, answer.out) == (code, ""), answer
    assert "Traceback" not in answer.err
    return answer.err


def test_the_figures_of_a_run_equal_a_calculation_by_hand(run_path, collection):
    found = evaluate_json("--queries", collection, "--run", run_path, "--measure", "Success@1", "--per-query")
    # Rank of the relevant document by query: 1, 2, none.
    assert found["RR"] == found["RR@10"] == pytest.approx((1 + 1 / 2 + 0) / 3)
    assert found["nDCG@10"] == pytest.approx((1 + 1 / np.log2(3) + 0) / 3)
    assert found["R@100"] == pytest.approx(2 / 3)
    assert found["Success@1"] == pytest.approx(1 / 3)
    assert found["per_query"]["RR"] == {"1": 1.0, "2": 0.5, "3": 0.0}
    assert found["queries"] == {"count": 3, "active_dimensions": 1.0, "sparsity": pytest.approx(1 - 1 / len(TOKENS))}
    assert found["documents"]["count"] == 4
    assert found["documents"]["active_dimensions"] == 6 / 4
    # catch is in 1 document, except in 2, ##ion in 1, of 3 queries and 4 documents.
    assert found["flops"] == pytest.approx((1 + 2 + 1) / 3 / 4)
    assert (found["engine"], found["bm25"], found["latency"]["p50_ms"]) == ("exact", None, None)


def test_the_table_and_the_json_have_the_default_measures(run_path, collection):
    found = evaluate_json("--queries", collection, "--run", run_path, "--bm25")
    assert list(found)[:5] == list(DEFAULT_MEASURES)
    answer = command("evaluate", "--queries", collection, "--run", run_path, "--bm25", "--per-query")
    by_query, _, table = answer.out.partition("\n\n")
    lines = table.splitlines()
    assert lines[0].split() == list(DEFAULT_MEASURES)
    assert lines[1].split() == ["exact", *(f"{found[name]:.4f}" for name in DEFAULT_MEASURES)]
    assert lines[2].split() == ["BM25", *(f"{found['bm25'][name]:.4f}" for name in DEFAULT_MEASURES)]
    assert re.search(r"documents +4 +1\.5 ", answer.out)
    assert re.search(r"^2 +0\.6309 +0\.5000 ", by_query, re.MULTILINE)


def test_a_query_that_finds_its_own_id_is_reported_and_can_be_ignored(
    run_path, tmp_path, opensearch_url, index_name, caplog
):
    # The query has the id of document `second` and finds it first, then `first`, which is relevant.
    collection = write_collection(tmp_path / "own", {"second": "exception"}, {("second", "first"): 1})
    load(run_path, index=index_name, pipeline=Pipeline(), connection=Connection(url=opensearch_url))
    for target in (["--run", run_path], ["--index", index_name, "--url", opensearch_url]):
        caplog.clear()
        trec, own = tmp_path / "trec", ("--ignore-identical-ids", "--bm25", "-k", 100)
        found = evaluate_json("--queries", collection, *target, "--trec-run", trec)
        assert (found["RR"], found["nDCG@10"]) == (0.5, pytest.approx(1 / np.log2(3)))
        assert "1 of 1 queries found the document with their own id, such as 'second'" in caplog.text
        caplog.clear()
        found = evaluate_json(
            "--queries", collection, *target, *own, "--compare", trec, "--trec-run", tmp_path / "again"
        )
        assert (found["RR"], found["nDCG@10"]) == (1, 1)
        assert {one["measure"]: one["difference"] for one in found["comparison"]}["RR"] == 0
        assert [line.split()[2] for line in (tmp_path / "again").read_text().splitlines()] == ["first"]
        assert "own id" not in caplog.text
    options = ("--queries", collection, "--run", run_path, "--measure", "Success@1", "-k", 1)
    assert evaluate_json(*options, "--ignore-identical-ids")["Success@1"] == 1


def test_k_below_the_cutoff_of_a_measure_is_reported(run_path, collection):
    answer = command("evaluate", "--queries", collection, "--run", run_path, "-k", 1, "--json")
    assert "k = 1 is below the cutoff 100" in answer.err
    assert json.loads(answer.out)["RR"] == pytest.approx(1 / 3)


def test_unjudged_queries_and_judgments_without_query_are_reported(run_path, collection, tmp_path, caplog):
    (tmp_path / "more.tsv").write_text("1 0 first 1\n2 0 first 1\n3 0 third 1\n9 0 first 1\n")
    answer = command(
        "evaluate", "--queries", collection / "queries.jsonl", "--qrels", tmp_path / "more.tsv", "--run", run_path
    )
    assert answer.code == 0, answer.err
    assert "1 of 4 queries have no relevance judgments and are skipped" in caplog.text
    assert "1 of 4 judged queries are not in" in caplog.text
    complete = command("evaluate", "--queries", collection, "--run", run_path)
    assert answer.out.splitlines()[:2] == complete.out.splitlines()[:2]


@pytest.mark.both_products(quick=False)
def test_an_index_has_the_figures_of_its_run_with_nine_bits(run_path, collection, cluster_url, index_name):
    load(run_path, index=index_name, pipeline=Pipeline(), connection=Connection(url=cluster_url))
    options = ("--queries", collection, "--per-query")
    exact = evaluate_json(*options, "--run", run_path, "--stored")
    found = evaluate_json(*options, "--index", index_name, "--url", cluster_url, "--concurrency", 3)
    for key in (*DEFAULT_MEASURES, "per_query", "queries", "documents", "flops"):
        assert found[key] == exact[key], key
    assert (found["engine"], exact["engine"]) == ("exact", "exact, 9 bits")
    # BM25: "catch" finds first, "exception" finds only second, "zebra" finds nothing.
    assert found["bm25"]["per_query"]["RR"] == {"1": 1.0, "2": 0.0, "3": 0.0}
    assert 0 < found["latency"]["p50_ms"] <= found["latency"]["p95_ms"] <= found["latency"]["p99_ms"]
    assert found["latency"]["took_ms"] is not None
    assert evaluate_json(*options, "--index", index_name, "--url", cluster_url, "--no-bm25")["bm25"] is None


def test_hybrid_is_evaluated_on_an_index(run_path, collection, opensearch_url, index_name):
    load(run_path, index=index_name, pipeline=Pipeline(), connection=Connection(url=opensearch_url))
    asked = ["--queries", collection, "--index", index_name, "--url", opensearch_url, "--hybrid", "--per-query"]
    found = evaluate_json(*asked, "--hybrid-weights", "0,1")
    assert (found["engine"], found["bm25"]["engine"]) == ("hybrid, exact", "BM25")
    assert found["hybrid"] == {"hybrid": True, "hybrid_weights": [0.0, 1.0]}
    assert found["per_query"]["RR"] == {"1": 1.0, "2": 0.5, "3": 0.0}  # as the vectors alone
    words = evaluate_json(*asked, "--hybrid-weights", "1,0")["per_query"]["RR"]
    assert words["1"] == 1.0
    assert "hybrid is for --index" in error_of(2, "--queries", collection, "--run", run_path, "--hybrid")


def test_a_sparse_vector_index_is_evaluated_with_its_engine(run_path, collection, opensearch_url, index_name):
    pipeline = Pipeline(index=IndexSettings(kind="sparse_vector"))
    load(run_path, index=index_name, pipeline=pipeline, connection=Connection(url=opensearch_url))
    found = evaluate_json(
        "--queries", collection, "--index", index_name, "--url", opensearch_url, "--engine", "seismic"
    )
    assert found["engine"] == "seismic"
    assert found["RR"] == pytest.approx((1 + 1 / 2 + 0) / 3)
    assert (found["documents"], found["flops"]) == (None, None)


def test_two_phase_with_a_window_of_all_documents_is_exact(run_path, collection, opensearch_url, index_name):
    load(run_path, index=index_name, pipeline=Pipeline(), connection=Connection(url=opensearch_url))
    options = ("--queries", collection, "--index", index_name, "--url", opensearch_url, "--no-bm25", "--per-query")
    exact, found = evaluate_json(*options), evaluate_json(*options, "--engine", "two-phase")
    assert found["engine"] == "two-phase"
    assert found["per_query"] == exact["per_query"]


def test_a_written_run_file_compares_as_equal(run_path, collection, tmp_path):
    options = ("--queries", collection, "--run", run_path, "--measure", "P@5")
    evaluate_json(*options, "--trec-run", tmp_path / "found.txt")
    lines = [line.split() for line in (tmp_path / "found.txt").read_text().splitlines()]
    assert [line[:4] for line in lines] == [
        ["1", "Q0", "first", "1"], ["2", "Q0", "second", "1"], ["2", "Q0", "first", "2"],
    ]  # fmt: skip
    found = evaluate_json(*options, "--compare", tmp_path / "found.txt")["comparison"]
    assert [one["measure"] for one in found] == [*DEFAULT_MEASURES, "P@5"]
    assert {(one["queries"], one["difference"], one["t_test"], one["randomisation"]) for one in found} == {(3, 0, 1, 1)}


def test_comparison_with_a_worse_run_file(run_path, collection, tmp_path):
    (tmp_path / "other.txt").write_text("1 Q0 third 1 2.0 t\n1 Q0 first 2 1.0 t\n")
    answer = command("evaluate", "--queries", collection, "--run", run_path, "--compare", tmp_path / "other.txt")
    assert answer.code == 0, answer.err
    # RR per query: 1, 0.5, 0 in this run; 0.5, 0, 0 in the file.
    assert re.search(r"^RR +0\.5000 +0\.1667 +\+0\.3333 ", answer.out, re.MULTILINE)
    assert "p (t-test)  p (random)" in answer.out


def test_a_comparison_has_wins_losses_and_the_largest_changes(run_path, collection, tmp_path):
    options = ("--queries", collection, "--run", run_path, "--per-query", "--measure", "RR")
    # By query 1.0, 0.5, 0 here; 0.5, 1.0, 0 there.
    (tmp_path / "other.txt").write_text("1 Q0 third 1 2.0 t\n1 Q0 first 2 1.0 t\n2 Q0 first 1 1.0 t\n")
    compared = (*options, "--compare", tmp_path / "other.txt")
    found = evaluate_json(*compared)["comparison"]
    [one] = (one for one in found if one["measure"] == "RR")
    assert (one["wins"], one["losses"], one["ties"]) == (1, 1, 1)
    assert one["changes"] == [
        {"query_id": "1", "text": "catch", "first": 1.0, "second": 0.5},
        {"query_id": "2", "text": "exception", "first": 0.5, "second": 1.0},
    ]
    shown = command("evaluate", *compared).out
    assert re.search(r"\(random\) +wins +losses +ties\n.*\nRR@10 .* 1 +1 +1\n", shown)
    assert shown.count("Largest changes of ") == 2  # nDCG@10, and the requested RR
    assert re.search(
        r"^Largest changes of RR:\n.*\n1 +1.0000 +0.5000  catch\n2 +0.5000 +1.0000  exception\n", shown, re.M
    )
    assert "changes" not in evaluate_json(*(option for option in compared if option != "--per-query"))["comparison"][0]


def test_an_evaluation_is_compared_with_the_json_of_another(run_path, collection, tmp_path, caplog):
    options = ("--queries", collection, "--run", run_path)
    other = tmp_path / "other.json"
    there = evaluate_json(*options, "--per-query")
    del there["per_query"]["RR"]["3"]
    there["per_query"]["RR"]["2"] = 0.125
    other.write_text(json.dumps(there, indent=2))
    [one] = (one for one in evaluate_json(*options, "--compare", other)["comparison"] if one["measure"] == "RR")
    assert (one["queries"], one["first"], one["second"], one["wins"], one["ties"]) == (2, 0.75, 0.5625, 1, 1)
    assert "has values of 2 of the 3 queries" in caplog.text
    assert "has no values of P@5" in error_of(1, *options, "--compare", other, "--measure", "P@5")
    other.write_text(json.dumps({"per_query": {name: {"77": 1.0} for name in there["per_query"]}}))
    assert "has none of the 3 judged queries" in error_of(1, *options, "--compare", other)
    other.write_text(json.dumps({"nDCG@10": 0.5}))
    assert "Create it with `evaluate --json --per-query`" in error_of(1, *options, "--compare", other)


def test_ids_with_spaces_are_refused_and_an_existing_run_file_is_kept(tmp_path, model):
    run = make_run(tmp_path / "run", {"a b": {"catch": 1.0}}, model=str(model), vocabulary=TOKENS)
    folder = write_collection(tmp_path / "collection", {"1": "catch"}, {("1", "a b"): 1})
    (tmp_path / "found.txt").write_text("what was there before\n")
    message = error_of(1, "--queries", folder, "--run", run.path, "--trec-run", tmp_path / "found.txt")
    assert "The document id 'a b' cannot be in a TREC run file" in message
    (folder / "queries.jsonl").write_text(json.dumps({"_id": "a\nb", "text": "catch"}) + "\n")
    judged = tmp_path / "qrels.jsonl"
    judged.write_text(json.dumps({"query-id": "a\nb", "corpus-id": "a b", "score": 1}) + "\n")
    arguments = ("--queries", folder / "queries.jsonl", "--qrels", judged, "--run", run.path)
    message = error_of(1, *arguments, "--trec-run", tmp_path / "found.txt")
    assert r"The query id 'a\nb' cannot be in a TREC run file" in message
    assert (tmp_path / "found.txt").read_text() == "what was there before\n"
    assert not list(tmp_path.glob(".new-*"))


def test_another_model_is_refused_without_force(run_path, collection, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    write_table(other)
    (other / "idf.json").write_text(json.dumps({"catch": 1.0}))
    options = ("--queries", collection, "--run", run_path, "--model", other)
    assert "--force" in error_of(1, *options)
    assert evaluate_json(*options, "--force")["engine"] == "exact"


@pytest.mark.parametrize(
    ("code", "options", "words"),
    [
        (2, ["--measure", "accuracy@1"], "accuracy@k is Success@k"),
        (2, ["--index", "x"], "Give either --index NAME or --run RUN."),
        (2, ["--engine", "two-phase"], "a run folder is searched exactly"),
        (2, ["--nano-beir", "nq"], "--queries has no effect with --nano-beir"),
        (2, ["--measure", "nDCG@0"], "cannot be computed"),
        (2, ["--concurrency", 2], "--concurrency is for --index"),
        (2, ["--device", "cpu"], "--device is for --nano-beir"),
        (2, ["--trec-run", "no/such/folder/run.txt"], "the folder no/such/folder does not exist"),
    ],
)
def test_invalid_options_are_refused(code, options, words, run_path, collection):
    assert words in error_of(code, "--queries", collection, "--run", run_path, *options)


def test_missing_queries_judgments_or_target_is_a_usage_error(run_path, collection, tmp_path):
    assert "--queries FOLDER with both" in error_of(2, "--run", run_path)
    assert "--queries FOLDER with both" in error_of(2, "--run", run_path, "--queries", collection / "queries.jsonl")
    assert "--index NAME or --run RUN" in error_of(2, "--queries", collection)
    assert "--stored is for --run" in error_of(2, "--queries", collection, "--index", "x", "--stored")


def test_judgments_for_other_queries_are_refused(run_path, collection, tmp_path):
    (tmp_path / "qrels.tsv").write_text("77 0 first 1\n")
    message = error_of(1, "--queries", collection, "--qrels", tmp_path / "qrels.tsv", "--run", run_path)
    assert "are for other queries: they name '77'" in message
    (tmp_path / "qrels.tsv").write_text("")
    message = error_of(1, "--queries", collection, "--qrels", tmp_path / "qrels.tsv", "--run", run_path)
    assert "has no relevance judgments" in message


def test_judgments_of_another_corpus_are_refused_and_of_a_larger_one_reported(run_path, tmp_path, caplog):
    other = write_collection(tmp_path / "other", QUERIES, {("1", "elsewhere"): 1})
    assert "has none of the 1 judged documents, such as 'elsewhere'" in error_of(
        1, "--queries", other, "--run", run_path
    )
    larger = write_collection(tmp_path / "larger", QUERIES, {**QRELS, ("1", "elsewhere"): 1})
    answer = command("evaluate", "--queries", larger, "--run", run_path)
    assert answer.code == 0, answer.err
    assert "has 2 of the 3 judged documents" in caplog.text


def test_a_run_file_of_another_collection_is_refused(run_path, collection, tmp_path):
    (tmp_path / "other.txt").write_text("77 Q0 first 1 2.0 t\n")
    message = error_of(1, "--queries", collection, "--run", run_path, "--compare", tmp_path / "other.txt")
    assert "has none of the 3 judged queries" in message


def test_a_run_without_texts_has_no_bm25(tmp_path, model, collection):
    fields = {doc_id: {} for doc_id in DOCUMENTS}
    run = make_run(tmp_path / "bare", DOCUMENTS, fields=fields, model=str(model), vocabulary=TOKENS)
    assert "has no texts" in error_of(1, "--queries", collection, "--run", run.path, "--bm25")


def test_a_missing_index_a_wrong_field_and_other_judgments_are_errors(run_path, collection, opensearch_url, index_name):
    options = ("--queries", collection, "--index", index_name, "--url", opensearch_url)
    assert f"no index or alias '{index_name}'" in error_of(1, *options).lower()
    load(run_path, index=index_name, pipeline=Pipeline(), connection=Connection(url=opensearch_url))
    assert "'title'" in error_of(1, *options, "--set", "index.field=title")
    other = write_collection(collection.parent / "other", QUERIES, {("1", "elsewhere"): 1})
    message = error_of(1, "--queries", other, "--index", index_name, "--url", opensearch_url)
    assert "has none of the 1 judged documents" in message


def test_a_document_is_ranked_by_its_best_passage(tmp_path, model, collection, opensearch_url, index_name, caplog):
    run = make_run(tmp_path / "run", PASSAGES, fields=FIELDS_OF_PASSAGES, model=str(model), vocabulary=TOKENS,
                   shard_rows=10, overflow="passages")  # fmt: skip
    options = ("--queries", collection, "--per-query")
    exact = evaluate_json(*options, "--run", run.path, "--stored", "--bm25", "--trec-run", tmp_path / "found.txt")
    # "exception" finds seven passages of second and one of first.
    lines = [line.split() for line in (tmp_path / "found.txt").read_text().splitlines()]
    assert [line[:4] for line in lines] == [
        ["1", "Q0", "first", "1"], ["2", "Q0", "second", "1"], ["2", "Q0", "first", "2"],
    ]  # fmt: skip
    assert exact["per_query"]["RR"] == {"1": 1.0, "2": 0.5, "3": 0.0}
    assert "the best passage counts for its document" in caplog.text
    load(run.path, index=index_name, pipeline=Pipeline(), connection=Connection(url=opensearch_url))
    found = evaluate_json(*options, "--index", index_name, "--url", opensearch_url)
    for key in (*DEFAULT_MEASURES, "per_query", "flops"):
        assert found[key] == exact[key], key
    assert found["bm25"]["per_query"]["RR"] == exact["bm25"]["per_query"]["RR"] == {"1": 1.0, "2": 0.0, "3": 0.0}


def test_judgments_of_passages_are_used_directly(tmp_path, model, caplog):
    run = make_run(tmp_path / "run", PASSAGES, model=str(model), vocabulary=TOKENS, shard_rows=10, overflow="passages")
    folder = write_collection(tmp_path / "of-passages", QUERIES, {("2", "second#6"): 1})
    # second#7 is ranked first.
    assert evaluate_json("--queries", folder, "--run", run.path)["RR"] == 0.5
    assert "best passage counts" not in caplog.text
