"""`search` on the command line, with a weight table as the model."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from support.reporters import Recorder
from support.runs import make_run
from support.tables import TOKENS, write_table

from sparse_ingest.cli.searching import search
from sparse_ingest.cluster.client import Connection
from sparse_ingest.errors import ClusterError, CorpusError, PipelineError, RunError, UsageError
from sparse_ingest.loading.load import load
from sparse_ingest.pipeline import IndexSettings, Pipeline

DOCUMENTS = {
    "first": {"catch": 1.5, "except": 0.5},
    "second": {"except": 2.0, "##ion": 1.0, "river": 3.0},
    "third": {"river": 1.0},
}
FIELDS = {
    "first": {"title": "Catching", "text": "how to\n  catch it"},
    "second": {"title": "", "text": "an exception"},
    "third": {"title": "River", "text": ""},
}
EXPECTED = """\
  1  12.0000  second
     an exception
     except 9.50 · ##ion 2.50
  2  6.1250  first  Catching
     how to catch it
     catch 3.75 · except 2.38
"""


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_table(tmp_path / "model")


@pytest.fixture
def run_path(tmp_path: Path, model: Path) -> Path:
    return make_run(tmp_path / "run", DOCUMENTS, fields=FIELDS, model=str(model)).path


def invoke(command, *arguments: object) -> Result:
    return CliRunner().invoke(command, [str(argument) for argument in arguments], catch_exceptions=True)


def test_searching_a_run_uses_its_model_and_prints_hits_and_terms(run_path: Path) -> None:
    result = invoke(search, "--run", run_path, "catch an exception")
    assert result.exit_code == 0, result.stderr
    assert result.stdout == EXPECTED


def test_searching_an_index_uses_the_model_of_its_stamp(run_path: Path, opensearch_url: str, index_name: str) -> None:
    load(run_path, index=index_name, pipeline=Pipeline(), connection=Connection(url=opensearch_url))
    result = invoke(search, "--index", index_name, "--url", opensearch_url, "catch an exception")
    assert result.exit_code == 0, result.exception
    assert result.stdout == EXPECTED


def test_hits_of_a_sparse_vector_index_have_tokens(
    tmp_path: Path, model: Path, opensearch_url: str, index_name: str
) -> None:
    run = make_run(tmp_path / "run", DOCUMENTS, fields=FIELDS, model=str(model), vocabulary=TOKENS)
    pipeline, heard = Pipeline(index=IndexSettings(kind="sparse_vector")), Recorder()
    load(run.path, index=index_name, pipeline=pipeline, connection=Connection(url=opensearch_url), progress=heard)
    [advice] = [note for note in heard.notes if note.startswith("SEISMIC is for 1,000,000 documents or more")]
    assert "and the run has 3. For fewer, exact search (--kind rank_features) is usually as fast" in advice
    result = invoke(search, "--index", index_name, "--url", opensearch_url, "--json", "catch an exception")
    assert result.exit_code == 0, result.exception
    hits = json.loads(result.stdout)["hits"]
    assert [hit["id"] for hit in hits] == ["second", "first"]
    assert [[term["token"] for term in hit["terms"]] for hit in hits] == [["except", "##ion"], ["catch", "except"]]
    # SEISMIC scores with 8-bit weights.
    assert [hit["score"] for hit in hits] == pytest.approx([12.0, 6.125], rel=0.02)


def test_a_sparse_vector_index_of_another_vocabulary_is_refused(
    tmp_path: Path, model: Path, opensearch_url: str, index_name: str
) -> None:
    run = make_run(tmp_path / "run", DOCUMENTS, model=str(model), vocabulary=TOKENS[::-1])
    pipeline = Pipeline(index=IndexSettings(kind="sparse_vector"))
    load(run.path, index=index_name, pipeline=pipeline, connection=Connection(url=opensearch_url))
    result = invoke(search, "--index", index_name, "--url", opensearch_url, "catch an exception")
    assert isinstance(result.exception, ClusterError)
    assert "token ids of another vocabulary" in str(result.exception)


def test_json_has_every_term_and_field(run_path: Path) -> None:
    result = invoke(search, "--run", run_path, "--json", "-k", 1, "catch an exception")
    printed = json.loads(result.stdout)
    assert list(printed["query"]) == ["except", "##ion", "catch", "an"]
    assert printed["hits"] == [
        {
            "rank": 1,
            "score": 12.0,
            "id": "second",
            "snippet": "an exception",
            "fields": FIELDS["second"],
            "terms": [
                {"token": "except", "query_weight": 4.75, "document_weight": 2.0, "contribution": 9.5},
                {"token": "##ion", "query_weight": 2.5, "document_weight": 1.0, "contribution": 2.5},
            ],
        }
    ]


def test_search_shows_the_six_heaviest_terms(tmp_path: Path, model: Path) -> None:
    tokens = [letter * 3 for letter in "abcdefgh"]
    (model / "tokenizer.json").write_text(
        json.dumps(
            {
                "version": "1.0",
                "added_tokens": [],
                "pre_tokenizer": {"type": "Whitespace"},
                "model": {
                    "type": "WordLevel",
                    "vocab": {token: number for number, token in enumerate(tokens)},
                    "unk_token": "aaa",
                },
            }
        )
    )
    (model / "idf.json").write_text(json.dumps({token: 8.0 - number for number, token in enumerate(tokens)}))
    run = make_run(tmp_path / "run", {"a": dict.fromkeys(tokens, 1.0)}, model=str(model))
    last = invoke(search, "--run", run.path, " ".join(tokens)).stdout.splitlines()[-1]
    assert last.strip() == "aaa 8.00 · bbb 7.00 · ccc 6.00 · ddd 5.00 · eee 4.00 · fff 3.00 · …"


def test_without_hits_stdout_is_empty(run_path: Path) -> None:
    result = invoke(search, "--run", run_path, "an")
    assert (result.exit_code, result.stdout) == (0, "")
    assert "Nothing found." in result.stderr


def test_search_takes_exactly_one_of_index_and_run(run_path: Path) -> None:
    for arguments in ([], ["--index", "a", "--run", run_path]):
        result = invoke(search, *arguments, "catch")
        assert isinstance(result.exception, UsageError)
        assert result.exception.exit_code == 2


def test_with_force_another_model_is_used(tmp_path: Path, run_path: Path, model: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    write_table(other)
    (other / "idf.json").write_text('{"river": 1.0, "catch": 0.0}')
    result = invoke(search, "--run", run_path, "--model", other, "--force", "catch river")
    assert [line.split()[2] for line in result.stdout.splitlines() if line[:3].strip()] == ["second", "third"]


def test_another_model_is_refused_with_both_names(tmp_path: Path, run_path: Path, model: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    write_table(other)
    (other / "idf.json").write_text('{"river": 1.0, "catch": 0.0}')
    result = invoke(search, "--run", run_path, "--model", other, "catch river")
    assert isinstance(result.exception, RunError)
    assert result.exception.exit_code == 1
    assert str(other) in str(result.exception) and str(model) in str(result.exception)


def test_explain_prints_each_term_and_the_sum(run_path: Path) -> None:
    result = invoke(search, "--run", run_path, "--explain", "-k", 1, "catch an exception")
    assert result.stdout.splitlines()[2:] == [
        "     token         query x    stored = contribution",
        "     except       4.7500 x    2.0000 =       9.5000",
        "     ##ion        2.5000 x    1.0000 =       2.5000",
        "     score                                  12.0000",
    ]


def test_trec_prints_the_hits_of_one_text(run_path: Path) -> None:
    result = invoke(search, "--run", run_path, "--trec", "catch an exception")
    assert result.stdout == "1 Q0 second 1 12 sparse-ingest\n1 Q0 first 2 6.125 sparse-ingest\n"


@pytest.fixture
def queries_path(tmp_path: Path) -> Path:
    path = tmp_path / "queries.tsv"
    path.write_text("q2\tcatch an exception\nq1\triver\nq3\tzebra\n")
    return path


TREC = """\
q2 Q0 second 1 12 sparse-ingest
q2 Q0 first 2 6.125 sparse-ingest
q1 Q0 second 1 3 sparse-ingest
q1 Q0 third 2 1 sparse-ingest
"""


def test_a_query_file_prints_a_trec_run(run_path: Path, queries_path: Path) -> None:
    for options in ([], ["--trec"]):
        result = invoke(search, "--run", run_path, "--queries", queries_path, *options)
        assert result.exit_code == 0, result.exception
        assert result.stdout == TREC
    assert re.search(r"3 queries in [\d.]+ s, [\d.]+ queries/s, including encoding. 1 of them", result.stderr)


def test_an_id_that_is_invalid_in_a_trec_run_is_refused_before_any_output(tmp_path: Path, model: Path) -> None:
    run = make_run(tmp_path / "run", {"good": {"catch": 1.0}, "a\nb": {"an": 1.0}}, model=str(model))
    queries = tmp_path / "queries.tsv"
    queries.write_text("q1\tcatch\nq2\tan\n")
    for arguments in (("--queries", queries), ("--trec", "an")):
        result = invoke(search, "--run", run.path, *arguments)
        assert isinstance(result.exception, CorpusError) and result.stdout == ""
        assert r"The document id 'a\nb' cannot be in a TREC run file" in str(result.exception)


def test_a_query_file_is_searched_concurrently_and_latencies_are_reported(
    run_path: Path, queries_path: Path, opensearch_url: str, index_name: str
) -> None:
    load(run_path, index=index_name, pipeline=Pipeline(), connection=Connection(url=opensearch_url))
    arguments = ["--index", index_name, "--url", opensearch_url, "--queries", queries_path]
    result = invoke(search, *arguments, "--concurrency", 3)
    assert result.exit_code == 0, result.exception
    assert result.stdout == TREC
    percentiles = r"p50 [\d.]+ ms, p95 [\d.]+ ms, p99 [\d.]+ ms"
    assert re.search(rf"A request took {percentiles} with 3 in flight; the server reports {percentiles}", result.stderr)
    lines = [json.loads(line) for line in invoke(search, *arguments, "--json").stdout.splitlines()]
    assert [line["query_id"] for line in lines] == ["q2", "q1", "q3"]
    assert lines[1]["hits"] == [{"rank": 1, "id": "second", "score": 3.0}, {"rank": 2, "id": "third", "score": 1.0}]
    assert lines[2]["hits"] == []
    assert lines[0]["latency_ms"] >= lines[0]["took_ms"]


def test_engine_filter_and_hybrid_are_applied(
    tmp_path: Path, model: Path, opensearch_url: str, index_name: str
) -> None:
    run = make_run(tmp_path / "run", DOCUMENTS, fields=FIELDS, model=str(model))
    load(run.path, index=index_name, pipeline=Pipeline(), connection=Connection(url=opensearch_url))
    arguments = ["--index", index_name, "--url", opensearch_url, "catch an exception"]

    def found(*options: object) -> list[str]:
        result = invoke(search, *arguments, "--trec", *options)
        assert result.exit_code == 0, result.exception
        return [line.split()[2] for line in result.stdout.splitlines()]

    assert found() == ["second", "first"]
    only = tmp_path / "filter.json"
    only.write_text('{"ids": {"values": ["first", "third"]}}')
    assert found("--filter", only.read_text()) == found("--filter", f"@{only}") == ["first"]
    # The first phase searches only the heaviest token, which "first" also has.
    assert found("--engine", "two-phase", "--set", "query.two_phase={prune_type='top_k', prune_ratio=1}") == [
        "second",
        "first",
    ]
    assert found("--hybrid", "--hybrid-weights", "0,1") == ["second", "first"]
    # BM25 alone: "first" has "catch" in its text.
    assert found("--hybrid", "--hybrid-weights", "1,0", "--filter", only.read_text()) == ["first"]
    shown = invoke(search, *arguments, "--hybrid", "--explain", "-k", 1)
    assert [line.split()[0] for line in shown.stdout.splitlines()[-3:]] == ["bm25", "sparse", "hybrid"]
    many = tmp_path / "queries.tsv"
    many.write_text("1\tcatch an exception\n")
    ranked = invoke(search, *arguments[:-1], "--queries", many, "--hybrid")
    assert ranked.stdout == invoke(search, *arguments, "--hybrid", "--trec").stdout != ""
    wrong = invoke(search, *arguments, "--engine", "seismic")
    assert isinstance(wrong.exception, PipelineError)
    assert "engine seismic cannot search a rank_features field" in str(wrong.exception)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--filter", "{"], "--filter is not JSON"),
        (["--filter", "[]"], "filter must be one query"),
        (["--filter", "null"], "--filter is null; expected one query"),
        (["--filter", '{"a":' * 2_000 + "1" + "}" * 2_000], "--filter is not JSON: it is nested more than 100 levels"),
        (["--filter", '{"a":' * 150 + "1" + "}" * 150], "--filter is not JSON: it is nested more than 100 levels deep"),
        (["--filter", "@/dev/zero"], "--filter @/dev/zero is not JSON: it has "),
        (["--filter", "@nowhere.json"], "--filter @nowhere.json cannot be read"),
        (["--run", "r", "--filter", '{"match_all": {}}'], "--filter needs a server"),
        (["--run", "r", "--hybrid"], "--hybrid needs a server"),
        (["--run", "r", "--engine", "exact"], "--engine needs a server"),
        (["--run", "r", "--url", "http://127.0.0.1:1"], "--url is for --index"),
        (["--run", "r", "--set", "load.top_k=3"], "this command reads [model], [index], [query], not [load]"),
        (["--index", "i", "--concurrency", "2"], "--concurrency needs --queries"),
        (["--index", "i", "--quoting", "none"], "--quoting needs --queries"),
        (["--index", "i", "--trec", "--json"], "--trec and --json"),
        (["--run", "r", "--hybrid-weights", "0.5,0.5"], "--hybrid-weights needs a server"),
    ],
)
def test_options_without_an_effect_are_refused(options: list[str], message: str) -> None:
    result = invoke(search, *options, "catch")
    assert isinstance(result.exception, UsageError)
    assert result.exception.exit_code == 2
    assert message in str(result.exception)


def test_either_a_text_or_a_query_file_is_needed(queries_path: Path) -> None:
    for arguments in (["--index", "i"], ["--index", "i", "--queries", queries_path, "catch"]):
        result = invoke(search, *arguments)
        assert isinstance(result.exception, UsageError)
        assert "Give either TEXT or --queries" in str(result.exception)
    result = invoke(search, "--index", "i", "--queries", queries_path, "--explain")
    assert "--explain is for one TEXT" in str(result.exception)


def test_empty_queries_and_unknown_words_are_reported(run_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    empty = invoke(search, "--run", run_path, "  ")
    assert isinstance(empty.exception, UsageError)
    assert "The query is empty" in str(empty.exception)
    assert invoke(search, "--run", run_path, "zebra").exit_code == 0
    assert "the model knows none of its words" in caplog.text
    found = invoke(search, "--run", run_path, "--json", "zebra")
    [why] = json.loads(found.stdout)["why"]
    assert "the model knows none of its words" in why
    assert json.loads(invoke(search, "--run", run_path, "--json", "river").stdout)["why"] == []
