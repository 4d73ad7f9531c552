"""Diff of two runs: matches a comparison of two dictionaries, for any number of ranges."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.runs import make_run, write_shard

from sparse_ingest.errors import RunError
from sparse_ingest.records import SparseRows
from sparse_ingest.runs import changes
from sparse_ingest.runs.changes import Changes
from sparse_ingest.runs.run import Run
from sparse_ingest.runs.shards import ShardPart, read_shard, shard_schema, shard_schema_of, take_rows

IDS = [f"doc {place} é" for place in range(12)]
VECTORS: list[dict[str, float]] = [{}, {"river": 1.0}, {"river": 1.5}, {"stone": 1.0}, {"river": 1.0, "stone": 0.5}]
FIELDS: list[dict[str, object]] = [{}, {"title": "a"}, {"title": "b"}]
Corpus = dict[str, tuple[int, int]]  # id to (vector, fields)

corpora = st.lists(
    st.tuples(st.sampled_from(IDS), st.integers(0, len(VECTORS) - 1), st.integers(0, len(FIELDS) - 1)), max_size=12
).map(lambda rows: {doc_id: (vector, fields) for doc_id, vector, fields in rows})


def run_of(folder: Path, corpus: Corpus, shard_rows: int, **settings: Any) -> Run:
    vectors = {doc_id: VECTORS[vector] for doc_id, (vector, _) in corpus.items()}
    fields = {doc_id: FIELDS[place] for doc_id, (_, place) in corpus.items()}
    return make_run(folder, vectors, shard_rows=shard_rows, fields=fields, **settings)


def sent(found: Changes, new: Run) -> list[str]:
    """Return the ids of all documents that differ; check their vectors and fields against the new run."""
    ids: list[str] = []
    for shard in new.done_shards():
        whole = [part for part in read_shard(new.shard_path(shard))]
        some = list(found.documents(shard))
        assert sum(len(part.rows) for part in some) == found.differing(shard)
        everything = {row: one for part in whole for row, one in documents_of(part)}
        for part in some:
            assert len(part.rows)
            for row, one in documents_of(part):
                assert everything[row] == one
                ids.append(one[0])
    return ids


def documents_of(part: Any) -> list[tuple[int, tuple[Any, ...]]]:
    return [
        (int(row), (part.vectors.doc_ids[place], part.text_hashes[place], part.fields[place],
                    *(column.tolist() for column in part.vectors.row(place))))
        for place, row in enumerate(part.rows)
    ]  # fmt: skip


@settings(max_examples=25)
@given(corpora, corpora, st.lists(st.sampled_from(IDS), max_size=2), st.data())
def test_changes_match_a_comparison_of_dictionaries(
    tmp_path_factory, older: Corpus, newer: Corpus, refused: list[str], data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("runs")
    old = run_of(folder / "old", older, data.draw(st.integers(1, 5)))
    new = run_of(folder / "new", newer, data.draw(st.integers(1, 5)))
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(changes, "RANGE_ROWS", data.draw(st.integers(1, 30)))
        found = Changes(old, new, folder, refused=refused)
    same = [doc_id for doc_id in newer if older.get(doc_id) == newer[doc_id] and doc_id not in refused]
    missing = [doc_id for doc_id in older if doc_id not in newer]
    assert sent(found, new) == [doc_id for doc_id in newer if doc_id not in same]
    assert list(found.missing_ids()) == missing


def rewritten(run: Run, change: Any) -> Run:
    """Rewrite every row group of a run with a function."""
    for shard in run.done_shards():
        path = run.shard_path(shard)
        parts = [change(part) for part in read_shard(path)]
        digest = write_shard(parts, scratch=run.scratch_path("again"), target=path, schema=shard_schema_of(path))
        run.mark_done(shard, {**(run.done(shard) or {}), "sha256": digest, "rows": sum(len(one.rows) for one in parts)})
    run.mark_complete(run.complete() or {})
    return run


CORPUS: Corpus = {doc_id: (place % len(VECTORS), place % 2) for place, doc_id in enumerate(IDS)}


def test_another_text_with_the_same_vector_and_fields_differs(tmp_path: Path) -> None:
    old = run_of(tmp_path / "old", CORPUS, 5)
    new = rewritten(
        run_of(tmp_path / "new", CORPUS, 5), lambda part: part._replace(text_hashes=[b"x" * 16, *part.text_hashes[1:]])
    )
    assert sent(Changes(old, new, tmp_path), new) == [IDS[0], IDS[5], IDS[10]]


def test_one_bit_of_one_weight_differs(tmp_path: Path) -> None:
    def nudged(part: Any) -> Any:
        bits = part.vectors.weights.view(np.uint16).copy()
        bits[-1] ^= 1
        return part._replace(vectors=part.vectors._replace(weights=bits.view(np.float16)))

    old, new = run_of(tmp_path / "old", CORPUS, 12), rewritten(run_of(tmp_path / "new", CORPUS, 12), nudged)
    assert sent(Changes(old, new, tmp_path), new) == [IDS[11]]


def test_row_groups_shard_sizes_and_weight_types_do_not_matter(tmp_path: Path) -> None:
    old = run_of(tmp_path / "old", CORPUS, 4, weights="float32")
    new = run_of(tmp_path / "new", dict(reversed(CORPUS.items())), 5)
    found = Changes(old, new, tmp_path)
    assert sent(found, new) == [] == list(found.missing_ids())


def test_an_id_duplicated_in_the_older_run_is_not_missing(tmp_path: Path) -> None:
    old = rewritten(
        run_of(tmp_path / "old", CORPUS, 4),
        lambda part: part._replace(vectors=part.vectors._replace(doc_ids=["twice", *part.vectors.doc_ids[1:]])),
    )
    new = run_of(tmp_path / "new", {"twice": (0, 0)}, 5)
    assert "twice" not in list(Changes(old, new, tmp_path).missing_ids())


def test_runs_with_different_vocabularies_are_refused(tmp_path: Path) -> None:
    old = run_of(tmp_path / "old", CORPUS, 4)
    new = run_of(tmp_path / "new", CORPUS, 4, vocabulary=["river", "stone"])
    with pytest.raises(RunError, match="different vocabularies"):
        Changes(old, new, tmp_path)


def test_a_shard_that_lost_rows_is_detected(tmp_path: Path) -> None:
    old, new = run_of(tmp_path / "old", CORPUS, 12), run_of(tmp_path / "new", CORPUS, 12)
    path = new.shard_path(0)
    parts = [take_rows(part, np.arange(3)) for part in read_shard(path)]
    digest = write_shard(parts, scratch=new.scratch_path("again"), target=path, schema=shard_schema_of(path))
    new.mark_done(0, {**(new.done(0) or {}), "sha256": digest})
    new.mark_complete(new.complete() or {})
    with pytest.raises(RunError, match="has 3 documents, but its record in done/ has 12"):
        Changes(old, new, tmp_path)


def test_temporary_tables_have_no_name_on_disk(tmp_path: Path) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    found = Changes(run_of(tmp_path / "old", CORPUS, 4), run_of(tmp_path / "new", {}, 4), scratch)
    assert len(list(found.missing_ids())) == 12 and list(scratch.iterdir()) == []


def test_two_long_runs_are_compared_in_constant_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten times as many documents need at most a fixed amount of additional memory."""
    import tracemalloc

    monkeypatch.setattr(changes, "RANGE_ROWS", 2000)
    peaks = []
    for documents in (2_000, 20_000):
        runs = [plain_run(tmp_path / f"{name}{documents}", documents, seed) for seed, name in enumerate(("old", "new"))]
        tracemalloc.start()
        found = Changes(runs[0], runs[1], tmp_path)
        shown = [len(part.rows) for shard in runs[1].done_shards() for part in found.documents(shard)]
        gone = sum(1 for _ in found.missing_ids())
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert (sum(shown), gone) == (documents, 1)
    assert peaks[1] < 1.5 * peaks[0], peaks


def plain_run(folder: Path, documents: int, seed: int) -> Run:
    """Write a run with the ids seed, seed + 1, …, 8 terms each; weights depend on the seed."""
    run = make_run(folder, {}, vocabulary=["a", "b", "c", "d", "e", "f", "g", "h"])
    for shard, first in enumerate(range(0, documents, 2000)):
        ids = [str(seed + place) for place in range(first, first + 2000)]
        weights = np.full(8 * 2000, 1 + seed, dtype=np.float16)
        vectors = SparseRows(ids, np.arange(0, 8 * 2001, 8), np.tile(np.arange(8, dtype=np.uint16), 2000), weights)
        part = ShardPart(np.arange(first, first + 2000, dtype=np.uint64), [b"t" * 16] * 2000, vectors, ["{}"] * 2000)
        path = run.shard_path(shard)
        digest = write_shard([part], scratch=run.scratch_path("part"), target=path, schema=shard_schema(8, "float16"))
        run.mark_done(shard, {"rows": 2000, "sha256": digest})
    run.unmark_complete()
    return run
