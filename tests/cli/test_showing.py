"""`show`, and `search --doc`: the terms of stored documents and of texts, and where a document is among the hits."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.forked import Answer, command
from support.runs import make_run
from support.tables import TOKENS, write_table

from sparse_ingest.cluster.client import Client, Connection, connect
from sparse_ingest.loading.load import load
from sparse_ingest.pipeline import IndexSettings, Pipeline
from sparse_ingest.searching.search import open_run

DOCUMENTS = {
    "first": {"catch": 1.5, "except": 0.5},
    "second": {"except": 2.0, "##ion": 1.0, "river": 3.0},
    "third": {"river": 1.0},
    "fourth": {"catch": 0.25},
}
FIELDS = {
    "first": {"title": "Catching", "text": "how to\n  catch it"},
    "second": {"title": "", "text": "an exception"},
    "third": {"title": "River", "text": "", "lang": "en", "year": 1999},
    "fourth": {"text": "catch"},
}
QUERY = "catch an exception"
SHOWN = """\
second
     an exception
     3 terms, 1 of them expansion
     term    weight
     river   3.0000  expansion
     except  2.0000
     …ion    1.0000
first  Catching
     how to catch it
     2 terms, 1 of them expansion
     term    weight
     catch   1.5000
     except  0.5000  expansion
"""
WITH_QUERY = """\
second
     an exception
     3 terms, 1 of them expansion
     term    weight     query  contribution
     river   3.0000                          expansion
     except  2.0000  x 4.7500      = 9.5000
     …ion    1.0000  x 2.5000      = 2.5000
     score                          12.0000
"""
EXPLAINED = """\
fourth
     catch
     rank 3 of 3 hits
     Its score is 5.5000 below that of hit 2, which is 6.1250.
     token         query x    stored = contribution
     catch        2.5000 x    0.2500 =       0.6250
     score                                   0.6250
     Terms of the query that it lacks: except, ##ion, an
