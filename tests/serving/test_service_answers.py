"""What the service answers is what the Python API and the command line return."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from support.deadlines import until
from support.forked import command
from support.gate import gate
from support.indexes import filled
from support.runs import make_run
from support.services import Served, served
from support.tables import TOKENS, write_table

import sparse_ingest as si
from sparse_ingest.cluster.client import Client
from sparse_ingest.evaluation.evaluate import evaluate

WORDS = ("catch", "an", "except", "##ion", "river", "stone")
QUERY = "catch an exception"


class Both:
    """An index and the run that it was loaded from, each served; the index beside BM25 and with judgments."""

    def __init__(self, folder: Path, index: str, url: str, of_index: Served, of_run: Served) -> None:
        self.run, self.collection, self.index, self.url = folder / "run", folder, index, url
        self.of_index, self.of_run = of_index, of_run


def documents() -> dict[str, dict[str, float]]:
    return {
        f"d{place}": {word: 0.25 + (place * (1 + at) % 7) / 4 for at, word in enumerate(WORDS) if (place + at) % 3}
        for place in range(40)
    }


def write_collection(folder: Path) -> None:
    (folder / "qrels").mkdir()
    texts = {"q1": QUERY, "q2": "river", "q3": "an"}
    lines = [json.dumps({"_id": query_id, "text": text}) + "\n" for query_id, text in texts.items()]
    (folder / "queries.jsonl").write_text("".join(lines))
    judged = "q1\td3\t2\nq1\td4\t1\nq2\td1\t1\nq3\td7\t1\n"
    (folder / "qrels" / "test.tsv").write_text(f"query-id\tcorpus-id\tscore\n{judged}")


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory, client: Client, cluster_url: str) -> Iterator[Both]:
    folder = tmp_path_factory.mktemp("served")
    write_collection(folder)
    fields = {
        doc_id: {
            "title": f"Title {doc_id}",
            "text": f"catch the {doc_id} <b>river</b>",
            "tag": "even"[: 4 * (place % 2)],
        }
        for place, doc_id in enumerate(documents())
    }
    model = write_table(folder / "model")
    run = make_run(folder / "run", documents(), fields=fields, model=str(model), vocabulary=TOKENS, shard_rows=16)
    with filled(client, run) as index:
        judged = ("--queries", folder)
        of_index = served("--index", index, "--url", cluster_url, "--model", model, "--compare", "bm25", *judged)
        with of_index as first, served("--run", run.path) as second:
            yield Both(folder, index, cluster_url, first, second)


def model_of(both: Both) -> str:
    return str(both.collection / "model")


@pytest.mark.parametrize("k", [1, 10, 100])
def test_search_answers_with_the_json_of_the_command(both: Both, k: int) -> None:
    of = ("search", QUERY, "-k", k, "--json")
    printed = command(*of, "--index", both.index, "--url", both.url, "--model", model_of(both))
    assert both.of_index.get("/search", q=QUERY, k=k) == json.loads(printed.out)
    printed = command(*of, "--run", both.run)
    assert both.of_run.get("/search", q=QUERY, k=k) == json.loads(printed.out)


def test_hits_without_terms_are_the_same_hits(both: Both) -> None:
    for served_one in (both.of_index, both.of_run):
        explained = served_one.get("/search", q=QUERY)
        plain = served_one.get("/search", q=QUERY, terms="false")
        assert [{**hit, "terms": []} for hit in explained["hits"]] == plain["hits"]


def test_keys_may_be_in_the_address_or_in_a_body(both: Both) -> None:
    query: Any = {"term": {"tag": "even"}}
    found = both.of_index.post("/search", q=QUERY, k=3, filter=query)
    assert found["hits"]
    assert all(hit["fields"]["tag"] == "even" for hit in found["hits"])
    assert both.of_index.get("/search", q=QUERY, k=3, filter=json.dumps(query)) == found


def test_a_refused_filter_does_not_show_the_address_of_the_cluster(both: Both) -> None:
    answer = both.of_index.ask("POST", "/search", {"q": QUERY, "filter": {"unheard": {"of": 1}}})
    assert answer.status == 400
    assert answer.message.startswith("The cluster answered 400 ")
    assert "unknown query [unheard]" in answer.message
    assert urlsplit(both.url).netloc not in answer.message


def test_collapse_returns_the_best_document_of_each_value(both: Both) -> None:
    for served_one in (both.of_index, both.of_run):
        hits = served_one.get("/search", q=QUERY, collapse="tag")["hits"]
        assert sorted(hit["fields"]["tag"] for hit in hits) == ["", "even"]


def test_a_hybrid_search_has_both_scores(both: Both) -> None:
    how = {"hybrid": True, "hybrid_weights": [0.3, 0.7]}
    found = both.of_index.post("/search", q=QUERY, k=3, **how)
    assert set(found["hits"][0]["sub_scores"]) <= {"bm25", "sparse"}
    assert both.of_index.get("/search", q=QUERY, k=3, hybrid="true", hybrid_weights="0.3,0.7") == found


def test_a_search_that_finds_nothing_says_why(both: Both) -> None:
    for served_one in (both.of_index, both.of_run):
        found = served_one.get("/search", q="zzz")
        assert found["hits"] == []
        assert "[UNK]" in found["why"][0]
    assert "BM25" in both.of_index.get("/search", q="zzz", target=1)["why"][0]


def test_stored_weights_of_a_run_give_the_scores_of_the_index(both: Both) -> None:
    in_run = both.of_run.get("/search", q=QUERY, k=40, stored="true")["hits"]
    in_index = both.of_index.get("/search", q=QUERY, k=40)["hits"]
    assert [hit["score"] for hit in in_run] == [hit["score"] for hit in in_index]


def test_targets_describe_what_is_served(both: Both) -> None:
    found = both.of_index.get("/targets")
    index, words = found["targets"]
    assert (index["name"], index["kind"], index["documents"], index["engine"]) == (both.index, "index", 40, "exact")
    assert index["engines"] == ["exact", "two-phase", "bm25"]
    assert index["fields"] == {"title": "text", "text": "text", "tag": "keyword"}
    assert (words["name"], words["engine"]) == ("bm25", "bm25")
    assert (found["queries"], found["highlights"], found["version"]) == (3, False, "0.1.0")
    [run] = both.of_run.get("/targets")["targets"]
    assert (run["name"], run["kind"], run["documents"], run["engines"]) == (str(both.run), "run", 40, ["exact"])
    assert (run["product"], run["fields"]) == (None, {})


@pytest.mark.parametrize("target", ["1", "bm25"])
def test_a_target_has_a_number_and_a_name(both: Both, target: str) -> None:
    by_target = both.of_index.get("/search", q="river", target=target)
    assert by_target == both.of_index.get("/search", q="river", engine="bm25")
    assert by_target["hits"]
    assert by_target["hits"][0]["terms"] == []


def test_two_phase_finds_the_documents_of_the_command(both: Both) -> None:
    of = ("--index", both.index, "--url", both.url, "--model", model_of(both), "--engine", "two-phase", "--json")
    printed = json.loads(command("search", QUERY, *of).out)
    assert both.of_index.get("/search", q=QUERY, engine="two-phase") == printed


def test_a_document_is_shown_with_its_terms(both: Both) -> None:
    for served_one, of in (
        (both.of_run, (both.run, "d4")),
        (both.of_index, ("d4", "--index", both.index, "--url", both.url, "--model", model_of(both))),
    ):
        printed = json.loads(command("show", *of, "--query", QUERY, "--json").out)
        assert served_one.get("/document", id="d4", q=QUERY) == printed
        assert served_one.get("/document", id="d4")["documents"][0]["score"] is None


def test_a_rank_is_explained(both: Both) -> None:
    for served_one, of in (
        (both.of_run, ("--run", both.run)),
        (both.of_index, ("--index", both.index, "--url", both.url, "--model", model_of(both))),
    ):
        printed = json.loads(command("search", QUERY, "--doc", "d4", "-k", 2, "--json", *of).out)
        assert served_one.get("/explain", q=QUERY, id="d4", k=2) == printed


def test_a_query_body_is_that_of_the_command_and_finds_the_same_documents(both: Both) -> None:
    body = both.of_index.post("/query", q=QUERY, k=3)
    printed = command("query", QUERY, "-k", 3, "--model", model_of(both))
    assert body == json.loads(printed.out) == both.of_run.post("/query", q=QUERY, k=3)
    request = urllib.request.Request(
        f"{both.url}/{both.index}/_search", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        found = [hit["_id"] for hit in json.load(answer)["hits"]["hits"]]
    assert found == [hit["id"] for hit in both.of_index.get("/search", q=QUERY, k=3)["hits"]]


def test_texts_are_encoded_as_queries(both: Both) -> None:
    expected = [si.query_weights(QUERY, si.Pipeline(si.ModelSettings(model_of(both)))), {}]
    assert both.of_run.post("/encode", texts=[QUERY, "zzz"], **{"as": "query"})["vectors"] == expected


def test_without_a_document_model_documents_are_not_encoded(both: Both) -> None:
    answer = both.of_run.ask("POST", "/encode", {"texts": ["catch"]})
    assert answer.status == 501
    assert "no model that encodes documents" in answer.message


def test_judgments_have_the_measures_of_evaluate(both: Both) -> None:
    with si.open_index(both.index, url=both.url, model=model_of(both)) as index:
        evaluation = evaluate(index, queries=both.collection)
    assert evaluation.bm25 is not None
    first, second = (row.measured.per_query["nDCG@10"] for row in (evaluation.search, evaluation.bm25))
    found = both.of_index.get("/judgments", q=QUERY)
    assert (found["query_id"], found["relevant"]) == ("q1", {"d3": 2, "d4": 1})
    assert [one["ndcg@10"] for one in found["targets"]] == [first["q1"], second["q1"]]
    unknown = both.of_index.get("/judgments", q="not judged")
    assert (unknown["query_id"], unknown["relevant"]) == (None, {})
    assert [one["ndcg@10"] for one in unknown["targets"]] == [None, None]

    in_file = both.of_index.get("/queries")["queries"]
    assert [one["query_id"] for one in in_file] == ["q1", "q2", "q3"]
    assert [one["ndcg@10"] for one in in_file] == [[first[name], second[name]] for name in ("q1", "q2", "q3")]
    worst = both.of_index.get("/queries", order="worst", limit=2)["queries"]
    assert [one["query_id"] for one in worst] == sorted(first, key=first.__getitem__)[:2]


def test_while_the_queries_are_evaluated_their_routes_are_busy(both: Both) -> None:
    of = ("--index", both.index, "--model", model_of(both), "--queries", both.collection, "--time-limit", 2)
    with gate(both.url) as cluster, served(*of, "--url", cluster.url) as service:
        cluster.open.clear()
        answer = service.ask("GET", "/queries")
        assert (answer.status, answer.headers["retry-after"]) == (503, "1")
        assert "being evaluated: 0 of 3 searches are done. Try again." in answer.message
        cluster.open.set()
        assert until(lambda: service.ask("GET", "/queries").status == 200)


def test_many_clients_get_the_answers_that_one_client_gets(both: Both) -> None:
    queries = ["catch", "an exception", "except an", "catch an exception", "exception catch"]
    for served_one in (both.of_index, both.of_run):
        expected = {text: served_one.get("/search", q=text, k=5) for text in queries}
        with ThreadPoolExecutor(32) as clients:
            asked = queries * 16
            found = list(clients.map(lambda text, one=served_one: one.get("/search", q=text, k=5), asked))
        assert all(answer == expected[text] for text, answer in zip(asked, found, strict=True))
