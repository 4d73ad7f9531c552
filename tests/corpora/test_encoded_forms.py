"""`encode` writes the same shards from every file format, also after an interruption."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
from support.checkpoints import make_masked_lm
from support.forked import command
from support.forms import FORMS, write_form

from sparse_ingest.runs.run import open_run

WORDS = "the river stone cloud lamp sparse vector tree house bird ü é 日 本".split()


def rows_of(count: int) -> list[dict[str, str | None]]:
    return [
        {
            "_id": f"d{number}",
            "title": f'{WORDS[number % 7]} "{number}"' if number % 3 else "",
            "text": f"{' '.join(WORDS[: number % len(WORDS)])}, {number}\n" * (number % 4),
        }
        for number in range(count)
    ]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_masked_lm(tmp_path_factory.mktemp("checkpoint") / "tiny")


def encode(model: Path, corpus: Path, out: Path, *options: object) -> None:
    answer = command("encode", "--model", model, "--corpus", corpus, "--out", out, "--device", "cpu",
                     "--dtype", "float32", *options)  # fmt: skip
    assert answer.code == 0, answer


def shards(run: Path) -> list[str]:
    return [hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted((run / "shards").iterdir())]


def hashes(run: Path) -> list[str]:
    opened = open_run(run)
    return [(opened.done(shard) or {})["input_sha256"] for shard in opened.done_shards()]


def compare(model: Path, folder: Path, forms: tuple[str, ...], rows: int, shard_rows: int) -> None:
    expected = None
    for form in forms:
        run = folder / f"run{form}"
        encode(model, write_form(folder, form, rows_of(rows)), run, "--shard-rows", shard_rows)
        found = shards(run), hashes(run)
        assert len(found[0]) == -(-rows // shard_rows)
        expected = expected or found
        assert found == expected, form


def test_three_formats_give_the_same_shards(model: Path, tmp_path: Path) -> None:
    compare(model, tmp_path, (".jsonl", ".csv.gz", ".parquet"), rows=40, shard_rows=16)


@pytest.mark.slow
def test_every_format_gives_the_same_shards_of_1000_documents(model: Path, tmp_path: Path) -> None:
    compare(model, tmp_path, FORMS, rows=1000, shard_rows=300)


@pytest.mark.parametrize("form", [".tsv", ".feather"])
def test_an_interrupted_run_continues_in_the_middle_of_a_file(model: Path, tmp_path: Path, form: str) -> None:
    corpus = write_form(tmp_path, form, rows_of(40))
    encode(model, corpus, tmp_path / "whole", "--shard-rows", 16)
    encode(model, corpus, tmp_path / "run", "--shard-rows", 16)
    run = open_run(tmp_path / "run")
    (tmp_path / "run" / "complete.json").unlink()
    for part in ("done/part-00002.json", "shards/part-00002.parquet"):
        (tmp_path / "run" / part).unlink()
    assert json.loads((tmp_path / "run/done/part-00001.json").read_text())["next"][3] == 32
    encode(model, corpus, run.path, "--shard-rows", 16, "--trust-corpus")
    assert shards(tmp_path / "run") == shards(tmp_path / "whole")
