"""Options of Ray that need another one, or exclude it. Ray need not be installed."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.runs import make_run

from sparse_ingest.encoding.encode import encode
from sparse_ingest.errors import UsageError
from sparse_ingest.loading.load import load


@pytest.mark.parametrize("options, message", [
    ({"workers": 2}, "--workers is an option of Ray. Pass --executor ray, or omit it."),
    ({"worker_cpus": 2}, "--worker-cpus is an option of Ray."),
    ({"executor": "ray", "part": "1/2"}, "--executor ray encodes all shards"),
    ({"executor": "ray", "device": "cuda:0"}, "--device cuda:0: Ray assigns GPUs to workers."),
])  # fmt: skip
def test_options_that_exclude_each_other_are_refused(tmp_path: Path, options: dict, message: str) -> None:
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text('{"_id": "1", "text": "a"}\n')
    with pytest.raises(UsageError, match=message):
        encode(corpus, tmp_path / "run", model="unused", **options)
    assert not (tmp_path / "run").exists()


def test_standard_input_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--executor ray: only one process can read standard input"):
        encode("-", tmp_path / "run", model="unused", executor="ray")


@pytest.mark.parametrize("options, message", [
    ({"executor": "ray", "since": "old"}, "--since compares two runs in one process"),
    ({"workers": 2}, "--workers is an option of Ray"),
])  # fmt: skip
def test_load_refuses_them_too(tmp_path: Path, options: dict, message: str) -> None:
    make_run(tmp_path / "old")
    options = {name: str(tmp_path / "old") if value == "old" else value for name, value in options.items()}
    with pytest.raises(UsageError, match=message):
        load(make_run(tmp_path / "run"), index="unused", url="http://127.0.0.1:1", **options)
