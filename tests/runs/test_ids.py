"""Duplicate ids across shards: all are found for any number of ranges, and removed without other changes."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.runs import make_run, write_shard

from sparse_ingest.runs import ids as ids_module
from sparse_ingest.runs.files import SkippedRow
from sparse_ingest.runs.ids import Duplicate, find_duplicates, id_hashes, pieces_of, remove_rows
from sparse_ingest.runs.run import Run
from sparse_ingest.runs.shards import read_doc_ids, read_shard, shard_schema_of, take_rows

NAMES = [f"doc {place} é" for place in range(23)]


def run_of(folder: Path, names: list[str], shard_rows: int) -> Run:
    """Write a run whose row n has the id names[n]: with unique ids first, then renamed."""
    unique = {f"{place}": {"river": 1.0 + place, "stone": 0.5} for place in range(len(names))}
    run = make_run(folder, unique, shard_rows=shard_rows, complete=False)
    for shard in run.done_shards():
        path = run.shard_path(shard)
        parts = [
            part._replace(vectors=part.vectors._replace(doc_ids=[names[int(row)] for row in part.rows]))
            for part in read_shard(path)
        ]
        schema = shard_schema_of(path)
        digest = write_shard(parts, scratch=run.scratch_path("renamed"), target=path, schema=schema)
        run.mark_done(shard, {**(run.done(shard) or {}), "sha256": digest, "skipped": 0, "next": [0, 0, 0, 0]})
    return run


def naive(names: list[str], shard_rows: int) -> set[Duplicate]:
    first: dict[str, int] = {}
    found = set()
    for row, name in enumerate(names):
        if name in first:
            found.add(Duplicate(name, (first[name] // shard_rows, first[name]), (row // shard_rows, row)))
        first.setdefault(name, row)
    return found


@pytest.mark.parametrize("range_ids", [1, 2, 5, 22, 23, 1000])
def test_every_duplicate_id_is_found_with_any_number_of_ranges(tmp_path: Path, range_ids: int) -> None:
    names = [*NAMES[:10], NAMES[3], *NAMES[10:], NAMES[0], NAMES[3], "last", NAMES[22]]
    run = run_of(tmp_path, names, 4)
    found = list(find_duplicates(run, range_ids=range_ids))
    assert len(found) == 4 and set(found) == naive(names, 4)
    assert not list((tmp_path / "tmp").iterdir())


@settings(max_examples=15)
@given(st.lists(st.sampled_from(NAMES), min_size=1, max_size=12), st.integers(1, 4), st.integers(1, 6))
def test_duplicates_match_those_found_with_a_dictionary(
    tmp_path_factory, names: list[str], shard_rows: int, range_ids: int
) -> None:
    run = run_of(tmp_path_factory.mktemp("run"), names, shard_rows)
    found = list(find_duplicates(run, range_ids=range_ids))
    assert len(found) == len(set(found)) and set(found) == naive(names, shard_rows)


def test_ids_with_equal_hashes_are_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [*NAMES[:8], NAMES[2]]
    run = run_of(tmp_path, names, 3)
    for value in (0, 7, (1 << 64) - 1):  # also at the ends of the ranges
        monkeypatch.setattr(ids_module, "hash_id", lambda doc_id, value=value: value)
        assert set(find_duplicates(run, range_ids=2)) == naive(names, 3)


def test_hashes_use_64_bits_and_never_change() -> None:
    assert ids_module.hash_id("doc é") == 0x2E4E78E88AAE7DB3
    assert len({ids_module.hash_id(name) >> 56 for name in map(str, range(4000))}) == 256


def test_an_aborted_search_for_duplicates_can_be_repeated(tmp_path: Path) -> None:
    names = [*NAMES[:4], *NAMES[:4]]
    run = run_of(tmp_path, names, 3)
    assert len(list(islice(find_duplicates(run, range_ids=3), 1))) == 1
    assert set(find_duplicates(run)) == naive(names, 3)


def test_hashes_from_other_processes_are_used_in_any_order(tmp_path: Path) -> None:
    names = [*NAMES[:7], *NAMES[:2]]
    run = run_of(tmp_path, names, 3)
    hashes = pieces_of(run, range_ids=2)
    hashes.add(np.concatenate([id_hashes(run, 2), id_hashes(run, 1)]))
    hashes.add(id_hashes(run, 0))
    assert set(find_duplicates(run, hashes=hashes)) == naive(names, 3)
    assert list(find_duplicates(run, hashes=pieces_of(run))) == []


def test_an_empty_run_has_no_duplicates(tmp_path: Path) -> None:
    assert list(find_duplicates(make_run(tmp_path, {}, complete=False))) == []


@pytest.mark.parametrize("step", ["write_parts", "write_skipped", "mark_done"])
def test_a_kill_during_removal_leaves_the_shard_not_done(tmp_path: Path, monkeypatch, step: str) -> None:
    run = run_of(tmp_path, NAMES[:9], 4)

    def die(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(ids_module if step == "write_parts" else Run, step, die)
    with pytest.raises(KeyboardInterrupt):
        remove_rows(run, 1, {5: SkippedRow(5, "f", 6, "duplicate")})
    assert run.done_shards() == [0, 2]


def test_rows_are_removed_and_named(tmp_path: Path) -> None:
    run = run_of(tmp_path, NAMES[:9], 4)
    untouched = run.shard_path(0).read_bytes()
    before = list(read_shard(run.shard_path(1)))
    run.write_skipped(1, [SkippedRow(100, "f", 101, "an earlier reason")])
    gone = {5: SkippedRow(5, "f", 6, "duplicate"), 7: SkippedRow(7, "f", 8, "duplicate")}
    remove_rows(run, 1, gone)
    after = list(read_shard(run.shard_path(1)))
    assert [name for _, name in read_doc_ids(run.shard_path(1))] == [NAMES[4], NAMES[6]]
    for found, expected in zip(after, (take_rows(part, np.array([0, 2])) for part in before), strict=True):
        assert np.array_equal(found.vectors.weights, expected.vectors.weights) and found.fields == expected.fields
    done = run.done(1) or {}
    assert (done["rows"], done["nnz"], done["empty"], done["skipped"], done["first_row"]) == (2, 4, 0, 3, 4)
    assert [row.row for row in run.skipped(1)] == [5, 7, 100]
    assert run.shard_path(0).read_bytes() == untouched
    remove_rows(run, 1, {row: SkippedRow(row, "f", row + 1, "duplicate") for row in (4, 6)})
    assert (run.done(1) or {})["rows"] == 0 and list(read_shard(run.shard_path(1))) == []