"""


@pytest.fixture(scope="module")
def run_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("show")
    model = write_table(folder / "model")
    return make_run(folder / "run", DOCUMENTS, fields=FIELDS, model=str(model), vocabulary=TOKENS).path


@pytest.fixture(scope="module", params=["rank_features", "sparse_vector"])
def index(run_path: Path, opensearch_url: str, request: pytest.FixtureRequest) -> Iterator[tuple[str, ...]]:
    name = f"sparse-ingest-test-show-{request.param}"
    connection = Connection(url=opensearch_url)
    pipeline = Pipeline(index=IndexSettings(kind=request.param))
    load(run_path, index=name, pipeline=pipeline, connection=connection, replace=True, from_scratch=True)
    yield ("--index", name, "--url", opensearch_url)
    with connect(connection) as client:
        assert isinstance(client, Client)
        client.call("DELETE", f"/{name}")


def shown(*arguments: object) -> str:
    answer = command(*arguments)
    assert answer.code == 0, answer.err
    return answer.out


def test_the_terms_of_documents_of_a_run_with_expansion_and_readable_pieces(run_path: Path) -> None:
    assert shown("show", run_path, "second", "first") == SHOWN


def test_a_query_gives_contributions_and_the_score_of_its_search(run_path: Path) -> None:
    assert shown("show", run_path, "second", "--query", QUERY) == WITH_QUERY
    [hit] = json.loads(shown("search", "--run", run_path, "-k", 1, "--json", QUERY))["hits"]
    assert (hit["id"], hit["score"]) == ("second", 12.0)


def test_top_k_keeps_the_heaviest_terms_and_those_that_match(run_path: Path) -> None:
    [document] = json.loads(shown("show", run_path, "second", "--top-k", 1, "--json"))["documents"]
    assert [term["token"] for term in document["terms"]] == ["river"]
    assert document["count"] == 3
    found = json.loads(shown("show", run_path, "second", "--top-k", 1, "--json", "--query", "catch ion except"))
    [document] = found["documents"]
    assert [(term["token"], term["contribution"]) for term in document["terms"]] == [("river", None), ("except", 9.5)]
    assert (document["score"], document["fields"]) == (9.5, FIELDS["second"])


def test_an_index_shows_what_it_stores(run_path: Path, index: tuple[str, ...]) -> None:
    arguments = ("second", "first", "--query", QUERY, "--json")
    of_run, of_index = (json.loads(shown("show", *place, *arguments))["documents"] for place in ([run_path], index))
    # All weights here fit into nine bits; segments with clusters keep a byte of each.
    exactness = 0.02 if index[1].endswith("sparse_vector") else 0
    for expected, found in zip(of_run, of_index, strict=True):
        assert found["score"] == pytest.approx(expected["score"], rel=exactness)
        assert (found["id"], found["fields"]) == (expected["id"], expected["fields"])
        for one, other in zip(expected["terms"], found["terms"], strict=True):
            assert other["weight"] == pytest.approx(one.pop("weight"), rel=exactness)
            if (contribution := one.pop("contribution")) is not None:
                assert other["contribution"] == pytest.approx(contribution, rel=exactness)
            assert other.items() >= one.items()


def test_a_document_after_the_first_hits_has_its_rank_and_what_it_lacks(
    run_path: Path, opensearch_url: str, index: tuple[str, ...]
) -> None:
    assert shown("search", "--run", run_path, "--doc", "fourth", "-k", 2, QUERY) == EXPLAINED
    found = json.loads(shown("search", *index, "--doc", "fourth", "-k", 2, "--json", QUERY))["document"]
    expected = json.loads(shown("search", "--run", run_path, "--doc", "fourth", "-k", 2, "--json", QUERY))["document"]
    if index[1].endswith("sparse_vector"):
        # An approximate engine ranks no documents after the first k, and may score by bytes.
        expected |= {"rank": None, "matching": None, "equal": None}
        assert [found.pop(name) for name in ("score", "last_score")] == pytest.approx([0.625, 6.125], rel=0.02)
        assert [term["token"] for term in found.pop("terms")] == ["catch"]
        expected = {name: value for name, value in expected.items() if name in found}
    assert found == expected
    best = json.loads(shown("search", *index, "--doc", "second", "--json", QUERY))["document"]
    assert (best["rank"], best["reason"], best["score"]) == (1, None, pytest.approx(12.0, rel=0.02))


@pytest.mark.parametrize(
    ("options", "reason", "words"),
    [
        (["--doc", "nowhere"], "not found", "No document has this id."),
        (["--doc", "third"], "no common term", "It has none of the query's terms"),
        (["--doc", "first", "--filter", '{"match": {"text": "exception"}}'], "filtered out", "The filter excludes it."),
    ],
)
def test_why_a_document_is_not_a_hit(
    options: list[str], reason: str, words: str, run_path: Path, index: tuple[str, ...]
) -> None:
    places = [index] if "--filter" in options else [index, ("--run", run_path)]
    for place in places:
        document = json.loads(shown("search", *place, *options, "--json", QUERY))["document"]
        assert (document["reason"], document["rank"]) == (reason, None)
        out = shown("search", *place, *options, QUERY)
        assert words in out and ("     lang: en · year: 1999\n" in out) == ("third" in options)


def test_a_text_is_encoded_as_a_query(run_path: Path) -> None:
    """As a document: docs/guides/searching.md."""
    arguments = ("show", "--model", run_path.parent / "model", "--text", QUERY, "--json", "--as", "query")
    [document] = json.loads(shown(*arguments))["documents"]
    found = [(term["text"], term["weight"], term["expansion"]) for term in document["terms"]]
    weights = [("except", 4.75), ("…ion", 2.5), ("catch", 2.5), ("an", pytest.approx(0.1))]
    assert found == [(text, weight, False) for text, weight in weights]


def refused(code: int, *arguments: object) -> str:
    answer: Answer = command(*arguments)
    assert (answer.code, answer.out) == (code, ""), answer
    assert "Traceback" not in answer.err
    return answer.err


def test_what_is_missing_is_named(run_path: Path, index: tuple[str, ...], tmp_path: Path) -> None:
    assert "has no document 'x', 'y'. Check the ids" in refused(1, "show", run_path, "x", "first", "y")
    assert "has no document 'x'. Check the ids" in refused(1, "show", *index, "x", "first")
    model = str(run_path.parent / "model")
    passages = make_run(tmp_path / "run", {"a#0": {"catch": 1.0}}, model=model, vocabulary=TOKENS)
    assert "name one, such as 'a#0'" in refused(1, "show", passages.path, "a")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "Give RUN and one or more ids"),
        (["RUN"], "Give RUN and one or more ids"),
        (["--index", "x"], "Give RUN and one or more ids"),
        (["--text", "catch"], "--text needs a model"),
        (["RUN", "first", "--text", "catch"], "omit RUN, ids and --index"),
        (["RUN", "first", "--as", "query"], "--as needs --text"),
        (["RUN", "first", "--url", "http://127.0.0.1:1"], "--url is for --index"),
        (["--model", "m", "--text", "x", "--url", "http://127.0.0.1:1"], "--url is for stored documents"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(arguments: list[str], words: str, run_path: Path) -> None:
    assert words in refused(2, "show", *(run_path if one == "RUN" else one for one in arguments))


@pytest.mark.parametrize("option", [("--explain",), ("--trec",), ("--collapse", "parent")])
def test_doc_cannot_be_combined_with_other_options(option: tuple[str, ...], run_path: Path) -> None:
    assert "cannot be combined with --doc" in refused(2, "search", "--run", run_path, "--doc", "first", *option, QUERY)


def test_without_its_model_a_document_is_shown_without_expansion(
    run_path: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    gone = make_run(tmp_path / "run", DOCUMENTS, fields=FIELDS, model=str(tmp_path / "gone"), vocabulary=TOKENS)
    [found] = open_run(gone.path).show("second")
    assert [term.expansion for term in found.terms] == [None, None, None]
    assert "Expansion terms are not marked: No model folder" in caplog.text
