"""`encode --dry-run --model M` predicts the run that `encode` writes, and quotes only measured speeds."""

from __future__ import annotations

import random
import re
from pathlib import Path

import pytest
from support.checkpoints import WORDS, make_masked_lm
from support.reporters import Recorder

from sparse_ingest.encoding import trial
from sparse_ingest.encoding.encode import dry_run, encode
from sparse_ingest.models.tokenizer import Tokenizer
from sparse_ingest.pipeline import ModelSettings

BENCHMARKS = Path(__file__).parents[2] / "benchmarks" / "README.md"


class Planned(Recorder):
    tokens = planned = 0

    def plan(self, count: int, tokens: int) -> None:
        self.planned += tokens

    def advance(self, count: int, *, tokens: int = 0, detail: str = "") -> None:
        super().advance(count)
        self.tokens += tokens


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_masked_lm(tmp_path_factory.mktemp("trial") / "model"))


def texts(count: int) -> list[dict[str, object]]:
    chance = random.Random(5)
    lengths = [min(200, int(chance.lognormvariate(2.5, 1.2))) for _ in range(count)]
    return [{"_id": str(place), "text": " ".join(chance.choices(WORDS, k=n))} for place, n in enumerate(lengths)]


@pytest.mark.parametrize("overflow", ["truncate", "windows", pytest.param("passages", marks=pytest.mark.slow)])
def test_the_prediction_is_that_of_the_run(overflow: str, model: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(trial, "_WARM_DOCUMENTS", 16)
    monkeypatch.setattr(trial, "TRIAL_S", 3600.0)
    how = {"model": model, "dtype": "float32", "device": "cpu", "max_length": 24, "overflow": overflow}
    recorder = Planned()
    found = dry_run(texts(400), progress=recorder, **how).prediction
    assert found is not None and found.sampled == 400
    assert [note for note in recorder.notes if "Encoding with" in note] == recorder.notes[1:]
    run = encode(texts(400), tmp_path / "run", progress=recorder, **how)
    assert recorder.planned == recorder.tokens
    assert found.tokens == pytest.approx(recorder.tokens, rel=0.01)
    assert found.terms == run.report.terms
    size = sum(path.stat().st_size for path in (tmp_path / "run").rglob("*") if path.is_file())
    assert found.run_bytes == pytest.approx(size, rel=0.1)
    assert found.index_bytes > 0 and found.seconds > 0 and found.tokens_per_second > 0
    assert [other["seconds"] for other in found.others] == [None, None]


def test_a_prediction_from_a_sample_is_for_the_complete_corpus(model: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(trial, "TRIAL_S", 0.0)
    monkeypatch.setattr(trial, "_WARM_DOCUMENTS", 100)
    how = {"model": model, "dtype": "float32", "device": "cpu"}
    found = dry_run(texts(400), **how).prediction
    terms = encode(texts(400), tmp_path / "run", **how).report.terms
    assert found is not None and found.sampled == 100 and found.terms == pytest.approx(terms, rel=0.3)
    assert dry_run([{"_id": "1", "text": ""}], **how).prediction.sampled == 1


def test_a_cut_knows_the_tokens_of_its_windows(model: str) -> None:
    for prompt, stride in (("", None), ("the river ", 3), ("", 14)):
        settings = ModelSettings(document=model, max_length=16, document_prompt=prompt)
        tokenizer = Tokenizer(Path(model), settings, window_stride=stride)
        for cut in tokenizer.cut(["", "stone", "stone " * 14, "stone " * 15, "river stone " * 40]):
            assert cut.tokens == sum(len(cut.window(number)) for number in range(cut.windows))


def test_quoted_speeds_are_those_of_the_benchmarks() -> None:
    page = BENCHMARKS.read_text().partition("### On a CPU with AVX512")[2]
    for (layers, width), speed in trial.MEASURED.items():
        section = re.search(rf"\*\*[\w-]+\*\* \({width} wide, {layers} layers\).*?(?=\n\*\*|\n### )", page, re.DOTALL)
        rows = re.findall(rf"\| sparse-ingest, [\w-]+ \| {trial.MEASURED_DTYPE} \|(.*)", section[0])  # type: ignore[index]
        assert [row.split(" | ")[3] for row in rows] == [f"{speed:,}"]
