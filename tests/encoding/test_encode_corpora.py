"""`encode`: equal texts, dry runs, estimates, and counts without removed documents."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.checkpoints import make_masked_lm
from support.forked import Answer, command
from support.reporters import Recorder
from support.run_contents import contents, documents, lasting, write
from support.too_large import refuse_texts_of

from sparse_ingest.corpora.documents import FieldNames, document_of
from sparse_ingest.encoding import estimate
from sparse_ingest.encoding.counts import RowHash
from sparse_ingest.encoding.encode import dry_run
from sparse_ingest.models.documents import DocumentEncoder
from sparse_ingest.models.memory import BudgetLowered
from sparse_ingest.records import Document, SourceRow
from sparse_ingest.runs.manifest import canonical_json
from sparse_ingest.runs.run import open_run

ROWS = [{"_id": f"d{place}", "text": f"the river stone {place % 7} " * (place % 7)} for place in range(40)]
LONG = "river stone cloud " * 30


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_masked_lm(tmp_path_factory.mktemp("corpora") / "tiny")


@pytest.fixture
def encode(model: Path, tmp_path: Path) -> Callable[..., Answer]:
    """Return a function that encodes rows into the run `out`, with shards of 16 rows."""

    def run(rows: list, out: str, *options: object) -> Answer:
        corpus = write(tmp_path / "corpora" / "corpus.jsonl", rows)
        given = [] if "--dry-run" in options else ["--out", tmp_path / out]
        return command("encode", "--model", model, "--corpus", corpus, *given, "--shard-rows", 16,
                       "--device", "cpu", "--dtype", "float32", "--max-length", 20, "--json", *options)  # fmt: skip

    return run


def test_a_kept_field_that_no_document_has_is_reported(encode) -> None:
    recorder, message = Recorder(), 'No document of the first 2 has the field "price". Check the spelling of --keep.'
    dry_run(
        [{"_id": "1", "text": "a", "year": None}, {"_id": "2", "text": "b"}], keep=("price", "year"), progress=recorder
    )
    assert recorder.notes == [message]
    answer = encode([{**row, "year": 1} for row in ROWS[:2]], "out", "--keep", "price,year")
    assert answer.code == 0 and message in answer.err


# Equal texts


def record_lengths(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list that gets the token count, with special tokens, of each text encoded from now on."""
    seen: list[int] = []
    tokens, windows = DocumentEncoder.encode_tokens, DocumentEncoder.encode_windows

    def encode_tokens(self, given, *arguments):
        seen.extend(len(window.token_ids) for window in given)
        return tokens(self, given, *arguments)

    def encode_windows(self, given, *arguments):
        seen.extend(2 + len(cut.token_ids) for cut in given)
        return windows(self, given, *arguments)

    monkeypatch.setattr(DocumentEncoder, "encode_tokens", encode_tokens)
    monkeypatch.setattr(DocumentEncoder, "encode_windows", encode_windows)
    return seen


@pytest.mark.parametrize("overflow", [pytest.param("truncate", marks=pytest.mark.slow), "windows"])
def test_equal_texts_of_a_shard_are_encoded_once(overflow, encode, tmp_path: Path, monkeypatch) -> None:
    rules = ["--set", f"encode.overflow={overflow}", "--set", "encode.top_k=9"]
    assert encode(ROWS, "each", *rules).code == 0
    seen = record_lengths(monkeypatch)
    answer = encode(ROWS, "once", *rules, "--dedup-text", "encode-once")
    assert answer.code == 0, answer.err
    longest = 20 if overflow == "truncate" else 26
    assert len(seen) == 7 * 3 and seen[:7] == [min(2 + 4 * place, longest) for place in range(7)]
    report = json.loads(answer.out)
    assert (report["rows"], report["deduplicated"]) == (40, 40 - 21)
    each, once = open_run(tmp_path / "each"), open_run(tmp_path / "once")
    assert [record["deduplicated"] for record in lasting(once)] == [9, 9, 1]
    expected = documents(each)
    for doc_id, (row, fields, terms) in documents(once).items():
        assert (row, fields, terms.keys()) == (*expected[doc_id][:2], expected[doc_id][2].keys())
        assert all(abs(weight - expected[doc_id][2][token]) <= 2e-3 for token, weight in terms.items())
    for name in ("rows", "nnz", "empty", "truncated", "windows", "input_sha256"):
        assert [record[name] for record in lasting(once)] == [record[name] for record in lasting(each)], name
    assert not [path for path in (once.path / "tmp").rglob("*") if path.is_file()]


