"""`encode --reuse OLD_RUN`: vectors of equal texts are copied, and everything else is as without it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from support.checkpoints import make_masked_lm
from support.forked import Answer, command
from support.run_contents import contents, documents, lasting, write

from sparse_ingest.models.vectors import VectorMaker
from sparse_ingest.runs.run import open_run
from sparse_ingest.runs.shards import read_shard

ROWS = [{"_id": f"d{place}", "text": f"the river stone {place} " * (place % 9), "year": place} for place in range(40)]
OVERFLOW = {"truncate": [], "windows": ["--set", "encode.overflow=windows", "--set", "encode.window_stride=9"]}


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_masked_lm(tmp_path_factory.mktemp("reused") / "tiny")


@pytest.fixture
def encode(model: Path, tmp_path: Path) -> Callable[..., Answer]:
    """Return a function that encodes rows into the run `out`, with at most 20 tokens per document."""

    def run(rows: list, out: str, *options: object) -> Answer:
        corpus = write(tmp_path / "corpora" / out / "corpus.jsonl", rows)
        return command("encode", "--model", model, "--corpus", corpus, "--out", tmp_path / out, "--shard-rows", 16,
                       "--device", "cpu", "--dtype", "float32", "--max-length", 20, "--json", *options)  # fmt: skip

    return run


@pytest.mark.parametrize("overflow", ["windows", pytest.param("truncate", marks=pytest.mark.slow)])
def test_reusing_all_texts_gives_identical_shards(overflow: str, encode, tmp_path: Path, monkeypatch) -> None:
    options = [*OVERFLOW[overflow], "--set", "encode.top_k=12", "--keep", "year"]
    renamed = [{**row, "_id": f"new {row['_id']}", "year": row["year"] + 1} for row in ROWS]
    assert encode(ROWS, "old", *options).code == encode(renamed, "computed", *options).code == 0
    monkeypatch.setattr(VectorMaker, "compute", None)  # computing a vector fails
    answer = encode(renamed, "reused", *options, "--reuse", tmp_path / "old")
    assert answer.code == 0, answer.err
    one, other = open_run(tmp_path / "computed"), open_run(tmp_path / "reused")
    report = json.loads(answer.out)
    assert report["reused"] == report["rows"] == 40
    if overflow == "truncate":
        assert report["truncated"] == 19 and report["windows"] == 40
    else:
        assert report["truncated"] == 0 and report["windows"] > 60
    assert contents(one.path / "shards") == contents(other.path / "shards")
    assert one.manifest.run_id == other.manifest.run_id and one.vocabulary() == other.vocabulary()
    assert [record["reused"] for record in lasting(other)] == [16, 16, 8]
    counted = [{**record, "reused": 0} for record in lasting(other)]
    assert all(record["of_rows"].pop("reused") for record in counted)
    assert counted == lasting(one)
    assert not [path for path in (other.path / "tmp").rglob("*") if path.is_file()]


def test_new_texts_are_encoded_and_the_others_are_copied_exactly(encode, tmp_path: Path) -> None:
    new = [{"_id": "last", "text": "the tree " * 30}, {**ROWS[8], "text": "another bird"}]
    rows = [{"_id": "first", "text": "a lamp on fire"}, *ROWS[20:], *ROWS[:7], *new]
    assert encode(ROWS, "old").code == encode(rows, "computed").code == 0
    answer = encode(rows, "reused", "--reuse", tmp_path / "old")
    assert answer.code == 0, answer.err
    assert "Vectors of equal texts are copied" in answer.err
    found, old, computed = (documents(open_run(tmp_path / name)) for name in ("reused", "old", "computed"))
    assert list(found) == list(computed) == [row["_id"] for row in rows]
    fresh = {"first", "last", "d8"}
    assert json.loads(answer.out)["reused"] == len(rows) - len(fresh)
    assert json.loads(answer.out)["truncated"] == sum(r["truncated"] for r in lasting(open_run(tmp_path / "computed")))
    by_text = {row["text"]: old[row["_id"]][2] for row in ROWS}
    for row in rows:
        reused, expected = found[row["_id"]], computed[row["_id"]]
        assert reused[:2] == expected[:2]
        if row["_id"] not in fresh:
            assert reused[2] == by_text[row["text"]]
        assert reused[2].keys() == expected[2].keys()
        assert all(abs(weight - expected[2][token]) <= 2e-3 for token, weight in reused[2].items())


def test_a_run_with_reused_vectors_can_be_resumed_and_reused(encode, tmp_path: Path) -> None:
    assert encode(ROWS[:10], "first").code == 0
    assert (
        json.loads(encode(ROWS, "second", "--reuse", tmp_path / "first").out)["reused"] == 10 + 3
    )  # 3 more with an empty text
    run = open_run(tmp_path / "second")
    before = contents(run.path)
    assert encode(ROWS, "second").code == 0 and contents(run.path) == before
    assert json.loads(encode(ROWS, "third", "--reuse", run.path).out)["reused"] == 40
    assert contents(tmp_path / "third" / "shards") == contents(run.path / "shards")
    run.unmark_done(1)
    assert json.loads(encode(ROWS, "second").out)["reused"] == 10 + 3 - 2


def test_a_run_with_other_settings_is_refused_before_anything_is_written(encode, tmp_path: Path) -> None:
    assert encode(ROWS, "old").code == 0
    for options, setting in (
        (["--weights", "float32"], "weights: it has 'float16', requested: 'float32'"),
        (["--max-length", 19], "model.max_length: it has 20, requested: 19"),
        (["--set", "encode.top_k=5"], "top_k: it has none, requested: 5"),
        (["--dtype", "bfloat16"], "dtype: it has 'float32', requested: 'bfloat16'"),
        (OVERFLOW["windows"], "overflow: it has 'truncate', requested: 'windows'"),
    ):
        answer = encode(ROWS, "new", *options, "--reuse", tmp_path / "old")
        assert answer.code == 1 and setting in answer.err, answer.err
        assert not (tmp_path / "new").exists()
    for folder, code, message in (("old", 2, "is the same run as --out"), ("nothing", 1, "is not a run")):
        answer = encode(ROWS, "old", "--reuse", tmp_path / folder)
        assert answer.code == code and message in answer.err


def test_a_run_with_another_window_stride_is_refused(encode, tmp_path: Path) -> None:
    assert encode(ROWS, "old", *OVERFLOW["windows"]).code == 0
    answer = encode(ROWS, "new", "--set", "encode.overflow=windows", "--reuse", tmp_path / "old")
    assert answer.code == 1 and "window_stride: it has 9, requested: none" in answer.err


def test_stored_types_are_the_same_with_reuse(encode, tmp_path: Path) -> None:
    assert encode(ROWS, "old").code == 0
    assert encode([*ROWS[:3], {"_id": "x", "text": "new"}], "new", "--reuse", tmp_path / "old").code == 0
    (part,) = read_shard(open_run(tmp_path / "new").shard_path(0))
    assert (part.vectors.token_ids.dtype, part.vectors.weights.dtype) == (np.uint16, np.float16)
