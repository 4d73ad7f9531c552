"""The load journal: complete lines are read back, and the half line of a killed process is ignored."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from sparse_ingest.cluster.journal import Journal
from sparse_ingest.errors import RunError
from sparse_ingest.records import Refusal

DEAD = [Refusal("é", 0, 7, 400, "mapper_parsing_exception: no"), Refusal("b", 0, 9, 400, "no")]
OTHER = [Refusal("x", 1, 11, 400, "no")]


@pytest.fixture
def journal(tmp_path: Path) -> Journal:
    return Journal(tmp_path / "load" / "CLUSTER" / "INDEX")


def load(journal: Journal, shard: int, rows: int, dead: list[Refusal]) -> None:
    journal.begin({shard})
    journal.record_dead(dead)
    journal.finish(shard, {"rows": rows, "acknowledged": rows - len(dead), "refused": len(dead)})


def counts(journal: Journal) -> dict[int, tuple[int, int]]:
    return {shard: (line["acknowledged"], line["refused"]) for shard, line in journal.finished().items()}


def test_an_unused_journal_is_empty_and_creates_no_folder(tmp_path: Path, journal: Journal) -> None:
    assert journal.finished() == {}
    assert list(journal.dead()) == []
    assert list(tmp_path.iterdir()) == []


def test_finished_shards_and_dead_letters_are_read_back(tmp_path: Path, journal: Journal) -> None:
    load(journal, 0, 3, DEAD)
    load(journal, 1, 4, [])
    assert counts(journal) == {0: (1, 2), 1: (4, 0)}
    assert list(journal.dead()) == DEAD
    assert journal.refused() == {0: 2}
    assert (tmp_path / "load" / "CLUSTER" / "INDEX" / "journal.jsonl").exists()


def test_a_partial_last_line_is_ignored_and_removed_before_the_next_write(journal: Journal) -> None:
    load(journal, 0, 3, DEAD)
    for path in (journal.dead_path, journal.dead_path.with_name("journal.jsonl")):
        with path.open("ab") as file:  # type: ignore[call-arg]
            file.write(b'{"shard": 1, "ro')
    assert list(journal.finished()) == [0]
    assert list(journal.dead()) == DEAD
    load(journal, 1, 4, OTHER)
    assert list(journal.finished()) == [0, 1]
    assert list(journal.dead()) == DEAD + OTHER


def test_a_file_of_one_partial_line_is_emptied(journal: Journal) -> None:
    journal.begin({0})
    path = journal.dead_path.with_name("journal.jsonl")
    path.write_bytes(b'{"shard": 0')
    assert journal.finished() == {}
    journal.finish(2, {})
    assert path.read_bytes() == b'{"shard": 2}\n'


def test_dead_letters_of_an_unfinished_shard_are_ignored_and_removed_when_it_restarts(journal: Journal) -> None:
    load(journal, 1, 4, OTHER)
    journal.record_dead(DEAD)
    assert list(journal.dead()) == OTHER
    load(journal, 0, 3, DEAD[:1])
    assert sorted(journal.dead()) == sorted(OTHER + DEAD[:1])


def test_restarted_shards_lose_only_their_own_dead_letters(journal: Journal) -> None:
    load(journal, 0, 3, DEAD)
    load(journal, 1, 4, OTHER)
    load(journal, 2, 4, [Refusal("y", 2, 20, 400, "no")])
    journal.begin({0, 2})
    assert list(journal.dead()) == OTHER


def test_after_a_retry_dead_letters_and_counts_agree(journal: Journal) -> None:
    load(journal, 0, 3, DEAD)
    load(journal, 1, 4, OTHER)
    assert journal.dead_rows(0) == [7, 9]
    journal.retried(0, iter(DEAD[1:]))
    assert sorted(journal.dead()) == sorted(OTHER + DEAD[1:])
    assert counts(journal) == {0: (2, 1), 1: (3, 1)}
    journal.retried(0, iter(()))
    assert counts(journal) == {0: (3, 0), 1: (3, 1)}


def test_a_failed_retry_changes_nothing(journal: Journal) -> None:
    load(journal, 0, 3, DEAD)

    def dead_letters() -> Iterator[Refusal]:
        yield DEAD[0]
        raise RunError("the server is gone")

    before = journal.dead_path.read_bytes()
    with pytest.raises(RunError):
        journal.retried(0, dead_letters())
    assert journal.dead_path.read_bytes() == before
    assert counts(journal) == {0: (1, 2)}
    assert sorted(path.name for path in journal.dead_path.parent.iterdir()) == ["dead.jsonl", "journal.jsonl"]


def test_recount_fixes_the_counts_after_a_retry_was_killed(journal: Journal, monkeypatch: pytest.MonkeyPatch) -> None:
    load(journal, 0, 3, DEAD)
    with monkeypatch.context() as killed:
        killed.setattr(Journal, "recount", lambda self: None)
        journal.retried(0, iter(()))
    assert counts(journal) == {0: (1, 2)}
    journal.recount()
    assert counts(journal) == {0: (3, 0)}
    lines = journal.dead_path.with_name("journal.jsonl").read_bytes()
    journal.recount()
    assert journal.dead_path.with_name("journal.jsonl").read_bytes() == lines


@pytest.mark.parametrize("rubbish", ["rubbish", "12", "{}"])
def test_a_damaged_complete_line_is_reported(journal: Journal, rubbish: str) -> None:
    journal.begin({0})
    journal.dead_path.with_name("journal.jsonl").write_text(f'{{"shard": 0, "rows": 1}}\n{rubbish}\n')
    with pytest.raises(RunError, match="journal.jsonl:2: not a valid line of a journal"):
        journal.finished()


def test_saved_settings_stay_until_they_are_restored_and_survive_clear(journal: Journal) -> None:
    kept = {"refresh_interval": {"before": None, "loading": "-1"}}
    assert journal.settings() == {}
    journal.keep_settings({})
    assert not journal.dead_path.parent.exists()
    journal.keep_settings(kept)
    load(journal, 0, 3, DEAD)
    journal.clear()
    assert (journal.settings(), journal.finished()) == (kept, {})
    journal.keep_settings({})
    assert journal.settings() == {}
    assert list(journal.dead_path.parent.iterdir()) == []
