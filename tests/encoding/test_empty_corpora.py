"""A corpus without documents is an error: a broken pipe must not replace a served index by an empty one."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from support.checkpoints import make_masked_lm
from support.forked import Answer, command

import sparse_ingest
from sparse_ingest.errors import CorpusError
from sparse_ingest.runs.run import open_run


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_masked_lm(tmp_path_factory.mktemp("checkpoint") / "tiny")


def encode(model: Path, out: Path, corpus: object, *options: object) -> Answer:
    return command("encode", "--model", model, "--corpus", corpus, "--out", out, "--device", "cpu", *options)


def set_stdin(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(text.encode())))


def test_empty_standard_input_is_an_error_and_the_run_folder_can_be_used_again(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for out in (tmp_path / "filled", tmp_path / "allowed"):
        set_stdin(monkeypatch, "")
        answer = encode(model, out, "-")
        assert answer.code == 1
        assert "The corpus has no documents (no rows)" in answer.err
        assert "--allow-empty" in answer.err
        assert open_run(out).complete() is None
    set_stdin(monkeypatch, json.dumps({"id": "a", "text": "river"}) + "\n")
    assert encode(model, tmp_path / "filled", "-").code == 0
    assert open_run(tmp_path / "filled").report.rows == 1
    set_stdin(monkeypatch, "")
    assert encode(model, tmp_path / "allowed", "-", "--allow-empty").code == 0
    run_id = open_run(tmp_path / "allowed").manifest.run_id
    assert open_run(tmp_path / "allowed").report.rows == 0
    # An existing complete run without documents is an error without the option. Earlier releases wrote such runs.
    set_stdin(monkeypatch, "")
    assert encode(model, tmp_path / "allowed", "-").code == 1
    assert open_run(tmp_path / "allowed").manifest.run_id == run_id


@pytest.mark.parametrize("content", ["", "\n\n"])
def test_a_file_without_rows_is_an_error(model: Path, tmp_path: Path, content: str) -> None:
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text(content)
    assert encode(model, tmp_path / "run", corpus).code == 1
    dry = encode(model, tmp_path / "run", corpus, "--dry-run")
    assert (dry.code, "has no documents" in dry.err) == (1, True)
    assert encode(model, tmp_path / "run", corpus, "--dry-run", "--allow-empty").code == 0
    assert encode(model, tmp_path / "run", corpus, "--allow-empty", "--json").code == 0


def test_a_corpus_of_only_skipped_rows_is_an_error_and_keeps_their_list(model: Path, tmp_path: Path) -> None:
    corpus, out = tmp_path / "corpus.jsonl", tmp_path / "run"
    corpus.write_text("".join(json.dumps({"id": "", "text": f"{number}"}) + "\n" for number in range(20)))
    options = ("--on-bad-document", "skip", "--shard-rows", 8)
    answer = encode(model, out, corpus, *options)
    assert answer.code == 1
    assert f"all 20 rows were skipped; {out / 'skipped'} lists them" in answer.err
    before = {path: path.read_bytes() for folder in ("done", "skipped", "shards") for path in (out / folder).iterdir()}
    assert len(before) == 9
    answer = encode(model, out, corpus, *options, "--allow-empty", "--json")
    assert (answer.code, json.loads(answer.out)["skipped"]) == (3, 20)
    assert {path: path.read_bytes() for path in before} == before


def test_the_python_api_has_allow_empty(model: Path, tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match="has no documents"):
        sparse_ingest.encode(iter([]), tmp_path / "run", model=str(model), device="cpu")
    run = sparse_ingest.encode(iter([]), tmp_path / "run", model=str(model), device="cpu", allow_empty=True)
    assert run.report.rows == 0
