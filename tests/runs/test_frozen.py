"""Run format 1: every release reads frozen_run, which the first release wrote from frozen_corpus.jsonl.

    sparse-ingest encode --model package:cognition/model --corpus tests/runs/frozen_corpus.jsonl \
        --out tests/runs/frozen_run --shard-rows 8 --keep year --keep tags --on-bad-document skip \
        --dtype float32 --device cpu

In done/ only the host was replaced; the empty locks/ and tmp/ are omitted. frozen_expected.json was checked by hand. If
one of these tests fails, the format or an identity changed: fix the code, do not write the files again.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from support.forked import command

from sparse_ingest.pipeline import ModelSettings
from sparse_ingest.runs.ids import find_duplicates
from sparse_ingest.runs.manifest import canonical_json
from sparse_ingest.runs.run import Run, open_run
from sparse_ingest.runs.shards import read_doc_ids, read_shard, text_hash

HERE = Path(__file__).parent
EXPECTED = json.loads((HERE / "frozen_expected.json").read_text())
ENCODE = ("encode", "--model", "package:cognition/model", "--corpus", HERE / "frozen_corpus.jsonl", "--shard-rows", 8,
          "--keep", "year", "--keep", "tags", "--on-bad-document", "skip", "--dtype", "float32", "--device", "cpu",
          "--json")  # fmt: skip


@pytest.fixture
def run() -> Run:
    return open_run(HERE / "frozen_run")


def rows_of(run: Run) -> Iterator[tuple[int, str, str, str, list[int], list[float]]]:
    for shard in run.done_shards():
        for part in read_shard(run.shard_path(shard)):
            for place, doc_id in enumerate(part.vectors.doc_ids):
                token_ids, weights = part.vectors.row(place)
                yield (
                    int(part.rows[place]), doc_id, part.text_hashes[place].hex(), part.fields[place],
                    token_ids.tolist(), weights.tolist(),
                )  # fmt: skip


def test_the_files_of_the_frozen_run_are_unchanged(run: Run) -> None:
    assert run.done_shards() == [0, 1]
    for shard, (name, sha256) in enumerate(EXPECTED["shards"].items()):
        path = run.shard_path(shard)
        assert path.name == f"{name}.parquet"
        assert hashlib.sha256(path.read_bytes()).hexdigest() == sha256 == (run.done(shard) or {})["sha256"]
    vocabulary = (run.path / "vocab.json").read_bytes()
    assert hashlib.sha256(vocabulary).hexdigest() == EXPECTED["vocabulary"]["sha256"]


def test_its_manifest_and_counts_are_read(run: Run) -> None:
    assert run.manifest.format == 1 and run.manifest.shard_rows == 8
    assert run.manifest.run_id == EXPECTED["run_id"]
    assert hashlib.sha256(canonical_json(run.manifest.identity).encode()).hexdigest() == EXPECTED["run_id"]
    assert run.manifest.model["document"] == "package:cognition/model"
    assert run.complete() == EXPECTED["complete"]
    assert [list(row) for shard in run.done_shards() for row in run.skipped(shard)] == EXPECTED["skipped"]
    vocabulary = run.vocabulary()
    assert len(vocabulary) == EXPECTED["vocabulary"]["length"]
    assert all(vocabulary[int(token_id)] == token for token_id, token in EXPECTED["vocabulary"]["tokens"].items())


def test_every_value_of_its_documents_is_read(run: Run) -> None:
    vocabulary = run.vocabulary()
    rows = list(rows_of(run))
    assert [doc_id for _, doc_id, *_ in rows] == list(EXPECTED["documents"])
    for row, doc_id, text, fields, token_ids, weights in rows:
        expected = EXPECTED["documents"][doc_id]
        assert (row, text, json.loads(fields)) == (expected["row"], expected["text_hash"], expected["fields"])
        assert len(token_ids) == expected["terms"] and token_ids == sorted(set(token_ids))
        found = {vocabulary[token_id]: weight for token_id, weight in zip(token_ids, weights, strict=True)}
        assert {token: found[token] for token in expected["heaviest"]} == expected["heaviest"]
        assert max(found.values()) == max(expected["heaviest"].values())
    assert hashlib.sha256(canonical_json(rows).encode()).hexdigest() == EXPECTED["every_value"]
    for shard in run.done_shards():
        assert list(read_doc_ids(run.shard_path(shard))) == [row[:2] for row in rows if row[0] // 8 == shard]


def test_any_parquet_reader_gives_the_same_rows(run: Run) -> None:
    """The format is Parquet and JSON; no code of this package is needed."""
    table = pq.read_table(run.path / "shards")
    assert table.column_names == ["row", "doc_id", "text_hash", "token_ids", "weights", "fields"]
    columns = table.to_pydict()
    columns["text_hash"] = [value.hex() for value in columns["text_hash"]]
    assert list(zip(*(columns[name] for name in ("row", "doc_id", "text_hash", "fields", "token_ids", "weights")),
                    strict=True)) == list(rows_of(run))  # fmt: skip


def test_text_hashes_match_the_corpus() -> None:
    for line in (HERE / "frozen_corpus.jsonl").read_text().splitlines():
        row = json.loads(line)
        expected = EXPECTED["documents"].get(str(row["_id"]))
        if expected and row["text"] == expected["fields"]["text"]:
            text = " ".join(part for part in (row.get("title"), row["text"]) if part)
            assert text_hash(text).hex() == expected["text_hash"]


def test_the_frozen_run_can_be_searched(run: Run) -> None:
    from sparse_ingest.models.query_encoders import query_encoder
    from sparse_ingest.searching.run_search import search_run

    encoder = query_encoder(ModelSettings(document="package:cognition/model"))
    for question, doc_id in (
        ("baking bread in an oven", "bread"), ("which bird hunts mice", "owl"), ("stone bridge", "stone"),
        ("what is glass made of", "glass"),
    ):  # fmt: skip
        hits = search_run(run, encoder.encode([question])[0], size=3)
        assert hits[0].doc_id == doc_id, question
        assert hits[0].fields["text"] == EXPECTED["documents"][doc_id]["fields"]["text"]


def test_this_release_can_resume_the_frozen_run(run: Run, tmp_path: Path) -> None:
    """The identity and the hashes of the model and of the rows are computed as before."""
    copy = Path(shutil.copytree(run.path, tmp_path / "run"))
    before = {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()}
    answer = command(*ENCODE, "--out", copy)
    assert answer.code == 3, answer.err
    report = json.loads(answer.out)
    assert report["run_id"] == EXPECTED["run_id"] and report["rows"] == 12
    assert all(path.read_bytes() == content for path, content in before.items())
    assert list(find_duplicates(open_run(copy))) == []


def test_this_release_computes_the_same_vectors(run: Run, tmp_path: Path) -> None:
    """Not the same bytes: those are promised only for one release on one kind of device."""
    assert command(*ENCODE, "--out", tmp_path / "run").code == 3
    made = open_run(tmp_path / "run")
    assert made.manifest == run.manifest and made.vocabulary() == run.vocabulary()
    assert (made.path / "skipped" / "part-00001.jsonl").read_bytes() == run.skipped_path(1).read_bytes()
    for found, expected in zip(rows_of(made), rows_of(run), strict=True):
        assert found[:4] == expected[:4]
        one, other = (dict(zip(*row[4:], strict=True)) for row in (found, expected))
        assert all(abs(one.get(token, 0) - other.get(token, 0)) < 2e-3 for token in one.keys() | other.keys())
