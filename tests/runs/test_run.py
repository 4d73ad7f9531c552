"""The run folder: atomic files, one manifest, locks that end with their process, and identities."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from sparse_ingest.errors import RunError
from sparse_ingest.runs.files import SkippedRow, write_json
from sparse_ingest.runs.manifest import FORMAT, Manifest, identity_of
from sparse_ingest.runs.run import create_or_open_run, open_run
from sparse_ingest.storage.durable import write_atomic

VOCABULARY = ["[PAD]", None, "##ing", "Ġthe", "▁de", "\u2028"]


def manifest_of(**identity: object) -> Manifest:
    number, content = identity_of({"weights": "float16", "shard_rows": 8, **identity})
    return Manifest(FORMAT, number, content, 8, {"document": "m"}, {})


# Files


def test_a_file_is_written_completely_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_atomic(path, b"first")
    write_atomic(path, b"second")
    assert path.read_bytes() == b"second" and path.stat().st_mode & 0o777 == 0o644
    with pytest.raises(TypeError):
        write_atomic(path, "no bytes")  # type: ignore[arg-type]
    assert path.read_bytes() == b"second"
    assert list(tmp_path.iterdir()) == [path]


def test_an_exclusive_write_keeps_an_existing_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_atomic(path, b"first", exclusive=True)
    write_atomic(path, b"second", exclusive=True)
    assert path.read_bytes() == b"first"
    assert list(tmp_path.iterdir()) == [path]


def test_one_of_many_exclusive_writers_wins_with_a_complete_file(tmp_path: Path) -> None:
    script = (
        "import sys; from pathlib import Path; from sparse_ingest.storage.durable import write_atomic\n"
        "sys.stdin.readline(); write_atomic(Path('file'), sys.argv[1].encode() * 100000, exclusive=True)"
    )
    writers = [
        subprocess.Popen([sys.executable, "-c", script, letter], stdin=subprocess.PIPE, cwd=tmp_path)
        for letter in "abc"
    ]
    for writer in writers:
        writer.communicate(b"\n", timeout=60)
    assert [writer.returncode for writer in writers] == [0, 0, 0]
    content = (tmp_path / "file").read_text()
    assert len(content) == 100_000 and len(set(content)) == 1
    assert len(list(tmp_path.iterdir())) == 1


# Manifest


def test_a_run_is_created_and_opened_again(tmp_path: Path) -> None:
    manifest = manifest_of()
    run = create_or_open_run(tmp_path / "deep" / "run", manifest, VOCABULARY)
    again = open_run(run.path)
    assert again.manifest == manifest and again.vocabulary() == VOCABULARY
    assert again.done_shards() == [] and again.complete() is None and again.done(0) is None
    before = {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()}
    create_or_open_run(run.path, manifest, ["another"])
    assert {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()} == before


def test_a_run_killed_after_writing_its_manifest_gets_its_vocabulary(tmp_path: Path) -> None:
    write_json(tmp_path / "manifest.json", asdict(manifest_of()))
    assert not open_run(tmp_path).has_vocabulary()
    assert create_or_open_run(tmp_path, manifest_of(), VOCABULARY).vocabulary() == VOCABULARY


def test_the_partial_manifest_of_a_dead_process_is_accepted(tmp_path: Path) -> None:
    (tmp_path / ".new-1234").write_text("{")
    assert create_or_open_run(tmp_path, manifest_of(), VOCABULARY).path == tmp_path


def test_a_folder_with_other_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("words")
    with pytest.raises(RunError, match=r"not empty and is not a run \(found thesis.tex\)"):
        create_or_open_run(tmp_path, manifest_of(), VOCABULARY)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "is not a run"),
        ("{", "cannot be read"),
        ("[]", "is not the manifest of a run"),
        ('{"format": 1}', "is not the manifest of a run"),
        (json.dumps({**asdict(manifest_of()), "format": 2}), "has run format 2; this release reads format 1"),
    ],
)
def test_a_folder_without_a_valid_manifest_is_reported(tmp_path: Path, content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(RunError, match=message):
        open_run(tmp_path)
    with pytest.raises(RunError, match="is not a run: there is no such folder. Check the name"):
        open_run(tmp_path / "typo")


def test_keys_of_a_later_release_are_ignored(tmp_path: Path) -> None:
    write_json(tmp_path / "manifest.json", {**asdict(manifest_of()), "later": 1})
    assert open_run(tmp_path).manifest == manifest_of()


# Identity


def test_every_difference_is_reported_with_both_values(tmp_path: Path) -> None:
    create_or_open_run(tmp_path, manifest_of(model={"sha256": "a", "max_length": 8}, limit=None), VOCABULARY)
    other = manifest_of(model={"sha256": "b", "max_length": 8}, weights="float32", added=[1], limit=5)
    with pytest.raises(RunError) as caught:
        create_or_open_run(tmp_path, other, VOCABULARY)
    lines = str(caught.value).splitlines()
    assert lines[1:5] == [
        "  added: the run has none, requested: [1]",
        "  limit: the run has none, requested: 5",
        "  model.sha256: the run has 'a', requested: 'b'",
        "  weights: the run has 'float16', requested: 'float32'",
    ]
    assert "model.max_length" not in str(caught.value)


# Markers and skipped rows


def test_shards_are_marked_and_unmarked(tmp_path: Path) -> None:
    run = create_or_open_run(tmp_path, manifest_of(), VOCABULARY)
    for shard in (10, 2, 123456):
        run.shard_path(shard).touch()
        run.mark_done(shard, {"rows": shard})
    assert run.done_shards() == [2, 10, 123456] and run.done(10) == {"rows": 10, "run_id": run.manifest.run_id}
    run.unmark_done(10)
    run.unmark_done(10)
    assert run.done_shards() == [2, 123456]
    run.shard_path(2).unlink()
    assert run.done(2) is None
    run.mark_complete({"shards": 2, "rows": 9})
    assert (run.complete() or {})["rows"] == 9
    run.unmark_complete()
    assert run.complete() is None


def test_skipped_rows_are_read_back_with_any_content(tmp_path: Path) -> None:
    run = create_or_open_run(tmp_path, manifest_of(), VOCABULARY)
    rows = [SkippedRow(3, "a\u2028b.jsonl", 4, 'two\nlines\r and "quotes" \\ \x85'), SkippedRow(9, "", 1, "日本")]
    run.write_skipped(0, rows)
    assert run.skipped(0) == rows and run.skipped(1) == []
    assert len(run.skipped_path(0).read_bytes().splitlines()) == 2
    run.write_skipped(0, [])
    assert not run.skipped_path(0).exists()


# Locks

HOLD = (
    "import sys, time; from pathlib import Path; from sparse_ingest.runs.run import open_run\n"
    "with open_run(Path(sys.argv[1])).lock('part-00000') as held:\n"
    "    print(held, flush=True); time.sleep(60)"
)


def test_a_lock_has_one_owner_and_is_released_when_the_process_dies(tmp_path: Path) -> None:
    run = create_or_open_run(tmp_path, manifest_of(), VOCABULARY)
    with run.lock("part-00000") as held, open_run(tmp_path).lock("part-00000") as again:
        assert held and not again
    holder = subprocess.Popen([sys.executable, "-c", HOLD, tmp_path], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None and holder.stdout.readline() == "True\n"
        with run.lock("part-00000") as held, run.lock("part-00001") as other:
            assert not held and other
    finally:
        os.kill(holder.pid, signal.SIGKILL)
        holder.communicate(timeout=60)
    with run.lock("part-00000") as held:
        assert held


def test_a_lock_is_released_after_an_error(tmp_path: Path) -> None:
    run = create_or_open_run(tmp_path, replace(manifest_of()), VOCABULARY)
    with pytest.raises(KeyError), run.lock("one"):
        raise KeyError
    with run.lock("one") as held:
        assert held
