"""The command `encode`, from its options to the bytes of the run folder."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from support.checkpoints import build_encoder, make_masked_lm
from support.deadlines import HANGING_S, until
from support.forked import Answer, command, start
from support.json_page import check
from support.run_contents import ROWS, VOLATILE, contents, documents, lasting, write

from sparse_ingest.pruning import prune
from sparse_ingest.runs.files import SkippedRow
from sparse_ingest.runs.run import Run, open_run
from sparse_ingest.runs.shards import read_shard, store_weights, text_hash


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_masked_lm(tmp_path_factory.mktemp("checkpoint") / "tiny")


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    return write(tmp_path / "corpus.jsonl", ROWS)


@pytest.fixture
def encode(model: Path, tmp_path: Path, corpus: Path) -> Callable[..., Answer]:
    """Return a function that runs `encode` on the corpus, with shards of 8 rows and the given options."""

    def run(*options: object, specs: tuple[object, ...] = (corpus,), out: str = "run") -> Answer:
        named = [argument for spec in specs for argument in ("--corpus", spec)]
        default: list[object] = [] if "--shard-rows" in options else ["--shard-rows", 8]
        default += ["--device", "cpu"]
        return command("encode", "--model", model, *named, "--out", tmp_path / out, *default, *options)

    return run


# A complete run


def test_file_names_that_are_not_utf8_are_accepted(encode, tmp_path: Path, corpus: Path) -> None:
    renamed = corpus.rename(tmp_path / os.fsdecode(b"c\xff.jsonl"))
    name = os.fsdecode(b"r\xff")
    for _ in range(2):  # a new run, then a continued one
        answer = encode("--dtype", "float32", "--json", specs=(renamed,), out=name)
        assert answer.code == 0, answer.err
        assert json.loads(answer.out)["run"] == str(tmp_path / name)
        (tmp_path / name / "complete.json").unlink()
        (tmp_path / name / "done" / "part-00000.json").unlink()
    assert [source["name"] for source in open_run(tmp_path / name).manifest.identity["corpus"]] == ["c\\udcff.jsonl"]


def test_weights_without_a_token_are_counted_and_reported(encode, tmp_path: Path, model: Path) -> None:
    partial_model = shutil.copytree(model, tmp_path / "partial_model")
    content = json.loads((partial_model / "tokenizer.json").read_text())
    place = content["model"]["vocab"].pop("lamp")
    (partial_model / "tokenizer.json").write_text(json.dumps(content))
    answer = encode("--model", partial_model, "--json", out="less")
    report = json.loads(answer.out)
    dropped = report["without_token"]
    assert dropped > 0
    assert f"{dropped:,} weights were omitted" in answer.err
    assert f"no token for their ids ({place})" in answer.err
    answer = encode("--json", out="complete")
    assert "were omitted" not in answer.err
    assert "without_token" not in json.loads(answer.out)
    check("encode", json.loads(answer.out), report)
    assert open_run(tmp_path / "complete").report.without_token == 0


def test_the_complete_contents_of_a_run(encode, tmp_path: Path, model: Path) -> None:
    answer = encode("--json", "--dtype", "float32")
    assert answer.code == 0, answer.err
    run = open_run(tmp_path / "run")
    report = json.loads(answer.out)
    assert report == {
        "run": str(run.path), "run_id": run.manifest.run_id, "shards": 3, "rows": 20,
        "terms": sum(len(terms) for _, _, terms in documents(run).values()),
        "empty": 0, "truncated": 0, "skipped": 0, "underflow": 0, "windows": 20, "reused": 0, "deduplicated": 0,
    }  # fmt: skip
    top = {path.name for path in run.path.iterdir()}
    assert top == {
        "manifest.json",
        "vocab.json",
        "shards",
        "done",
        "skipped",
        "complete.json",
        "locks",
        "starts.json",
        "tmp",
    }
    assert contents(run.path / "skipped") == {}
    assert {path.name for path in (run.path / "shards").iterdir()} == {f"part-0000{n}.parquet" for n in range(3)}
    assert [path for path in (run.path / "tmp").rglob("*") if path.is_file()] == []
    complete = run.complete() or {}
    assert len(complete.pop("shards_sha256")) == 64
    assert complete == {
        key: value for key, value in {**report, "duplicates_checked": True}.items() if key not in ("run", "run_id")
    }

    encoder = build_encoder(model)
    assert run.vocabulary() == encoder.vocabulary
    for shard, first in enumerate(range(0, 20, 8)):
        rows = ROWS[first : first + 8]
        texts = [row["text"] for row in rows]
        expected = store_weights(encoder.encode(texts).vectors, "float16")
        (part,) = read_shard(run.shard_path(shard))
        assert part.rows.tolist() == list(range(first, first + len(rows)))
        assert list(part.vectors.doc_ids) == [row["_id"] for row in rows]
        assert part.text_hashes == [text_hash(text) for text in texts]
        assert [json.loads(fields) for fields in part.fields] == [{"text": text} for text in texts]
        assert np.array_equal(part.vectors.token_ids, expected.token_ids)
        assert part.vectors.weights.tobytes() == expected.weights.tobytes()
        done = run.done(shard) or {}
        assert done["sha256"] == hashlib.sha256(run.shard_path(shard).read_bytes()).hexdigest()
        assert (done["first_row"], done["rows"], done["nnz"]) == (first, len(rows), len(expected.weights))
        assert done.keys() >= {"empty", "truncated", "skipped", "underflow", "next", "input_sha256", *VOLATILE}


def test_pruning_is_applied_and_part_of_the_identity(encode, tmp_path: Path, model: Path) -> None:
    rules = ["encode.top_k=6", "encode.max_ratio=0.3", "encode.min_weight=0.2"]
    exactly = ["--weights", "float32", "--dtype", "float32"]
    assert encode(*(word for rule in rules for word in ("--set", rule)), *exactly).code == 0
    run = open_run(tmp_path / "run")
    identity = run.manifest.identity
    assert (identity["top_k"], identity["max_ratio"], identity["min_weight"]) == (6, 0.3, 0.2)
    vectors = build_encoder(model).encode([row["text"] for row in ROWS[:8]]).vectors
    expected = prune(vectors, top_k=6, max_ratio=0.3, min_weight=0.2)
    (part,) = read_shard(run.shard_path(0))
    assert part.vectors.indptr.tolist() == expected.indptr.tolist()
    assert part.vectors.weights.tobytes() == expected.weights.tobytes()
    assert encode("--set", "encode.top_k=6", *exactly).code == 1


def test_truncated_texts_are_counted(encode, tmp_path: Path) -> None:
    long = write(tmp_path / "long.jsonl", [{"_id": "1", "text": "river " * 200}, {"_id": "2", "text": ""}])
    assert json.loads(encode("--json", specs=(long,)).out)["truncated"] == 1
    assert open_run(tmp_path / "run").manifest.identity["model"]["max_length"] == 64
    assert encode("--max-length", 8, specs=(long,), out="short").code == 0
    assert open_run(tmp_path / "short").manifest.identity["model"]["max_length"] == 8


# Wrong command lines and files


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--set", "encode.topk=3"], 2, "unknown key encode.topk; known here: alpha_mass, batch_tokens"),
        (["--pipeline", "nothing"], 2, "No pipeline file 'nothing'"),
        (["--set", "encode.window_stride=4"], 2, 'window_stride is for overflow = "windows" or "passages"'),
        (["--dtype", "int4"], 2, "Invalid value for '--dtype'"),
        (["--max-length", 65], 2, "max_length = 65, but"),
        (["--max-length", 2], 2, "every text gets 2 special tokens"),
        (["--shard-rows", 0], 2, "Invalid value for '--shard-rows'"),
        (["--format", "xml"], 2, 'format "xml" is unknown'),
        (["--keep", "text", "--text-field", "body"], 2, "--keep text"),
        (["--keep", "_id"], 2, 'clusters refuse documents with a field "_id" (a metadata field)'),
        (["--keep", "a..b,_routing", "--keep", ""], 2, '"a..b" (nothing between or before its dots), "_routing" (a'),
        (["--keep", "sparse"], 2, "--keep sparse: 'sparse' is the sparse field of the index"),
        (["--text-field", "body"], 1, 'corpus.jsonl:1: no column "body" for the text'),
        (["--nonsense"], 2, "No such option"),
        (["--corpus", ""], 2, "--corpus is an empty string"),
        (["--device", "tpu"], 2, "expected auto, cpu, cuda or cuda:N"),
        (["--set", "encode.max_ratio=5"], 2, "expected a number from 0 to 1"),
        (["--set", "load.top_k=5"], 2, "this command reads [model], [encode], not [load]"),
        (["--set", "index.field=v"], 2, "this command reads [model], [encode], not [index]"),
        (["--corpus", "nothing.jsonl"], 1, 'no file or folder "nothing.jsonl"'),
        (["--model", "/nothing"], 1, "No model folder '/nothing'"),
    ],
)
def test_each_error_is_one_message_with_an_exit_code(encode, options, code: int, message: str) -> None:
    answer = encode(*options)
    assert answer.code == code and message in answer.err, answer.err
    assert "Traceback" not in answer.err and not answer.out


def test_the_sparse_field_of_the_pipeline_file_cannot_be_kept(encode, tmp_path: Path) -> None:
    (tmp_path / "p.toml").write_text('[index]\nfield = "v"\n')
    answer = encode("--pipeline", tmp_path / "p.toml", "--keep", "v.x")
    assert answer.code == 2 and "--keep v.x: 'v' is the sparse field of the index" in answer.err


def test_without_a_model_encode_is_a_usage_error(corpus: Path, tmp_path: Path) -> None:
    answer = command("encode", "--corpus", corpus, "--out", tmp_path / "run")
    assert answer.code == 2 and "No model: name one with --model" in answer.err


def test_a_folder_with_other_files_is_refused(encode, tmp_path: Path) -> None:
    write(tmp_path / "run" / "thesis.txt", ["words"])
    answer = encode()
    assert answer.code == 1 and "is not empty and is not a run (found thesis.txt)" in answer.err
    assert contents(tmp_path / "run") == {"thesis.txt": b"words\n"}


def test_a_file_as_the_run_folder_is_refused(encode, tmp_path: Path) -> None:
    (tmp_path / "run").write_text("words")
    for out in ("run", "run/inside"):
        answer = encode(out=out)
        assert answer.code == 1 and "Traceback" not in answer.err
        assert answer.err.startswith("Error: ") and str(tmp_path / "run") in answer.err
    assert (tmp_path / "run").read_text() == "words"


def test_a_model_option_replaces_all_models_of_the_pipeline(encode, tmp_path: Path) -> None:
    (tmp_path / "pair.toml").write_text('[model]\ndocument = "a/b"\nquery = "a/c"\nrevision = "d"\n')
    assert encode("--pipeline", tmp_path / "pair.toml").code == 0
    assert not {"query", "revision"} & open_run(tmp_path / "run").manifest.model.keys()


# Bad documents

BAD = [*ROWS[:9], "{broken", {"_id": "x", "text": 3}, *ROWS[9:], {"text": "no id"}, {"_id": "d3", "text": "again"},
       {"_id": "d19", "text": "again"}]  # fmt: skip


def test_a_bad_document_is_an_error_with_its_place(encode, tmp_path: Path) -> None:
    bad = write(tmp_path / "bad.jsonl", BAD)
    answer = encode(specs=(bad,))
    assert answer.code == 1
    assert answer.err.splitlines()[-1].startswith("Error: bad.jsonl:10: broken JSON")
    run = open_run(tmp_path / "run")
    assert run.done_shards() == [0] and run.complete() is None


def test_bad_documents_are_skipped_and_listed(encode, tmp_path: Path) -> None:
    bad = write(tmp_path / "bad.jsonl", BAD)
    answer = encode("--on-bad-document", "skip", "--json", specs=(bad,))
    assert answer.code == 3 and "Bad documents that were skipped: 5 " in answer.err
    report = json.loads(answer.out)
    assert (report["rows"], report["skipped"], report["shards"]) == (20, 5, 4)
    run = open_run(tmp_path / "run")
    assert run.skipped(0) == [] and not run.skipped_path(0).exists()
    assert [(row.row, row.line) for row in run.skipped(1)] == [(9, 10), (10, 11)]
    assert [row.row for row in run.skipped(2)] == [22, 23]
    # Row 24 has the id of row 21, which is in the shard before.
    assert run.skipped(3) == [SkippedRow(24, "bad.jsonl", 25, 'duplicate id "d19": first at bad.jsonl line 22')]
    assert run.skipped(2)[1] == SkippedRow(23, "bad.jsonl", 24, 'duplicate id "d3": first at bad.jsonl line 4')
    rows = [place for place in range(25) if place not in (9, 10, 22, 23, 24)]
    assert [row for row, _, _ in documents(run).values()] == rows
    assert [record["rows"] for record in lasting(run)] == [8, 6, 6, 0]
    before = contents(run.path)
    again = encode("--on-bad-document", "skip", "--json", specs=(bad,))
    assert (again.code, json.loads(again.out)) == (3, report)
    assert contents(run.path) == before


def test_a_duplicate_id_in_two_shards_is_an_error_with_both_places(encode, tmp_path: Path) -> None:
    first, second = write(tmp_path / "a.jsonl", ROWS), write(tmp_path / "b.jsonl", [{"_id": "d5", "text": "again"}])
    answer = encode(specs=(first, second))
    assert answer.code == 1
    assert 'b.jsonl:1: duplicate id "d5" (first seen at a.jsonl:6).' in answer.err
    run = open_run(tmp_path / "run")
    assert run.complete() is None and len(run.done_shards()) == 3
    # The same run continues with skip, and keeps the first document.
    answer = encode("--on-bad-document", "skip", specs=(first, second))
    assert answer.code == 3 and run.complete() is not None
    assert documents(run)["d5"][0] == 5 and len(documents(run)) == 20
    assert [row.row for row in run.skipped(2)] == [20]


def test_a_duplicate_id_within_a_shard_is_a_bad_document(encode, tmp_path: Path) -> None:
    duplicated = write(tmp_path / "twice.jsonl", [*ROWS[:3], ROWS[1]])
    answer = encode(specs=(duplicated,))
    assert answer.code == 1 and 'twice.jsonl:4: duplicate id "d1": first at twice.jsonl line 2' in answer.err


# Resuming


def test_a_complete_run_needs_no_model_and_changes_no_byte(encode, tmp_path: Path, monkeypatch) -> None:
    from sparse_ingest.models.documents import DocumentEncoder

    first = encode("--json")
    before = contents(tmp_path / "run")

    def fail(*_: object, **__: object) -> None:
        raise AssertionError("a model is built")

    monkeypatch.setattr(DocumentEncoder, "__init__", fail)
    assert encode("--json") == first._replace(err="")
    assert encode("--json", "--trust-corpus") == first._replace(err="")
    assert contents(tmp_path / "run") == before


def test_other_settings_are_refused_with_both_values(encode, tmp_path: Path, model: Path) -> None:
    assert encode("--dtype", "float32").code == 0
    before = contents(tmp_path / "run")
    other = make_masked_lm(tmp_path / "other", seed=5)
    for options, line in (
        (["--weights", "float32"], "weights: the run has 'float16', requested: 'float32'"),
        (["--dtype", "bfloat16"], "dtype: the run has 'float32', requested: 'bfloat16'"),
        (["--shard-rows", 9], "shard_rows: the run has 8, requested: 9"),
        (["--limit", 5], "limit: the run has none, requested: 5"),
        (["--keep", "year"], "fields.keep: the run has [], requested: ['year']"),
        (["--no-text"], "fields.carry_text: the run has True, requested: False"),
        (["--id-field", ":row"], "fields.id: the run has none, requested: ':row'"),
        (["--max-length", 32], "model.max_length: the run has 64, requested: 32"),
        (["--set", "model.document_prompt=d: "], "model.document_prompt: the run has '', requested: 'd: '"),
        (["--set", "encode.min_weight=1"], "min_weight: the run has none, requested: 1.0"),
        (["--model", other], "model.sha256: the run has "),
    ):
        answer = encode(*options)
        assert answer.code == 1 and f"\n  {line}" in answer.err, answer.err
        assert "Use the settings of the run, or another --out folder." in answer.err
    assert contents(tmp_path / "run") == before


def test_settings_that_do_not_affect_vectors_may_change(encode, tmp_path: Path) -> None:
    assert encode("--dtype", "float32").code == 0
    before = contents(tmp_path / "run")
    assert encode("--batch-tokens", 300, "--device", "auto", "--dtype", "auto").code == 0
    assert contents(tmp_path / "run") == before


def test_a_changed_corpus_is_refused(encode, tmp_path: Path, corpus: Path) -> None:
    assert encode().code == 0
    before = contents(tmp_path / "run")
    write(corpus, [*ROWS[:9], {**ROWS[9], "year": 8}, *ROWS[10:]])
    assert encode().code == 0, "a column that is not read does not matter"
    write(corpus, [*ROWS[:9], {**ROWS[9], "text": ROWS[9]["text"].replace("river", "cloud")}, *ROWS[10:]])
    answer = encode()
    assert answer.code == 1 and "The corpus changed: rows 8 to 15 differ from those of part-00001" in answer.err
    assert encode("--trust-corpus").code == 0
    write(corpus, [*ROWS, {"_id": "new", "text": "new"}])
    answer = encode("--trust-corpus")
    assert answer.code == 1 and "corpus: the run has [{" in answer.err
    assert contents(tmp_path / "run") == before


def test_duplicates_in_standard_input_are_reported_and_skipped(encode, tmp_path: Path, monkeypatch) -> None:
    """Standard input cannot be read twice, so messages have row numbers instead of lines."""

    def piped(*options: str) -> Answer:
        with write(tmp_path / "piped", [*ROWS, ROWS[2]]).open() as stream:
            monkeypatch.setattr("sys.stdin", stream)
            return encode(*options, specs=("-",))

    answer = piped()
    assert answer.code == 1 and '-: row 21: duplicate id "d2" (first seen at -: row 3).' in answer.err
    assert piped("--on-bad-document", "skip").code == 3
    run = open_run(tmp_path / "run")
    assert (run.complete() or {})["rows"] == 20 and [row.line for row in run.skipped(2)] == [21]


def test_shorter_standard_input_is_refused_for_an_existing_run(encode, tmp_path: Path, monkeypatch) -> None:
    def piped(rows: list) -> Answer:
        with write(tmp_path / "piped", rows).open() as stream:
            monkeypatch.setattr("sys.stdin", stream)
            return encode("--limit", 100, specs=("-",))

    assert piped(ROWS[:16]).code == 0
    run = open_run(tmp_path / "run")
    answer = piped(ROWS[:8])
    assert answer.code == 1 and "it ends after 8 rows, but" in answer.err
    # A longer one continues the run, and is checked for duplicates again.
    assert piped([*ROWS[:16], ROWS[2]]).code == 1
    assert run.complete() is None
    (tmp_path / "run" / "done" / "part-00002.json").unlink()
    assert piped(ROWS).code == 0 and (run.complete() or {})["rows"] == 20


def test_the_folder_of_the_corpus_may_change(encode, tmp_path: Path) -> None:
    """Files of the same name are reported with their paths, also in the reasons of bad rows."""
    for place in ("here", "there"):
        for folder, rows in (("a", ROWS[:5]), ("b", [ROWS[2], "{broken", *ROWS[5:]])):
            write(tmp_path / place / folder / "part.jsonl", rows)
    both = [(tmp_path / place / "a", tmp_path / place / "b") for place in ("here", "there")]
    assert encode("--on-bad-document", "skip", specs=both[0]).code == 3
    before = contents(tmp_path / "run")
    assert str(tmp_path).encode() in before["skipped/part-00000.jsonl"]
    assert encode("--on-bad-document", "skip", specs=both[1]).code == 3
    assert contents(tmp_path / "run") == before


def test_a_lost_shard_is_encoded_again(encode, tmp_path: Path) -> None:
    rows = [*ROWS, ROWS[3]]
    duplicated = write(tmp_path / "twice.jsonl", rows)
    assert encode("--on-bad-document", "skip", specs=(duplicated,)).code == 3
    run = open_run(tmp_path / "run")
    shards, records = contents(run.path / "shards"), lasting(run)
    for shard in (0, 2):
        run.shard_path(shard).write_bytes(b"damaged")
        run.unmark_done(shard)
    assert encode("--on-bad-document", "skip", specs=(duplicated,)).code == 3
    assert contents(run.path / "shards") == shards and lasting(run) == records


def test_temporary_files_of_killed_processes_are_deleted(encode, tmp_path: Path) -> None:
    leftovers = [write(tmp_path / "run" / ".new-a", ["{"])]
    assert encode("--limit", 9).code == 0 and not leftovers[0].exists()
    (tmp_path / "run" / "complete.json").unlink()
    leftovers = [write(tmp_path / "run" / folder / ".new-b", ["{"]) for folder in ("done", "skipped", ".")]
    assert encode("--limit", 9).code == 0 and not any(path.exists() for path in leftovers)


def test_missing_shards_are_encoded_to_the_same_bytes(encode, tmp_path: Path, corpus: Path) -> None:
    """Shards are fixed row ranges, so missing ones are encoded to the same bytes."""
    assert encode().code == 0
    run = open_run(tmp_path / "run")
    before = contents(run.path / "shards")
    for lost in ((0,), (2,), (0, 2), (1,), (0, 1, 2)):
        for options in ((), ("--trust-corpus",)):
            for shard in lost:
                run.unmark_done(shard)
                run.shard_path(shard).unlink()
            (run.path / "complete.json").unlink()
            assert encode(*options).code == 0
            assert contents(run.path / "shards") == before


# Which rows and fields


def test_limit_counts_rows_over_all_files(encode, tmp_path: Path) -> None:
    files = (write(tmp_path / "b.jsonl", ROWS[:5]), write(tmp_path / "a.jsonl.gz", ROWS[5:]))
    assert json.loads(encode("--json", "--limit", 11, specs=files).out)["rows"] == 11
    run = open_run(tmp_path / "run")
    assert list(documents(run)) == [f"d{place}" for place in range(11)]
    assert [entry["name"] for entry in run.manifest.identity["corpus"]] == ["b.jsonl", "a.jsonl.gz"]
    before = contents(run.path)
    assert encode("--limit", 11, specs=files).code == encode("--limit", 11, "--trust-corpus", specs=files).code == 0
    assert contents(run.path) == before


def test_splitting_a_corpus_into_files_changes_no_vector(encode, tmp_path: Path) -> None:
    folder = tmp_path / "parts"
    for place, rows in enumerate((ROWS[:3], [], ROWS[3:11], ROWS[11:])):
        write(folder / f"{place}.jsonl{'.gz' if place % 2 else ''}", rows)
    assert encode(out="one").code == encode(specs=(folder,), out="many").code == 0
    one, many = open_run(tmp_path / "one"), open_run(tmp_path / "many")
    assert contents(one.path / "shards") == contents(many.path / "shards")
    assert one.manifest.run_id != many.manifest.run_id


def test_fields_are_stored_with_the_vectors(encode, tmp_path: Path) -> None:
    rows = [{"key": 7, "head": "The river", "body": 'stone "x"', "year": 1999, "tags": ["a", "é"], "other": 1}]
    titled = write(tmp_path / "titled.jsonl", rows)
    named = ("--id-field", "key", "--text-field", "body", "--title-field", "head", "--keep", "year", "--keep", "tags")
    assert encode(*named, specs=(titled,)).code == 0
    assert encode(*named[:6], "--keep", "year,tags", specs=(titled,)).code == 0, "the same run"
    kept = {"year": 1999, "tags": ["a", "é"]}
    (found,) = documents(open_run(tmp_path / "run")).items()
    assert found[0] == "7" and found[1][1] == {"title": "The river", "text": 'stone "x"', **kept}
    assert encode(*named, "--no-text", specs=(titled,), out="bare").code == 0
    bare = documents(open_run(tmp_path / "bare"))
    assert bare["7"][1] == kept and bare["7"][2] == found[1][2]
    assert encode("--text-field", "body", "--id-field", ":row", specs=(titled,), out="rows").code == 0
    assert list(documents(open_run(tmp_path / "rows"))) == ["0"]


def test_dtype_auto_is_decided_once_and_recorded(encode, tmp_path: Path) -> None:
    large = write(tmp_path / "large.jsonl", MANY[:256])
    assert encode("--dtype", "auto", specs=(large,)).code == 0
    manifest = open_run(tmp_path / "run").manifest
    chosen = manifest.auto["dtype"]["dtype"]
    assert (
        chosen == manifest.identity["dtype"] in ("float32", "bfloat16", "int8", "int8-bfloat16", "int8-int8", "int16")
    )
    assert manifest.auto["dtype"]["documents"] == 256
    assert encode("--reuse", tmp_path / "run", specs=(large,), out="reused").code == 0
    assert open_run(tmp_path / "reused").manifest.identity["dtype"] == chosen


def test_a_corpus_of_fewer_rows_than_a_trial_is_encoded_in_float32(encode, tmp_path: Path) -> None:
    small = write(tmp_path / "small.jsonl", MANY[:255])
    answer = encode("--dtype", "auto", specs=(small,))
    assert answer.code == 0 and "Trying" not in answer.err
    assert open_run(tmp_path / "run").manifest.identity["dtype"] == "float32"


def test_dtype_auto_builds_each_encoder_once(encode, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from sparse_ingest.models import documents as module
    from sparse_ingest.models import precision

    built = []

    class RecordingEncoder(module.DocumentEncoder):
        def __init__(self, *given: object, dtype: str, **named) -> None:
            built.append(dtype)
            super().__init__(*given, dtype=dtype, **named)

    monkeypatch.setattr(module, "DocumentEncoder", RecordingEncoder)
    monkeypatch.setattr(precision, "KEPT_MASS", 0)
    monkeypatch.setattr(precision, "KEPT_TERMS", 0)
    assert encode("--dtype", "auto", specs=(write(tmp_path / "large.jsonl", MANY[:256]),)).code == 0
    assert built == ["float32", *precision.faster_dtypes("cpu")[:1]]


def test_status_shows_rows_shards_and_completeness(encode, tmp_path: Path) -> None:
    encode()
    answer = command("status", tmp_path / "run", "--json")
    state = json.loads(answer.out)
    assert answer.code == 0 and (state["rows"], state["shards"], state["complete"]) == (20, 3, True)
    answer = command("status", tmp_path)
    assert answer.code == 1 and "is not a run" in answer.err


# Several processes and stop requests

MANY = [{"_id": str(place), "text": f"the river stone {place} " * (place % 5)} for place in range(400)]


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory, model: Path) -> tuple[list[object], Path]:
    """Arguments for a corpus of 41 shards, and its run encoded by one process."""
    folder = tmp_path_factory.mktemp("many")
    rows = [*MANY, *MANY[5:8]]
    arguments = ["encode", "--model", model, "--corpus", write(folder / "many.jsonl", rows), "--shard-rows", 10,
                 "--on-bad-document", "skip", "--device", "cpu"]  # fmt: skip
    assert command(*arguments, "--out", folder / "run").code == 3
    return arguments, folder / "run"


def same_run(out: Path, expected: Path) -> None:
    for folder in ("shards", "skipped"):
        assert contents(out / folder) == contents(expected / folder)
    assert lasting(open_run(out)) == lasting(open_run(expected))
    for name in ("manifest.json", "vocab.json", "starts.json", "complete.json"):
        assert (out / name).read_bytes() == (expected / name).read_bytes()


def test_parts_in_any_order_and_at_once_give_the_run_of_one_process(many, tmp_path: Path) -> None:
    arguments, expected = many
    out = tmp_path / "run"
    planned = command(*arguments, "--out", out, "--plan-only", "--json")
    assert planned.code == 0, planned.err
    check("encode --part", json.loads(planned.out))
    assert json.loads(planned.out) == {
        "run": str(out), "run_id": open_run(out).manifest.run_id, "rows": 403, "shards": 41, "done": 0,
        "first": 0, "end": 41,
    }  # fmt: skip
    parts = ["3/3", "2/3", "2/3"]  # two processes at once make the same part
    workers = [
        start(*arguments, "--out", out, "--part", part, log=tmp_path / f"log-{number}")
        for number, part in enumerate(parts)
    ]
    for worker in workers:
        worker.join(HANGING_S)
    logs = [(tmp_path / f"log-{number}").read_text() for number in range(len(parts))]
    assert [worker.exitcode for worker in workers] == [0] * len(parts), logs
    early = command(*arguments, "--out", out, "--finish")
    assert (
        early.code == 1 and "14 shards of " in early.err and "the first is part-00000. Run the parts again" in early.err
    )
    assert not (out / "complete.json").exists()
    assert (
        "part 1/3 is done (shards 0 to 13); 41 of 41 shards are done; run --finish"
        in command(*arguments, "--out", out, "--part", "1/3").out
    )
    assert command(*arguments, "--out", out, "--finish").code == 3
    same_run(out, expected)
    assert command(*arguments, "--out", out, "--part", "1/3").code == 0, "of a complete run"
    same_run(out, expected)


@pytest.mark.parametrize(("given", "message"), [
    (("--part", "0/3"), "--part 0/3: expected I/N with I from 1 to N, such as 3/8"),
    (("--part", "3"), "--part 3: expected I/N"),
    (("--part", "4/3"), "--part 4/3: expected I/N"),
    (("--part", "1/2", "--finish"), "--part and --finish are different steps"),
    (("--plan-only", "--corpus", "-"), "--plan-only: standard input cannot be divided into parts"),
])  # fmt: skip
def test_steps_of_a_shared_run_are_checked(encode, given: tuple[str, ...], message: str) -> None:
    answer = encode(*given)
    assert answer.code == 2 and message in answer.err


def test_a_part_without_a_shard_ends_with_a_note(encode) -> None:
    answer = encode("--part", "2/9")
    assert answer.code == 0 and "--part 2/9 has no shard: the run has 3 shards" in answer.err


def test_a_finish_without_a_run_creates_nothing(encode, tmp_path: Path) -> None:
    answer = encode("--finish")
    assert answer.code == 1 and "run is not a run. Check --out; a shared run starts with --plan-only." in answer.err
    assert not (tmp_path / "run").exists()


def test_a_complete_run_of_an_earlier_release_is_planned_again(encode, tmp_path: Path) -> None:
    assert encode().code == 0
    (tmp_path / "run" / "starts.json").unlink()
    answer = encode("--plan-only")
    assert answer.code == 0 and "20 rows in 3 shards are planned; the run is complete." in answer.out


def test_rows_after_the_planned_end_are_refused(encode, tmp_path: Path) -> None:
    rows = [{"_id": f"{place:02}", "text": "river " * 9} for place in range(20)]
    changing = write(tmp_path / "changing.jsonl", rows)
    assert encode("--plan-only", specs=(changing,)).code == 0
    before = changing.read_bytes()
    lines = before.splitlines(keepends=True)
    # One more row in as many bytes, in the last shard.
    short = b'{"_id": "x", "text": "a"}\n'
    fill = len(lines[-1]) - len(short) - len(b'{"_id": "y", "text": ""}\n')
    changing.write_bytes(b"".join(lines[:-1]) + short + b'{"_id": "y", "text": "%b"}\n' % (b"b" * fill))
    assert len(changing.read_bytes()) == len(before)
    answer = encode("--part", "1/1", specs=(changing,))
    assert answer.code == 1 and "The corpus changed: part-00002 of " in answer.err
    assert open_run(tmp_path / "run").done_shards() == [0, 1]


def test_a_shard_that_another_process_made_is_kept_or_replaced(encode, tmp_path: Path) -> None:
    assert encode().code == 0
    run = open_run(tmp_path / "run")
    content = run.shard_path(1).read_bytes()
    scratch, sha256 = run.scratch_path("part-00001.x.parquet"), hashlib.sha256(b"mine").hexdigest()
    scratch.write_bytes(b"mine")
    assert not run.add_shard(1, scratch, sha256), "it is done"
    assert run.shard_path(1).read_bytes() == content and not scratch.exists()
    assert not run.add_shard(1, scratch, sha256), "it is done, and the file was removed at the end of the run"
    run.unmark_done(1)
    scratch.write_bytes(b"mine")
    assert run.add_shard(1, scratch, sha256), "a killed process left the other file"
    assert run.shard_path(1).read_bytes() == b"mine"
    scratch.write_bytes(b"mine")
    assert run.add_shard(1, scratch, sha256) and not scratch.exists(), "the same bytes"


def test_other_bytes_of_two_processes_are_an_error_and_made_again(encode, tmp_path: Path, monkeypatch) -> None:
    assert encode().code == 0
    run, done = open_run(tmp_path / "run"), open_run(tmp_path / "run").done(1)
    before = contents(run.path / "shards")
    run.unmark_done(1)
    add = Run.add_shard

    def late(self: Run, shard: int, scratch: Path, sha256: str) -> bool:
        added = add(self, shard, scratch, sha256)
        self.mark_done(shard, {**(done or {}), "sha256": "0" * 64})  # of a process whose file this one has replaced
        return added

    monkeypatch.setattr(Run, "add_shard", late)
    answer = encode()
    assert answer.code == 1 and "Another process wrote different bytes for part-00001 of " in answer.err
    monkeypatch.setattr(Run, "add_shard", add)
    assert run.done(1) is None and encode().code == 0
    assert contents(run.path / "shards") == before


def test_a_second_encode_of_a_run_is_refused(encode, tmp_path: Path) -> None:
    assert encode().code == 0
    with open_run(tmp_path / "run").lock("complete") as held:
        assert held
        answer = encode()
        assert answer.code == 1 and "Another process is encoding " in answer.err and "--part I/N" in answer.err
    assert encode().code == 0


def test_a_plan_that_does_not_fit_the_corpus_is_refused(encode, tmp_path: Path) -> None:
    assert encode().code == 0
    path = tmp_path / "run" / "starts.json"
    planned = json.loads(path.read_text())
    for name, value in (("rows", 30), ("positions", planned["positions"][:-1]), ("groups", [0, 2, 1, 3])):
        path.write_text(json.dumps({**planned, name: value}))
        answer = encode()
        assert answer.code == 1 and "starts.json does not match the corpus, or is damaged. Delete it" in answer.err
    path.write_text("{")
    assert "starts.json cannot be read" in encode().err
    path.unlink()
    assert encode().code == 0


def test_a_corpus_with_other_rows_of_the_same_size_is_refused_by_a_part(encode, tmp_path: Path) -> None:
    """The plan is that of the old rows, so a part would begin within a line."""
    changing = write(tmp_path / "changing.jsonl", [{"_id": f"{place:02}", "text": "river " * 9} for place in range(20)])
    assert encode("--plan-only", specs=(changing,)).code == 0
    lines = changing.read_text().splitlines(keepends=True)
    first, second = lines[0].replace("river river", "river"), lines[1].replace("river river", "river river river")
    changing.write_text("".join([first, *lines[2:11], second, *lines[11:], lines[1]])[: changing.stat().st_size])
    answer = encode("--part", "1/1", specs=(changing,))
    assert answer.code == 1, answer.out
    assert "The corpus changed" in answer.err or "changing.jsonl" in answer.err


def test_many_duplicates_are_removed_in_batches(encode, tmp_path, monkeypatch) -> None:
    from sparse_ingest.encoding import duplicates

    repeated = write(tmp_path / "often.jsonl", [*ROWS, *ROWS[:5], *ROWS[:7]])
    assert encode("--on-bad-document", "skip", "--out", tmp_path / "at-once", specs=(repeated,)).code == 3
    monkeypatch.setattr(duplicates, "AT_ONCE", 2)
    assert encode("--on-bad-document", "skip", specs=(repeated,)).code == 3
    assert sum(len(open_run(tmp_path / "run").skipped(shard)) for shard in range(4)) == 12
    for folder in ("shards", "skipped"):
        assert contents(tmp_path / "run" / folder) == contents(tmp_path / "at-once" / folder)


def test_sigterm_stops_after_the_current_window(many, tmp_path: Path) -> None:
    arguments, expected = many
    for attempt in range(20):
        out, log = tmp_path / f"run-{attempt}", tmp_path / f"log-{attempt}"
        process = start(*arguments, "--out", out, log=log)
        until((out / "done" / "part-00002.json").exists, log.read_text)
        assert process.pid is not None
        os.kill(process.pid, signal.SIGTERM)
        process.join(HANGING_S)
        if process.exitcode != 3:  # 3: the run was complete before the signal came
            break
    assert process.exitcode == 130, log.read_text()
    assert "Stopping after the current window." in log.read_text()
    assert f"{out} keeps the finished shards and windows. Run the same command again to continue." in log.read_text()
    run = open_run(out)
    assert 3 <= len(run.done_shards()) < 41 and run.complete() is None
    assert len(contents(out / "shards")) == len(run.done_shards()) and not contents(out / "tmp")
    assert command(*arguments, "--out", out).code == 3
    assert contents(out / "shards") == contents(expected / "shards")


def test_a_damaged_shard_or_vocabulary_is_an_error_on_resume(encode, tmp_path: Path) -> None:
    assert encode().code == 0
    shard, vocabulary = tmp_path / "run" / "shards" / "part-00001.parquet", tmp_path / "run" / "vocab.json"
    before = shard.read_bytes()
    shard.write_bytes(before[:100] + bytes([before[100] ^ 1]) + before[101:])
    answer = encode()
    assert answer.code == 1 and "part-00001.parquet has SHA-256" in answer.err
    shard.write_bytes(before)
    assert encode().code == 0
    vocabulary.write_text(json.dumps(json.loads(vocabulary.read_text())[::-1]))
    answer = encode()
    assert answer.code == 1 and "vocab.json cannot be read: it has SHA-256" in answer.err


def test_closed_standard_input_is_one_message(encode, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", None)
    answer = encode(specs=("-",))
    assert answer.code == 1 and "Standard input is closed." in answer.err
