"""From `encode` to `search`: the model recorded in a run is enough to encode queries."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner
from support.checkpoints import make_masked_lm, make_router

from sparse_ingest.cli.main import cli
from sparse_ingest.models.query_encoders import query_encoder
from sparse_ingest.pipeline import Pipeline, read_pipeline
from sparse_ingest.runs.run import open_run
from sparse_ingest.searching.pipelines import pipeline_of_run

TEXTS = ("the river and the stone", "a bird of fire", "water " * 60)
QUERIES = ("river stone", "the Bird [UNK] \U0001f600", "water " * 60 + "stone")


@pytest.fixture(scope="module")
def pipeline_files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Pipeline files by name."""
    root = tmp_path_factory.mktemp("runs")
    (root / "corpus.jsonl").write_text(
        "".join(json.dumps({"id": str(n), "text": text}) + "\n" for n, text in enumerate(TEXTS))
    )
    make_masked_lm(root / "doc", "distilbert", model_max_length=40)
    make_masked_lm(root / "query", "bert", seed=7, model_max_length=9)
    make_router(root / "router", root / "doc", table="IDF", activation="log1p_relu", prompts={"query": "the "})
    for name, lines in {
        "pair": 'document = "doc"\nquery = "query"',
        "router": 'document = "router"\nquery_special_tokens = "zero"',
    }.items():
        (root / f"{name}.toml").write_text(f'[model]\n{lines}\n[encode]\ndtype = "float32"\n')
    return {name: str(root / f"{name}.toml") for name in ("pair", "router")}


@pytest.mark.parametrize("name", ["pair", "router"])
def test_a_run_is_searched_with_the_query_model_of_its_pipeline(
    name: str, pipeline_files: dict[str, str], tmp_path: Path
) -> None:
    corpus = Path(pipeline_files[name]).with_name("corpus.jsonl")
    arguments = ["encode", "--pipeline", pipeline_files[name], "--corpus", str(corpus), "--out", str(tmp_path / "run")]
    result = CliRunner().invoke(cli, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    pipeline = pipeline_of_run(Pipeline(), open_run(tmp_path / "run"))
    expected = query_encoder(read_pipeline(pipeline_files[name]).model).encode(QUERIES)
    assert all(expected)
    assert query_encoder(pipeline.model).encode(QUERIES) == expected
    found = CliRunner().invoke(cli, ["search", "--run", str(tmp_path / "run"), "--json", QUERIES[0]])
    assert found.exit_code == 0, found.output
    assert json.loads(found.stdout)
