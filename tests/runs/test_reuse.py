"""Reuse of vectors of an old run by text hash: all are found, in any order, with few row groups in memory."""

from __future__ import annotations

import random
import weakref
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.runs import WORDS, make_run, write_shard

from sparse_ingest.errors import RunError
from sparse_ingest.records import SparseRows
from sparse_ingest.runs import reuse, shards
from sparse_ingest.runs.reuse import OldVectors, refuse_other_settings
from sparse_ingest.runs.run import Run
from sparse_ingest.runs.shards import read_shard, shard_schema_of, text_hash

MANY = {
    f"d{place}": {word: 0.1 + place + number for number, word in enumerate(WORDS[: place % 5])} for place in range(41)
}


def with_text_hashes(run: Run, hashes: list[bytes], part_rows: int) -> Run:
    """Rewrite the run: row n gets the text hash hashes[n], in row groups of `part_rows`."""
    for shard in run.done_shards():
        path = run.shard_path(shard)
        schema = shard_schema_of(path)
        parts = []
        for part in read_shard(path):
            part = part._replace(text_hashes=[hashes[int(row)] for row in part.rows])
            starts = range(0, len(part.rows), part_rows)
            places = [np.arange(start, min(start + part_rows, len(part.rows))) for start in starts]
            parts += [shards.take_rows(part, some) for some in places]
        digest = write_shard(parts, scratch=run.scratch_path("again"), target=path, schema=schema)
        run.mark_done(shard, {**(run.done(shard) or {}), "sha256": digest})
    run.mark_complete(run.complete() or {})
    return run


def rows_of(vectors: SparseRows) -> list[tuple[str, list[int], list[float]]]:
    return [
        (doc_id, *(column.tolist() for column in vectors.row(place))) for place, doc_id in enumerate(vectors.doc_ids)
    ]


def naive(run: Run) -> dict[bytes, tuple[str, list[int], list[float]]]:
    found: dict[bytes, tuple[str, list[int], list[float]]] = {}
    for shard in run.done_shards():
        for part in read_shard(run.shard_path(shard)):
            for digest, row in zip(part.text_hashes, rows_of(part.vectors), strict=True):
                found.setdefault(digest, row)
    return found


@settings(max_examples=25)
@given(st.data())
def test_found_vectors_match_a_dictionary(tmp_path_factory, data: st.DataObject) -> None:
    # Few distinct hashes, so that many repeat; some differ only in the second half.
    pool = [high.to_bytes(8, "big") + low.to_bytes(8, "big") for high in (0, 1, 2**64 - 1) for low in (0, 5, 2**64 - 1)]
    hashes = data.draw(st.lists(st.sampled_from(pool), max_size=20))
    folder = tmp_path_factory.mktemp("run")
    documents = {f"d{place}": MANY[f"d{place}"] for place in range(len(hashes))}
    run = make_run(folder, documents, shard_rows=data.draw(st.integers(1, 7)))
    with_text_hashes(run, hashes, data.draw(st.integers(1, 4)))
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(reuse, "RANGE_ROWS", data.draw(st.integers(1, 25)))
        old = OldVectors(run, folder)
    expected = naive(run)
    assert len(old) == len(expected)
    asked = data.draw(st.lists(st.sampled_from(pool), max_size=12))
    known, vectors = old.find(asked)
    assert known.tolist() == [digest in expected for digest in asked]
    assert (rows_of(vectors) if vectors else []) == [expected[digest] for digest in asked if digest in expected]


@pytest.mark.parametrize("weights", ["float16", "float32"])
def test_vectors_keep_their_bytes_and_types(tmp_path: Path, weights: str) -> None:
    run = make_run(tmp_path, MANY, shard_rows=10, weights=weights)  # type: ignore[arg-type]
    ids = list(MANY)
    known, vectors = OldVectors(run, tmp_path).find([text_hash(doc_id) for doc_id in ids])
    assert known.all() and list(vectors.doc_ids) == ids
    parts = [part.vectors for shard in run.done_shards() for part in read_shard(run.shard_path(shard))]
    assert vectors.weights.dtype == parts[0].weights.dtype == np.dtype(weights)
    assert vectors.token_ids.dtype == parts[0].token_ids.dtype
    assert vectors.weights.tobytes() == b"".join(part.weights.tobytes() for part in parts)
    assert vectors.token_ids.tobytes() == b"".join(part.token_ids.tobytes() for part in parts)


