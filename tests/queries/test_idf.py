"""`idf`: token weights counted in a corpus, compared with a separate count, and used in queries."""

from __future__ import annotations

import gzip
import json
import math
import random
import struct
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from support.forked import command
from support.reporters import Recorder
from support.tables import TOKENS, write_table
from tokenizers import Tokenizer

from sparse_ingest.corpora.documents import FieldNames
from sparse_ingest.corpora.files import open_corpus
from sparse_ingest.corpora.sources import START, Corpus
from sparse_ingest.errors import CheckpointError, CorpusError, UsageError
from sparse_ingest.models.query_encoders import query_encoder
from sparse_ingest.pipeline import ModelSettings
from sparse_ingest.queries import idf

WORDS = ("catch", "an", "exception", "river", "stone", "[CLS]", "zebra", "EXCEPTION", "  ", "river,stone")
NAMES = FieldNames(carry_text=False)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A plain layout without model weights; queries need none."""
    folder = tmp_path / "model"
    folder.mkdir()
    write_table(folder)
    (folder / "idf.json").unlink()
    config = {"architectures": ["BertForMaskedLM"], "model_type": "bert", "vocab_size": len(TOKENS) + 2}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def write_corpus(path: Path, texts: list[str]) -> str:
    rows = (json.dumps({"_id": str(number), "text": text}) + "\n" for number, text in enumerate(texts))
    path.write_text("".join(rows))
    return str(path)


def counted(folder: Path, spec: str, out: Path, **options) -> idf.IdfReport:
    model = options.pop("model", ModelSettings(document=str(folder)))
    return idf.write_idf(open_corpus([spec], fields=NAMES), out, model=model, **options)


def float32(value: float) -> float:
    return struct.unpack("<f", struct.pack("<f", value))[0]


def recounted(tokenizer: Tokenizer, texts: list[str]) -> dict[str, float]:
    """Count and weigh again, text by text, without code of the package."""
    tokenizer.no_truncation()
    tokenizer.no_padding()
    special = {token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special}
    holding: Counter[str] = Counter()
    total = 0
    for text in texts:
        tokens = set(tokenizer.encode(text, add_special_tokens=False).tokens) - special
        holding.update(tokens)
        total += bool(tokens)
    return {token: math.log(1 + (total - count + 0.5) / (count + 0.5)) for token, count in holding.items()}


def test_counts_are_exact_over_many_batches(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(idf, "BATCH_TEXTS", 7)
    chance = random.Random(3)
    texts = [" ".join(chance.choices(WORDS, k=chance.randrange(9))) for _ in range(300)]
    report = counted(folder, write_corpus(tmp_path / "c.jsonl", texts), tmp_path / "idf.json")
    table = json.loads((tmp_path / "idf.json").read_bytes())
    wanted = recounted(Tokenizer.from_file(str(folder / "tokenizer.json")), texts)
    assert {token: weight for token, weight in table.items() if token in wanted} == {
        token: float32(weight) for token, weight in wanted.items()
    }
    assert list(table) == TOKENS
    assert {token for token, weight in table.items() if weight == 1.0} == set(TOKENS) - wanted.keys()
    assert (report.documents + report.empty, report.seen, report.vocabulary) == (300, len(wanted), len(TOKENS))
    assert report.empty > 0


def test_the_formula_matches_the_published_table() -> None:
    """Its largest weight is the weight of a token in 1 of the 8,841,823 passages of MS MARCO."""
    assert float32(idf.weight_of(1, 8_841_823)) == 15.58953857421875
    assert idf.weight_of(10**9, 10**9) > 0


def test_queries_use_the_table(folder: Path, tmp_path: Path) -> None:
    texts = ["catch a river", "river", "an exception", "river stone"]
    counted(folder, write_corpus(tmp_path / "c.jsonl", texts), folder / "idf.json")
    weights = query_encoder(ModelSettings(document=str(folder))).encode(["Catch the river [CLS]"])[0]
    assert weights == {"catch": float32(idf.weight_of(1, 4)), "river": float32(idf.weight_of(3, 4))}


def test_truncation_in_tokenizer_json_is_ignored(folder: Path, tmp_path: Path) -> None:
    spec = write_corpus(tmp_path / "c.jsonl", ["an an an an an an stone", "river"])
    counted(folder, spec, tmp_path / "idf.json")
    table = json.loads((tmp_path / "idf.json").read_bytes())
    assert table["stone"] == table["river"] == float32(idf.weight_of(1, 2))


def test_title_and_text_are_joined_and_lowercased_first(folder: Path, tmp_path: Path) -> None:
    content = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").write_text(json.dumps({**content, "normalizer": None}))
    path = tmp_path / "c.jsonl.gz"
    rows = [{"_id": "a", "title": "RIVER", "text": "stone"}, {"_id": "b", "text": "river"}]
    path.write_bytes(gzip.compress("\n".join(map(json.dumps, rows)).encode()))
    settings = ModelSettings(document=str(folder), lower_case=True)
    assert counted(folder, str(path), tmp_path / "idf.json", model=settings).documents == 2
    assert json.loads((tmp_path / "idf.json").read_bytes())["river"] == float32(idf.weight_of(2, 2))


def test_a_bad_document_fails_the_command_or_is_skipped_and_counted(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "c.jsonl"
    path.write_text('{"_id": "a", "text": "river"}\n{"_id": "b"}\n{"_id": "c", "text": "stone"}\n')
    out = tmp_path / "idf.json"
    with pytest.raises(CorpusError, match=r"c\.jsonl:2: no column"):
        counted(folder, str(path), out)
    assert not out.exists()
    given = ["--model", str(folder), "--corpus", str(path), "--out", str(out), "--on-bad-document", "skip", "--json"]
    answer = command("idf", *given)
    assert answer.code == 3
    assert "Skipped: c.jsonl:2" in answer.err
    report = json.loads(answer.out)
    assert (report["documents"], report["skipped"], report["seen"]) == (2, 1, 2)
    assert out.exists()


def test_limit_counts_the_first_rows_only(folder: Path, tmp_path: Path) -> None:
    spec = write_corpus(tmp_path / "c.jsonl", ["river"] * 10)
    assert counted(folder, spec, tmp_path / "idf.json", limit=4).documents == 4


def test_an_existing_file_is_kept_without_force(folder: Path, tmp_path: Path) -> None:
    spec, out = write_corpus(tmp_path / "c.jsonl", ["river"]), tmp_path / "idf.json"
    out.write_text("mine")
    with pytest.raises(UsageError, match=r"already exists\. Give --force"):
        counted(folder, spec, out)
    assert out.read_text() == "mine"
    counted(folder, spec, out, force=True)
    assert json.loads(out.read_bytes())["river"] == float32(idf.weight_of(1, 1))
    with pytest.raises(UsageError, match="does not exist"):
        counted(folder, spec, tmp_path / "nowhere" / "idf.json")
    with pytest.raises(UsageError, match="Name a file"):
        counted(folder, spec, tmp_path, force=True)


def test_a_file_created_by_another_process_during_the_count_is_kept(folder: Path, tmp_path: Path) -> None:
    spec, out = write_corpus(tmp_path / "c.jsonl", ["river"]), tmp_path / "idf.json"
    with pytest.raises(UsageError, match="written by another process and is kept"):
        counted(folder, spec, out, progress=Recorder(lambda documents: out.write_text("theirs")))
    assert out.read_text() == "theirs"


def test_no_tokens_no_model_or_no_tokenizer_gives_one_message(folder: Path, tmp_path: Path) -> None:
    spec = write_corpus(tmp_path / "c.jsonl", ["", "[CLS]"])
    with pytest.raises(CorpusError, match="No document has a token"):
        counted(folder, spec, tmp_path / "idf.json")
    with pytest.raises(UsageError, match="No model"):
        counted(folder, spec, tmp_path / "idf.json", model=ModelSettings())
    (folder / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match="cannot be read as a tokenizer"):
        counted(folder, spec, tmp_path / "idf.json")


def test_no_more_than_a_batch_is_read_ahead(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(idf, "BATCH_CHARACTERS", 60)
    corpus = open_corpus([write_corpus(tmp_path / "c.jsonl", ["river stone"] * 200)], fields=NAMES)
    read = done_before = most = 0

    class Counting(Corpus):
        def rows(self, start=START):
            nonlocal read
            for row in super().rows(start):
                read += 1
                yield row

    def look(done: int) -> None:
        nonlocal done_before, most
        most, done_before = max(most, read - done_before), done

    counting = Counting(corpus.sources, corpus.fields)
    model, reporter = ModelSettings(document=str(folder)), Recorder(look)
    idf.write_idf(counting, tmp_path / "idf.json", model=model, progress=reporter)
    assert reporter.done == 200
    assert 0 < most <= 7


def test_idf_does_not_import_torch(folder: Path, tmp_path: Path) -> None:
    spec = write_corpus(tmp_path / "c.jsonl", ["river"])
    code = (
        "import sys; from sparse_ingest.cli.main import cli; "
        f"cli.main(['idf', '--model', {str(folder)!r}, '--corpus', {spec!r}, '--out', 'idf.json'], "
        "standalone_mode=False); "
        "print([name for name in ('torch', 'transformers', 'opensearchpy') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert done.stdout.splitlines()[-1] == "[]"
    assert "weights of 10 tokens, 1 of them in 1 document;" in done.stdout
