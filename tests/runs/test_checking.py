"""Checks of shards against the manifest and records of a run."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from support.runs import DOCUMENTS, make_run, write_shard

from sparse_ingest.errors import RunError
from sparse_ingest.runs.checking import DocumentPlace, checked_parts, find_documents, read_document
from sparse_ingest.runs.run import Run
from sparse_ingest.runs.shards import read_shard, shard_schema_of, take_rows


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return make_run(tmp_path / "run")


def test_intact_shards_give_their_parts_in_order(run: Run) -> None:
    parts = list(checked_parts(run, [0, 1]))
    assert [doc_id for part in parts for doc_id in part.vectors.doc_ids] == list(DOCUMENTS)


def test_one_changed_byte_is_detected_before_the_first_part(run: Run) -> None:
    path = run.shard_path(1)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    parts = checked_parts(run, [0, 1])
    next(parts)
    with pytest.raises(RunError, match=r"part-00001.parquet has SHA-256 \w+, but its record in done/ has \w+"):
        next(parts)


def test_a_shard_of_another_run_is_detected(run: Run, tmp_path: Path) -> None:
    other = make_run(tmp_path / "other", {"x": {"river": 1.0}})
    run.shard_path(0).write_bytes(other.shard_path(0).read_bytes())
    with pytest.raises(RunError, match="The shard is damaged"):
        list(checked_parts(run, [0]))


def test_a_missing_shard_is_reported(run: Run) -> None:
    run.shard_path(0).unlink()
    with pytest.raises(RunError, match=re.escape(f"{run.shard_path(0)} is missing")):
        list(checked_parts(run, [0]))


def test_a_wrong_count_is_detected(run: Run) -> None:
    run.mark_done(0, {**(run.done(0) or {}), "rows": 4})
    with pytest.raises(RunError, match="has 3 documents, but its record in done/ has 4"):
        list(checked_parts(run, [0]))


def test_documents_are_found_by_their_ids_alone(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", {f"d{number}": {"river": number + 1.0} for number in range(7)})
    # Two row groups in a shard.
    parts = list(read_shard(run.shard_path(1)))
    pieces = [take_rows(parts[0], np.arange(start, end)) for start, end in ((0, 1), (1, 3))]
    sha256 = write_shard(
        pieces, scratch=tmp_path / "new", target=run.shard_path(1), schema=shard_schema_of(run.shard_path(1))
    )
    run.mark_done(1, {**run.need_done(1), "sha256": sha256})
    # The weights of the last shard cannot be read.
    other = run.shard_path(2)
    content = other.read_bytes()
    offset = pq.ParquetFile(other).metadata.row_group(0).column(4).data_page_offset
    other.write_bytes(content[:offset] + bytes(8) + content[offset + 8 :])
    found = find_documents(run, [0, 1, 2], ["d6", "d4", "nowhere", "d0"])
    assert found == {
        "d0": DocumentPlace(0, 0, 0, 0), "d4": DocumentPlace(1, 1, 0, 4), "d6": DocumentPlace(2, 0, 0, 6),
    }  # fmt: skip
    document = read_document(run, found["d4"])
    assert (document.vectors.doc_ids, document.vectors.weights.tolist()) == (["d4"], [5.0])
    with pytest.raises(RunError, match="The shard is damaged"):
        read_document(run, found["d6"])