def test_a_corpus_in_the_same_order_reads_each_row_group_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hashes = [text_hash(doc_id) for doc_id in MANY]
    old = OldVectors(with_text_hashes(make_run(tmp_path, MANY, shard_rows=10), hashes, 4), tmp_path)
    read: list[tuple[Path, int]] = []
    monkeypatch.setattr(reuse, "read_vectors", lambda *where, **how: read.append(where) or shards.read_vectors(*where))
    for start in range(0, len(hashes), 3):
        old.find([text_hash("new"), *hashes[start : start + 3]])
    assert len(read) == len(set(read)) == 13


def test_a_shuffled_corpus_is_found_with_few_row_groups_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hashes = [text_hash(doc_id) for doc_id in MANY]
    run = with_text_hashes(make_run(tmp_path, MANY, shard_rows=10), hashes, 1)
    old, expected = OldVectors(run, tmp_path), naive(run)
    read: list[weakref.ref] = []

    def read_and_watch(path: Path, group: int, **how: int) -> SparseRows:
        vectors = shards.read_vectors(path, group)
        read.append(weakref.ref(vectors.indptr))
        return vectors

    monkeypatch.setattr(reuse, "read_vectors", read_and_watch)
    shuffled = random.Random(5).sample(hashes, len(hashes))
    for start in range(0, len(shuffled), 15):
        some = shuffled[start : start + 15]
        known, vectors = old.find(some)
        assert known.all() and rows_of(vectors) == [expected[digest] for digest in some]
        del vectors
        assert sum(one() is not None for one in read) <= reuse.CACHED_GROUPS < len(read)


def test_an_empty_run_or_an_empty_request_gives_no_vectors(tmp_path: Path) -> None:
    known, vectors = OldVectors(make_run(tmp_path / "empty", {}), tmp_path).find([text_hash("d1")])
    assert known.tolist() == [False] and vectors is None
    known, vectors = OldVectors(make_run(tmp_path / "many", MANY, weights="float32"), tmp_path).find([])
    assert len(known) == 0 and vectors is None


def test_temporary_tables_have_no_name_on_disk(tmp_path: Path) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    old = OldVectors(make_run(tmp_path / "run", MANY), scratch)
    assert old.find([text_hash("d7")])[0].all() and list(scratch.iterdir()) == []


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"dtype": "bfloat16"}, "dtype: it has 'float32', requested: 'bfloat16'"),
        ({"top_k": 100}, "top_k: it has none, requested: 100"),
        ({"window_stride": 64}, "window_stride: it has none, requested: 64"),
        ({"overflow": "windows"}, "overflow: it has 'truncate'"),
        ({"weights": "float32"}, "weights: it has 'float16'"),
        ({"model": {"sha256": "ab", "max_length": 128}}, "model.max_length: it has 512, requested: 128"),
    ],
)
def test_a_run_with_other_settings_is_refused_with_both_values(tmp_path: Path, changed: dict, message: str) -> None:
    run = make_run(tmp_path, {})
    like = {"model": {"sha256": "ab", "max_length": 512}, "dtype": "float32", "weights": "float16", "top_k": None,
            "overflow": "truncate"}  # fmt: skip
    run.manifest.identity.clear()
    run.manifest.identity.update(like, corpus=[{"name": "a"}], limit=None, shard_rows=8, fields={}, format=1)
    refuse_other_settings(
        run, {**like, "corpus": [{"name": "b"}], "limit": 10, "shard_rows": 9, "fields": {"keep": ["x"]}}
    )
    with pytest.raises(RunError, match=message):
        refuse_other_settings(run, {**like, **changed})