def test_equal_texts_of_a_shard_have_identical_vectors(encode, tmp_path: Path, monkeypatch) -> None:
    """Also across the windows of a shard, and if a shard is encoded by another process."""
    monkeypatch.setattr("sparse_ingest.encoding.shard_maker.PART_ROWS", 5)
    options = ("--dedup-text", "encode-once", "--weights", "float32")
    assert encode(ROWS, "once", *options).code == 0
    run = open_run(tmp_path / "once")
    found: dict[tuple[int, str], set] = {}
    for row, fields, terms in documents(run).values():
        found.setdefault((row // 16, fields.get("text", "")), set()).add(tuple(terms.items()))
    assert len(found) == 21 and all(len(vectors) == 1 for vectors in found.values())
    before = contents(run.path / "shards")
    run.unmark_done(1)
    assert encode(ROWS, "once", *options).code == 0
    assert contents(run.path / "shards") == before


def test_dedup_text_is_part_of_the_identity_and_does_not_affect_reuse(encode, tmp_path: Path) -> None:
    assert encode(ROWS, "each").code == 0
    assert "dedup_text" not in open_run(tmp_path / "each").manifest.identity
    answer = encode(ROWS, "each", "--dedup-text", "encode-once")
    assert answer.code == 1 and "dedup_text: the run has none, requested: 'encode-once'" in answer.err
    answer = encode(
        [*ROWS, {"_id": "n", "text": "new"}], "next", "--dedup-text", "encode-once", "--reuse", tmp_path / "each"
    )
    report = json.loads(answer.out)
    assert (report["reused"], report["deduplicated"], report["rows"]) == (40, 0, 41)
    assert (
        contents(tmp_path / "next" / "shards")["part-00000.parquet"]
        == contents(tmp_path / "each" / "shards")["part-00000.parquet"]
    )


def test_dedup_text_is_refused_with_passages(encode) -> None:
    answer = encode(ROWS, "run", "--dedup-text", "encode-once", "--set", "encode.overflow=passages")
    assert answer.code == 2 and "Omit --dedup-text" in answer.err


# Counts


@pytest.mark.parametrize(
    "overflow", ["passages", *(pytest.param(one, marks=pytest.mark.slow) for one in ("truncate", "windows"))]
)
def test_counts_are_those_of_the_remaining_documents(overflow: str, encode, tmp_path: Path) -> None:
    """Duplicates that are removed from a shard are subtracted from its counts."""
    rules = ["--set", f"encode.overflow={overflow}", "--on-bad-document", "skip"]
    rows = [*ROWS, {"_id": "long", "text": LONG}, {"_id": "small", "text": "lamp"}]
    again = [{"_id": "d3", "text": LONG}, {"_id": "d4", "text": LONG}, {"_id": "d5", "text": ROWS[1]["text"]}]
    assert encode(rows, "right", *rules).code == 0
    answer = encode([*rows, *again], "twice", *rules)
    assert answer.code == 3, answer.err
    right, twice = (open_run(tmp_path / name).complete() or {} for name in ("right", "twice"))
    assert twice["skipped"] == 3
    for name in ("rows", "terms", "empty", "truncated", "windows", "underflow", "reused", "deduplicated"):
        assert twice[name] == right[name], name
    assert right["truncated" if overflow == "truncate" else "windows"] > (0 if overflow == "truncate" else 42)


def test_removed_rows_are_not_counted_as_reused_or_deduplicated(encode, tmp_path: Path) -> None:
    assert encode(ROWS[:20], "old").code == 0
    rows = [*ROWS, {"_id": "d1", "text": ROWS[2]["text"]}, {"_id": "d2", "text": "lamp"}, {"_id": "d3", "text": "lamp"}]
    options = ("--dedup-text", "encode-once", "--reuse", tmp_path / "old")
    right = json.loads(encode(ROWS, "right", *options).out)
    twice = json.loads(encode(rows, "twice", *options, "--on-bad-document", "skip").out)
    assert twice["skipped"] == 3
    assert {name: twice[name] for name in ("reused", "deduplicated", "windows")} == {
        name: right[name] for name in ("reused", "deduplicated", "windows")
    }


def test_counts_in_a_record_of_an_earlier_release_are_kept(encode, tmp_path: Path) -> None:
    """Without `of_rows` in the record, counts cannot be corrected."""
    rows = [*ROWS, {"_id": "d3", "text": LONG}]
    assert encode(rows, "run").code == 1
    run = open_run(tmp_path / "run")
    record = run.done(2) or {}
    del record["of_rows"]
    run.mark_done(2, record)
    assert encode(rows, "run", "--on-bad-document", "skip").code == 3
    after = run.done(2) or {}
    assert (after["rows"], after["truncated"]) == (record["rows"] - 1, record["truncated"])


# The hash of rows

TEXTS = st.text(max_size=30) | st.sampled_from(
    ['","text":"', '"}', "\\", '\\","', '{"title":"', "\x7f\x00\n", "é\u2028"]
)


@given(TEXTS, TEXTS, st.none() | TEXTS, st.booleans(), st.booleans())
def test_the_hash_of_rows_is_that_of_their_canonical_json(doc_id, text, title, carry: bool, keep: bool) -> None:
    columns = {"_id": doc_id or "x", "title": title, "text": text, 'k","': [text], "n": text}
    fields = FieldNames(keep=('k","', "n") if keep else (), carry_text=carry)
    document = document_of(columns, fields, 3)
    rows = [SourceRow(3, "a", 1, document, None), SourceRow(4, "a", 2, None, "bad")]
    found = RowHash()
    for row in rows:
        found.add(row)
    lines = [canonical_json([3, *document]), canonical_json([4, None])]
    assert found.hexdigest() == hashlib.sha256("".join(line + "\n" for line in lines).encode()).hexdigest()


def test_the_hash_of_rows_does_not_depend_on_blocks() -> None:
    documents = [Document(str(row), "text" * 10_000, "{}") for row in range(200)]
    found, lines = RowHash(), hashlib.sha256()
    for row, document in enumerate(documents):
        found.add(SourceRow(row, "a", row + 1, document, None))
        lines.update(canonical_json([row, *document]).encode() + b"\n")
        if row in (70, 199):
            assert found.hexdigest() == lines.hexdigest()


# Dry runs and estimates


def test_a_dry_run_counts_rows_lists_bad_ones_and_writes_nothing(encode, tmp_path: Path) -> None:
    rows = [
        *ROWS,
        "{broken",
        {"_id": "d3", "text": "again"},
        {"_id": "d30", "text": LONG},
        {"_id": "d3", "text": "3rd"},
    ]
    answer = encode(rows, "", "--dry-run")
    assert answer.code == 3, answer.err
    found = json.loads(answer.out)
    tokens, predicted = found.pop("tokens"), found.pop("prediction")
    assert found.pop("examples") == [
        "corpus.jsonl:41: broken JSON at column 2: Expecting property name enclosed in double quotes",
        'corpus.jsonl:42: duplicate id "d3" (first seen at corpus.jsonl:4)',
        'corpus.jsonl:43: duplicate id "d30" (first seen at corpus.jsonl:31)',
        'corpus.jsonl:44: duplicate id "d3" (first seen at corpus.jsonl:4)',
    ]
    texts = [row["text"] for row in rows if isinstance(row, dict)]
    assert found == {
        "rows": 44, "documents": 43, "bad": 1, "duplicates": 3, "empty": 6, "shards": 3,
        "text_bytes": sum(map(len, texts)), "equal_texts": 33, "equal_in_shard": 9 + 9 + 1,
    }  # fmt: skip
    assert tokens["documents"] == 43 and tokens["longest"] == 92 and tokens["median"] < tokens["p95"] < 92
    assert predicted["sampled"] == 43 and predicted["others"][-1]["seconds"] is None
    assert list(tmp_path.iterdir()) == [tmp_path / "corpora"]


def test_a_dry_run_needs_no_model_and_respects_limit(tmp_path: Path) -> None:
    corpus = write(tmp_path / "corpus.jsonl", [*ROWS, "{"])
    answer = command("encode", "--dry-run", "--corpus", corpus, "--limit", 40, "--json")
    found = json.loads(answer.out)
    assert (answer.code, found["rows"], found["tokens"], found["examples"]) == (0, 40, None, [])
    assert "40 rows: 40 documents (6 with an empty text)" in command(
        "encode", "--dry-run", "--corpus", corpus, "--limit", 40
    ).out  # fmt: skip
    answer = command("encode", "--dry-run", "--corpus", corpus, "--keep", "sparse.y")
    assert answer.code == 2 and "--keep sparse.y: 'sparse' is the sparse field" in answer.err
    answer = command("encode", "--corpus", corpus)
    assert answer.code == 2 and "Name one with --out" in answer.err


def test_the_estimate_is_printed_once(encode, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(estimate, "DOCUMENTS", 20)
    answer = encode(ROWS, "run")
    estimates = [line for line in answer.err.splitlines() if line.startswith("After")]
    report = json.loads(answer.out)
    assert len(estimates) == 1 and estimates[0].startswith("After 32 documents: "), answer.err
    assert ". 40 rows in all: a run of about " in estimates[0] and " of the run per document" in estimates[0]
    terms = sum(len(terms) for row, _, terms in documents(open_run(tmp_path / "run")).values() if row < 32)
    assert f" {terms / 32:.1f} terms and " in estimates[0] and report["rows"] == 40


def test_the_seconds_of_each_stage_are_recorded_and_summed(encode, tmp_path: Path) -> None:
    assert encode(ROWS, "run").code == 0
    run = open_run(tmp_path / "run")
    records = [(run.done(shard) or {})["seconds"] for shard in range(3)]
    for seconds in records:
        assert list(seconds) == ["read", "tokenise", "encode", "write", "wall"]
        assert all(0 < seconds[stage] < seconds["wall"] for stage in ("encode", "write")), seconds
    # A record of an earlier release: its stages did not overlap, and it has no "wall".
    run.mark_done(0, {**(run.done(0) or {}), "seconds": {"read": 300.0, "encode": 400.0, "write": 50.0}})
    found = json.loads(command("status", run.path, "--json").out)["seconds"]
    assert found.keys() == records[0].keys() and found["read"] >= 300 > found["wall"]
    shown = [line for line in command("status", run.path).out.splitlines() if line.strip().startswith("seconds")]
    assert len(shown) == 1 and "read 300." in shown[0] and "tokenize 0." in shown[0]


# Not enough memory


def test_a_lowered_budget_encodes_the_complete_shard_again(encode, tmp_path: Path, monkeypatch) -> None:
    """A run with the lower budget from the start has the same bytes."""
    monkeypatch.setattr("sparse_ingest.encoding.shard_maker.PART_ROWS", 5)
    assert encode(ROWS, "small", "--batch-tokens", 16).code == 0
    original, calls = DocumentEncoder.encode_tokens, []

    def lower_budget(self, *arguments):
        calls.append(self.batch_tokens)
        if len(calls) == 2:
            self.batch_tokens = 16
            raise BudgetLowered("cpu", 4, 16, 1)
        return original(self, *arguments)

    monkeypatch.setattr(DocumentEncoder, "encode_tokens", lower_budget)
    answer = encode(ROWS, "lowered", "--batch-tokens", 64)
    assert answer.code == 0 and "had no memory for a batch of 4 documents" in answer.err
    assert calls[:2] == [64, 64] and set(calls[2:]) == {16}
    small, lowered = open_run(tmp_path / "small"), open_run(tmp_path / "lowered")
    assert contents(small.path / "shards") == contents(lowered.path / "shards")
    assert [(lowered.done(shard) or {})["batch_tokens"] for shard in range(3)] == [16, 16, 16]
    assert lasting(small) == lasting(lowered)


@pytest.mark.parametrize("overflow", ["truncate", "passages"])
def test_a_document_that_does_not_fit_into_memory_is_a_bad_document(
    overflow: str, encode, tmp_path: Path, monkeypatch
) -> None:
    refuse_texts_of(20, monkeypatch)
    rows = [ROWS[1], {"_id": "huge", "text": LONG}, ROWS[2], {"_id": "huge too", "text": LONG}]
    rules = ("--set", f"encode.overflow={overflow}")
    answer = encode(rows, "run", *rules)
    assert answer.code == 1 and "corpus.jsonl:2: its 20 tokens do not fit into the memory of cpu" in answer.err
    answer = encode(rows, "run", *rules, "--on-bad-document", "skip")
    assert answer.code == 3, answer.err
    run = open_run(tmp_path / "run")
    assert [(row.line, row.reason) for row in run.skipped(0)] == [
        (line, "its 20 tokens do not fit into the memory of cpu") for line in (2, 4)
    ]
    assert {doc_id.partition("#")[0] for doc_id in documents(run)} == {"d1", "d2"}


# Datasets


def test_a_dataset_gives_the_run_of_its_rows(encode, model: Path, tmp_path: Path, monkeypatch) -> None:
    """JSON lines give the same shards, bad rows are skipped and listed, and a run can be resumed."""
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    rows = [*ROWS, {"_id": "d3", "text": "again"}, {"_id": None, "text": "no id"}]
    assert encode(rows, "lines", "--on-bad-document", "skip").code == 3
    (tmp_path / "made").mkdir()
    for part, part_rows in enumerate((rows[:17], rows[17:])):
        pq.write_table(pa.Table.from_pylist(part_rows), tmp_path / "made" / f"{part}.parquet", row_group_size=5)
    given = ("encode", "--model", model, "--corpus", f"hf:{tmp_path}/made", "--out", tmp_path / "dataset",
             "--shard-rows", 16, "--device", "cpu", "--dtype", "float32", "--max-length", 20, "--json")  # fmt: skip
    assert command(*given, "--on-bad-document", "skip").code == 3
    lines, dataset = open_run(tmp_path / "lines"), open_run(tmp_path / "dataset")
    assert contents(lines.path / "shards") == contents(dataset.path / "shards")
    assert [(row.row, row.file, row.line, row.reason) for row in dataset.skipped(2)] == [
        (40, "hf:made:default:train", 41, 'duplicate id "d3": first at hf:made:default:train row 4'),
        (41, "hf:made:default:train", 42, 'the id in "_id" is null; expected a non-empty string or an integer'),
    ]
    before = contents(dataset.path)
    dataset.unmark_done(1)
    assert command(*given, "--on-bad-document", "skip", "--trust-corpus").code == 3
    assert contents(dataset.path / "shards") == {
        name.removeprefix("shards/"): content for name, content in before.items() if name.startswith("shards/")
    }
    dataset.unmark_done(2)
    pq.write_table(pa.Table.from_pylist([*rows[17:], {"_id": "new", "text": ""}]), tmp_path / "made" / "1.parquet")
    answer = command(*given, "--on-bad-document", "skip")
    assert answer.code == 1 and "corpus: the run has [{'config': 'default'" in answer.err


def test_rows_that_lone_quotes_merge_are_reported_once(model: Path, tmp_path: Path) -> None:
    corpus = tmp_path / "quotes.tsv"
    corpus.write_text('id\ttext\n1\tone\n2\t"two\n3\tthree\n4\tfour"\n5\tfive\n')
    given = ["--model", model, "--corpus", corpus, "--device", "cpu", "--dtype", "float32"]
    message = "quotes.tsv:3: a quoted value spans 3 lines and contains the separator."
    for options in (["--out", tmp_path / "merged"], ["--dry-run"]):
        answer = command("encode", *given, *options)
        assert answer.code == 0 and answer.err.count(message) == 1, answer.err
    answer = command("encode", *given, "--out", tmp_path / "rows", "--quoting", "none", "--json")
    assert json.loads(answer.out)["rows"] == 5 and message not in answer.err
    ids = [open_run(tmp_path / name).manifest.identity["corpus"][0] for name in ("merged", "rows")]
    assert [entry.get("quoting") for entry in ids] == [None, "none"]
    answer = command("encode", *given, "--out", tmp_path / "merged", "--quoting", "none")
    assert answer.code == 1 and "quoting" in answer.err
    reporter = Recorder()
    dry_run(corpus, progress=reporter)
    assert [note.startswith(message) for note in reporter.notes] == [True]


FULL = """
import resource, sys
from sparse_ingest.cli.main import main
resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))
sys.argv[1:] = ["encode", "--dry-run", "--corpus", sys.argv[1]]
main()
"""


def test_a_full_disk_during_a_dry_run_is_reported_with_its_path(tmp_path: Path) -> None:
    corpus = tmp_path / "c.tsv"
    corpus.write_text("id\ttext\n" + "".join(f"{row}\ta\n" for row in range(70_000)))
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", FULL, corpus], capture_output=True, text=True, env=environment)
    assert done.returncode == 1 and f"Error: {tmp_path}: File too large." in done.stderr, done.stderr
