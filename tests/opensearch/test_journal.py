"""The journal: what is written is complete, and what a killed process left half is not believed."""

from __future__ import annotations

from pathlib import Path

import pytest

from sparse_ingest.errors import RunError
from sparse_ingest.opensearch.journal import DeadLetter, Journal, open_journal

DEAD = [DeadLetter("é", 0, 7, 400, "mapper_parsing_exception: no"), DeadLetter("b", 0, 9, 400, "no")]


@pytest.fixture
def journal(tmp_path: Path) -> Journal:
    return open_journal(tmp_path, "CLUSTER", "INDEX")


def test_an_unused_journal_is_empty_and_makes_no_folder(tmp_path: Path, journal: Journal) -> None:
    assert journal.finished() == {}
    assert list(journal.dead()) == []
    assert list(tmp_path.iterdir()) == []


def test_finished_shards_and_dead_letters_come_back(tmp_path: Path, journal: Journal) -> None:
    journal.begin(0)
    journal.finish(0, {"rows": 3}, DEAD)
    journal.begin(1)
    journal.finish(1, {"rows": 4}, [])
    assert journal.finished() == {0: {"shard": 0, "rows": 3}, 1: {"shard": 1, "rows": 4}}
    assert list(journal.dead()) == DEAD
    assert (tmp_path / "load" / "CLUSTER" / "INDEX" / "journal.jsonl").exists()


def test_a_torn_line_is_ignored_and_cut_before_the_next(journal: Journal) -> None:
    journal.begin(0)
    journal.finish(0, {"rows": 3}, DEAD)
    for path in (journal.dead_path, journal.dead_path.with_name("journal.jsonl")):
        with path.open("ab") as file:
            file.write(b'{"shard": 1, "ro')
    assert list(journal.finished()) == [0]
    assert list(journal.dead()) == DEAD
    again = [DeadLetter("x", 1, 11, 400, "no")]
    journal.begin(1)
    journal.finish(1, {"rows": 4}, again)
    assert list(journal.finished()) == [0, 1]
    assert list(journal.dead()) == DEAD + again


def test_a_file_that_is_one_torn_line_becomes_empty(journal: Journal) -> None:
    journal.begin(0)
    path = journal.dead_path.with_name("journal.jsonl")
    path.write_bytes(b'{"shard": 0')
    assert journal.finished() == {}
    journal.finish(2, {}, [])
    assert path.read_bytes() == b'{"shard": 2}\n'


def test_a_shard_that_begins_again_loses_its_dead_letters_only(journal: Journal) -> None:
    other = [DeadLetter("x", 1, 11, 400, "no")]
    for shard, dead in ((0, DEAD), (1, other)):
        journal.begin(shard)
        journal.finish(shard, {}, dead)
    journal.begin(0)
    assert list(journal.dead()) == other


def test_a_damaged_line_in_the_middle_is_named(journal: Journal) -> None:
    journal.begin(0)
    journal.dead_path.with_name("journal.jsonl").write_bytes(b'{"shard": 0}\nrubbish\n{"shard": 1}\n')
    with pytest.raises(RunError, match="journal.jsonl, line 2 is no JSON"):
        journal.finished()
