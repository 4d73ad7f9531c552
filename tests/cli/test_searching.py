"""`query` and `search` on the command line, with a weight table as the model."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from made_runs import make_run
from made_tables import TOKENS, write_table

from sparse_ingest.cli.searching import COMMANDS, query, search
from sparse_ingest.errors import ClusterError, UsageError
from sparse_ingest.load import load
from sparse_ingest.opensearch.client import Connection
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
    folder = tmp_path / "model"
    folder.mkdir()
    write_table(folder)
    return folder


@pytest.fixture
def run_path(tmp_path: Path, model: Path) -> Path:
    return make_run(tmp_path / "run", DOCUMENTS, fields=FIELDS, model=str(model)).path


def invoke(command, *arguments: object) -> Result:
    return CliRunner().invoke(command, [str(argument) for argument in arguments], catch_exceptions=True)


def test_query_prints_the_body_of_a_request(model: Path) -> None:
    result = invoke(query, "--model", model, "--set", "index.field=v", "-k", 3, "catch an exception")
    assert result.exit_code == 0, result.stderr
    body = json.loads(result.stdout)
    assert body["size"] == 3
    assert list(body["query"]["neural_sparse"]["v"]["query_tokens"]) == ["except", "##ion", "catch", "an"]


def test_query_reads_a_pipeline_file_and_says_when_it_scales(tmp_path: Path, model: Path) -> None:
    (model / "idf.json").write_text(json.dumps({"catch": 100.0, "river": 1.0}))
    (tmp_path / "p.toml").write_text('[model]\ndocument = "model"\n[query]\ntop_k = 1\n')
    result = invoke(query, "--pipeline", tmp_path / "p.toml", "catch river")
    assert json.loads(result.stdout)["query"]["neural_sparse"]["sparse"]["query_tokens"] == {"catch": 50.0}
    assert "divided by 2" in result.stderr


def test_query_without_a_model_is_a_usage_error() -> None:
    result = invoke(query, "catch")
    assert isinstance(result.exception, UsageError)


def test_query_of_nothing_asks_for_nothing_and_says_so(model: Path, caplog: pytest.LogCaptureFixture) -> None:
    result = invoke(query, "--model", model, "zebra")
    assert json.loads(result.stdout)["query"] == {"match_none": {}}
    assert "nothing can be found" in caplog.text


def test_search_of_a_run_prints_hits_and_terms_with_the_runs_own_model(run_path: Path) -> None:
    result = invoke(search, "--run", run_path, "catch an exception")
    assert result.exit_code == 0, result.stderr
    assert result.stdout == EXPECTED


def test_search_of_an_index_prints_the_same_with_the_model_of_its_stamp(
    run_path: Path, opensearch_url: str, index_name: str
) -> None:
    load(run_path, index=index_name, pipeline=Pipeline(), connection=Connection(url=opensearch_url))
    result = invoke(search, "--index", index_name, "--url", opensearch_url, "catch an exception")
    assert result.exit_code == 0, result.exception
    assert result.stdout == EXPECTED


def test_a_sparse_vector_index_is_asked_by_token_id_and_answers_with_tokens(
    tmp_path: Path, model: Path, opensearch_url: str, index_name: str
) -> None:
    run = make_run(tmp_path / "run", DOCUMENTS, fields=FIELDS, model=str(model), vocabulary=TOKENS)
    pipeline = Pipeline(index=IndexSettings(kind="sparse_vector"))
    load(run.path, index=index_name, pipeline=pipeline, connection=Connection(url=opensearch_url))
    result = invoke(search, "--index", index_name, "--url", opensearch_url, "--json", "catch an exception")
    assert result.exit_code == 0, result.exception
    hits = json.loads(result.stdout)["hits"]
    assert [hit["id"] for hit in hits] == ["second", "first"]
    assert [[term["token"] for term in hit["terms"]] for hit in hits] == [["except", "##ion"], ["catch", "except"]]
    # Clusters score by bytes.
    assert [hit["score"] for hit in hits] == pytest.approx([12.0, 6.125], rel=0.02)
    printed = invoke(query, "--model", model, "--set", "index.kind=sparse_vector", "-k", 30, "catch an exception")
    asked = json.loads(printed.stdout)["query"]["neural_sparse"]["sparse"]
    assert list(asked["query_tokens"]) == [str(TOKENS.index(token)) for token in ("except", "##ion", "catch", "an")]
    assert asked["method_parameters"] == {"k": 30}


def test_a_sparse_vector_index_of_another_vocabulary_is_refused(
    tmp_path: Path, model: Path, opensearch_url: str, index_name: str
) -> None:
    run = make_run(tmp_path / "run", DOCUMENTS, model=str(model), vocabulary=TOKENS[::-1])
    pipeline = Pipeline(index=IndexSettings(kind="sparse_vector"))
    load(run.path, index=index_name, pipeline=pipeline, connection=Connection(url=opensearch_url))
    result = invoke(search, "--index", index_name, "--url", opensearch_url, "catch an exception")
    assert isinstance(result.exception, ClusterError)
    assert "keyed by the token ids of another vocabulary" in str(result.exception)


def test_search_as_json_has_every_term_and_field(run_path: Path) -> None:
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


def test_search_that_finds_nothing_prints_nothing_on_stdout(run_path: Path) -> None:
    result = invoke(search, "--run", run_path, "an")
    assert (result.exit_code, result.stdout) == (0, "")
    assert "Nothing found." in result.stderr


def test_search_takes_exactly_one_of_index_and_run(run_path: Path) -> None:
    for arguments in ([], ["--index", "a", "--run", run_path]):
        result = invoke(search, *arguments, "catch")
        assert isinstance(result.exception, UsageError)
        assert result.exception.exit_code == 2


def test_a_model_on_the_command_line_overrides_the_runs(tmp_path: Path, run_path: Path, model: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    write_table(other)
    (other / "idf.json").write_text('{"river": 1.0, "catch": 0.0}')
    result = invoke(search, "--run", run_path, "--model", other, "catch river")
    assert [line.split()[2] for line in result.stdout.splitlines() if line[:3].strip()] == ["second", "third"]


def test_help_needs_none_of_the_heavy_libraries() -> None:
    code = (
        "import sys; from sparse_ingest.cli.searching import COMMANDS\n"
        "for command in COMMANDS: command(['--help'], standalone_mode=False)\n"
        "print([name for name in ('torch', 'opensearchpy', 'numpy', 'pyarrow', 'tokenizers') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
    assert [command.name for command in COMMANDS] == ["query", "search"]
