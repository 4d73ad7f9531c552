"""`query` on the command line: every kind of request body, with a weight table as the model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from support.runs import make_run
from support.tables import TOKENS, write_table

from sparse_ingest.cli.querying import query
from sparse_ingest.cluster.client import Connection, connect
from sparse_ingest.cluster.hybrid_bodies import packaged_search_pipeline
from sparse_ingest.errors import UsageError
from sparse_ingest.loading.load import load
from sparse_ingest.pipeline import Pipeline

NO_SERVER = "http://127.0.0.1:1"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_table(tmp_path / "model")


def invoke(command: Any, *arguments: object) -> Result:
    return CliRunner().invoke(command, [str(argument) for argument in arguments], catch_exceptions=True)


def body_of(*arguments: object) -> dict[str, Any]:
    result = invoke(query, *arguments)
    assert result.exit_code == 0, result.exception
    return json.loads(result.stdout)


def test_query_prints_a_request_body(model: Path) -> None:
    result = invoke(query, "--model", model, "--set", "index.field=v", "-k", 3, "catch an exception")
    assert result.exit_code == 0, result.stderr
    body = json.loads(result.stdout)
    assert body["size"] == 3
    assert list(body["query"]["neural_sparse"]["v"]["query_tokens"]) == ["except", "##ion", "catch", "an"]


def test_query_reads_a_pipeline_file_and_reports_scaled_weights(tmp_path: Path, model: Path) -> None:
    (model / "idf.json").write_text(json.dumps({"catch": 100.0, "river": 1.0}))
    (tmp_path / "p.toml").write_text('[model]\ndocument = "model"\n[query]\ntop_k = 1\n')
    result = invoke(query, "--pipeline", tmp_path / "p.toml", "catch river")
    assert json.loads(result.stdout)["query"]["neural_sparse"]["sparse"]["query_tokens"] == {"catch": 50.0}
    assert "divided by 2" in result.stderr


def test_query_without_a_model_is_a_usage_error() -> None:
    result = invoke(query, "catch")
    assert isinstance(result.exception, UsageError)


def test_a_query_without_known_words_matches_nothing_and_is_reported(
    model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    result = invoke(query, "--model", model, "zebra")
    assert json.loads(result.stdout)["query"] == {"match_none": {}}
    assert "it cannot have hits" in caplog.text


def test_tokens_for_a_sparse_vector_field_are_ids(model: Path) -> None:
    body = body_of("--model", model, "--set", "index.kind=sparse_vector", "-k", 30, "catch an exception")
    requested = body["query"]["neural_sparse"]["sparse"]
    assert list(requested["query_tokens"]) == [str(TOKENS.index(token)) for token in ("except", "##ion", "catch", "an")]
    assert requested["method_parameters"] == {"k": 30}


def test_each_option_has_its_body(model: Path) -> None:
    filtered = body_of("--model", model, "--filter", '{"term": {"tag": "a"}}', "catch")
    assert filtered["query"]["bool"]["filter"] == [{"term": {"tag": "a"}}]
    two = body_of("--model", model, "--engine", "two-phase", "catch")
    assert "neural_sparse_two_phase_processor" in two["search_pipeline"]["request_processors"][0]
    hybrid = body_of("--model", model, "--hybrid", "catch")
    assert hybrid["search_pipeline"] == packaged_search_pipeline("hybrid")
    named = body_of("--model", model, "--hybrid", "--search-pipeline", "mine", "catch")
    assert named == {**hybrid, "search_pipeline": "mine"}
    weighted = ["--hybrid-weights", "0.3,0.7", "--hybrid-normalization", "l2", "--collapse", "parent"]
    changed = body_of("--model", model, "--set", "query.hybrid=true", *weighted, "catch")
    [processor] = changed["search_pipeline"]["phase_results_processors"][0].values()
    assert processor["combination"]["parameters"] == {"weights": [0.3, 0.7]}
    assert (processor["normalization"], changed["collapse"]) == ({"technique": "l2"}, {"field": "parent"})
    fused = body_of("--model", model, "--hybrid", "--hybrid-combination", "rrf", "catch")
    assert fused["search_pipeline"] == packaged_search_pipeline("rrf")
    plain = body_of("--model", model, "--without-plugin", "catch")
    assert plain["query"]["bool"]["should"] == [{"rank_feature": {"field": "sparse.catch", "linear": {}, "boost": 2.5}}]
    assert body_of("--model", model, "--collapse", "parent", "catch")["collapse"] == {"field": "parent"}


def test_with_an_analyzer_or_model_id_no_model_is_needed() -> None:
    requested = body_of("--analyzer", "bert-uncased", "catch")["query"]["neural_sparse"]["sparse"]
    assert requested == {"query_text": "catch", "analyzer": "bert-uncased"}
    requested = body_of("--model-id", "abc", "catch")["query"]["neural_sparse"]["sparse"]
    assert requested == {"query_text": "catch", "model_id": "abc"}


def test_a_query_file_gives_an_msearch_body(tmp_path: Path, model: Path, opensearch_url: str, index_name: str) -> None:
    run = make_run(tmp_path / "run", {"a": {"catch": 1.0}, "b": {"river": 2.0}}, model=str(model))
    load(run.path, index=index_name, pipeline=Pipeline(), connection=Connection(url=opensearch_url))
    queries = tmp_path / "queries.jsonl"
    queries.write_text('{"_id": "1", "text": "catch"}\n{"_id": "2", "text": "river"}\n{"_id": "3", "text": "zebra"}\n')
    client = connect(Connection(opensearch_url))
    named = ["--index", index_name]
    requested = (
        (f"/{index_name}/_msearch", []),
        ("/_msearch", [*named, "--force", "--url", opensearch_url]),
        ("/_msearch", named),
    )
    for path, options in requested:
        result = CliRunner().invoke(
            query, ["--model", str(model), "--queries", str(queries), *options], env={"SPARSE_INGEST_URL": NO_SERVER}
        )
        assert ("are not used: Nothing listens" in result.stderr) == (options == named)
        assert result.exit_code == 0, result.exception
        answer = client.call("POST", path, result.stdout_bytes)
        assert [[hit["_id"] for hit in one["hits"]["hits"]] for one in answer["responses"]] == [["a"], ["b"], []]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--hybrid", "--analyzer", "a"], "--hybrid and --analyzer cannot be combined"),
        (["--analyzer", "a", "--collapse", "parent"], "--analyzer and --collapse cannot be combined"),
        (["--hybrid", "--search-pipeline", "p", "--hybrid-weights", "0.5,0.5"], "--hybrid-weights is a setting of the"),
        (["--hybrid-weights", "0.5,0.5"], "hybrid_weights has no effect without a hybrid search"),
        (["--set", "query.hybrid=true", "--without-plugin"], "--hybrid and --without-plugin cannot be combined"),
        (["--quoting", "none"], "--quoting needs --queries"),
        (["--index", "i", "--analyzer", "a"], "--index needs --queries"),
        (["--url", "http://127.0.0.1:1"], "--url needs --index"),
    ],
)
def test_options_without_an_effect_are_refused(model: Path, options: list[str], message: str) -> None:
    result = invoke(query, "--model", model, *options, "catch")
    assert isinstance(result.exception, UsageError)
    assert message in str(result.exception)


def test_quoting_none_reads_every_line_of_csv_queries(model: Path, tmp_path: Path) -> None:
    (tmp_path / "q.csv").write_text('id,text\n1,"catch\n2,river"\n')
    for options, bodies in (([], 1), (["--quoting", "none"], 2)):
        result = invoke(query, "--model", model, "--queries", tmp_path / "q.csv", *options)
        assert result.exit_code == 0 and len(result.stdout.splitlines()) == 2 * bodies, result.exception


def test_weights_that_the_server_computes_cannot_be_pruned() -> None:
    for setting in ("query.top_k=3", "query.max_ratio=0.1"):
        result = invoke(query, "--analyzer", "bert-uncased", "--set", setting, "catch")
        assert isinstance(result.exception, UsageError)
        assert "cannot prune weights that the server computes" in str(result.exception)


def test_more_words_than_clauses_are_refused_before_any_request(model: Path) -> None:
    words = " ".join(f"w{number}" for number in range(600))
    result = invoke(query, "--model", model, "--hybrid", f"catch {words}")
    assert "1 tokens and 1202 other clauses" in str(result.exception)


def test_the_weight_table_of_a_model_is_printed(model: Path) -> None:
    result = invoke(query, "--model", model, "--table")
    assert result.exit_code == 0, result.exception
    # In the order of token ids, without special tokens and "stone", which has 0; tokens missing in idf.json have 1.0.
    assert json.loads(result.stdout) == {
        "catch": 2.5,
        "an": pytest.approx(0.1),
        "except": 4.75,
        "##ion": 2.5,
        "river": 1.0,
    }
    assert "5 tokens have a weight" in result.stderr
    assert "--table prints a property of the model" in str(
        invoke(query, "--model", model, "--table", "catch").exception
    )


def test_a_model_without_a_weight_table_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"architectures": ["BertForMaskedLM"], "model_type": "bert"}')
    result = invoke(query, "--model", tmp_path, "--table")
    assert isinstance(result.exception, UsageError)
    assert "encoded by a masked LM, which has no weight table" in str(result.exception)
    assert "give --model or --pipeline" in str(invoke(query, "--table").exception)
