"""Runs from untrusted sources: mixed files, impossible values, links and named pipes."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.forked import command
from support.runs import VOCABULARY, make_run, without_hashes

from sparse_ingest.cluster.connection import Connection
from sparse_ingest.cluster.journal import open_journal
from sparse_ingest.errors import RunError, SparseIngestError
from sparse_ingest.evaluation.evaluate import evaluate
from sparse_ingest.loading.load import load
from sparse_ingest.planning.plan import plan
from sparse_ingest.records import Query, Refusal
from sparse_ingest.runs.changes import Changes
from sparse_ingest.runs.checking import checked_parts
from sparse_ingest.runs.files import SkippedRow
from sparse_ingest.runs.manifest import run_id
from sparse_ingest.runs.reuse import OldVectors
from sparse_ingest.runs.run import Run, open_run
from sparse_ingest.searching.search import SearchableRun
from sparse_ingest.searching.search import open_run as searchable
from sparse_ingest.verification.verify import verify

DEEP = "[" * 200_000 + "]" * 200_000


def search_run(folder: Path) -> None:
    searchable(folder).search({"river": 1.0})


def read_by_parts(folder: Path) -> None:
    run = open_run(folder)
    list(checked_parts(run, run.done_shards()))


def compare_run(folder: Path) -> None:
    Changes(open_run(folder), open_run(folder), folder.parent)


def reuse_run(folder: Path) -> None:
    OldVectors(open_run(folder), folder.parent).find([b"x" * 16])


READERS = [search_run, compare_run, reuse_run]


# vocab.json


def reverse(vocabulary: list[Any]) -> object:
    return vocabulary[::-1]


def shorten(vocabulary: list[Any]) -> object:
    return vocabulary[:-3]


def as_object(vocabulary: list[Any]) -> object:
    return {str(token): number for number, token in enumerate(vocabulary)}


def swap_two(vocabulary: list[Any]) -> object:
    return [vocabulary[1], vocabulary[0], *vocabulary[2:]]


@pytest.mark.parametrize("change", [reverse, shorten, as_object, swap_two])
@pytest.mark.parametrize("reader", READERS)
def test_another_vocabulary_is_refused_by_every_reader(
    tmp_path: Path, change: Callable[[list[Any]], object], reader: Callable[[Path], None]
) -> None:
    run = make_run(tmp_path / "run")
    (run.path / "vocab.json").write_text(json.dumps(change(run.vocabulary())))
    with pytest.raises(RunError, match=r"vocab.json cannot be read: it has SHA-256 \w+, manifest.json has \w+"):
        reader(run.path)


def test_load_and_verify_refuse_another_vocabulary(opensearch_url: str, index_name: str, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    load(run, index=index_name, url=opensearch_url)
    (run.path / "vocab.json").write_text(json.dumps(run.vocabulary()[::-1]))
    for task in (load, verify):
        with pytest.raises(RunError, match="vocab.json cannot be read: it has SHA-256"):
            task(run.path, index=index_name, url=opensearch_url)


def test_a_run_of_an_earlier_release_is_read_with_one_note(
    opensearch_url: str, index_name: str, tmp_path: Path
) -> None:
    run = make_run(tmp_path / "run")
    without_hashes(run)
    for _ in range(2):
        answer = command("load", run.path, "--index", index_name, "--url", opensearch_url)
        assert answer.code == 0
        assert answer.err.count("without a hash of vocab.json: changes are not detected") == 1
    answer = command("verify", run.path, "--index", index_name, "--url", opensearch_url)
    assert answer.code == 0 and answer.err.count("without a hash of vocab.json") == 1
    search_run(run.path)


# Shards of another run


def other_run(folder: Path) -> Run:
    """Write a run of the same size, each shard of which belongs to another corpus."""
    words = ["river", "stone", "cloud", "lamp", "weight"]
    return make_run(folder, {f"other{place}": {word: 1.0} for place, word in enumerate(words)})


def copy_shard(run: Run, other: Run, shard: int) -> None:
    for name in (f"shards/part-{shard:05d}.parquet", f"done/part-{shard:05d}.json"):
        shutil.copy(other.path / name, run.path / name)


@pytest.mark.parametrize("reader", [*READERS, read_by_parts])
def test_a_shard_with_its_record_from_another_run_is_refused(tmp_path: Path, reader: Callable[[Path], None]) -> None:
    run, other = make_run(tmp_path / "run"), other_run(tmp_path / "other")
    copy_shard(run, other, 1)
    with pytest.raises(RunError, match=f"part-00001.json belongs to run {other.manifest.run_id[:18]}, expected run"):
        reader(run.path)
    assert command("status", run.path).code == 1
    without_hashes(other)
    copy_shard(run, other, 1)
    with pytest.raises(RunError, match="part-00001.json belongs to run an earlier release, expected run"):
        reader(run.path)


@pytest.mark.parametrize("reader", READERS)
def test_a_shard_of_a_run_with_the_same_id_is_refused(tmp_path: Path, reader: Callable[[Path], None]) -> None:
    """The identity covers names and sizes of corpus files, so other content may have the same id."""
    run, other = make_run(tmp_path / "run"), other_run(tmp_path / "other")
    (other.path / "manifest.json").write_bytes((run.path / "manifest.json").read_bytes())
    record = other.path / "done" / "part-00001.json"
    record.write_text(json.dumps({**json.loads(record.read_text()), "run_id": run.manifest.run_id}))
    for path in (run.path, other.path):
        complete = json.loads((path / "complete.json").read_text())
        del complete["terms"]
        (path / "complete.json").write_text(json.dumps(complete))
    copy_shard(run, other, 1)
    with pytest.raises(RunError, match="has mixed files: shards_sha256 is"):
        reader(run.path)


@pytest.mark.parametrize("reader", READERS)
def test_shards_of_earlier_releases_are_compared_by_their_totals(
    tmp_path: Path, reader: Callable[[Path], None]
) -> None:
    run, other = make_run(tmp_path / "run"), other_run(tmp_path / "other")
    for each in (run, other):
        without_hashes(each)
    copy_shard(run, other, 1)
    with pytest.raises(RunError, match=r"has mixed files: terms is \d+ in complete.json, and \d+ by the records"):
        reader(run.path)


def test_a_manifest_whose_identity_was_changed_is_refused(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    path = run.path / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["identity"]["model"] = "another"
    path.write_text(json.dumps(manifest))
    with pytest.raises(RunError, match="is not the manifest of a run: run_id is not the hash of the identity"):
        open_run(run.path)


# Shards


@pytest.mark.parametrize("reader", [*READERS, read_by_parts])
def test_a_flipped_bit_is_detected_by_every_reader(tmp_path: Path, reader: Callable[[Path], None]) -> None:
    run = make_run(tmp_path / "run")
    reader(run.path)
    path = run.shard_path(1)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 16
    path.write_bytes(content)
    with pytest.raises(RunError, match="part-00001.parquet has SHA-256"):
        reader(run.path)


def test_plan_and_evaluate_detect_a_flipped_bit(tmp_path: Path) -> None:
    run = Path(shutil.copytree(Path(__file__).parent / "frozen_run", tmp_path / "run"))
    path = run / "shards" / "part-00001.parquet"
    content = bytearray(path.read_bytes())
    content[100] ^= 1
    path.write_bytes(content)
    queries = [Query(str(place), "bread stone bridge owl glass") for place in range(20)]
    with pytest.raises(RunError, match="part-00001.parquet has SHA-256"):
        plan(run, queries=queries)
    (tmp_path / "queries.jsonl").write_text('{"_id": "1", "text": "bread"}\n')
    (tmp_path / "qrels.tsv").write_text("query-id\tcorpus-id\tscore\n1\tbread\t1\n")
    with pytest.raises(RunError, match="part-00001.parquet has SHA-256"):
        evaluate(searchable(run), queries=tmp_path / "queries.jsonl", qrels=tmp_path / "qrels.tsv")


def ragged(offsets: list[int], values: Any) -> Any:
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), values)


def replace_columns(run: Run, **columns: Any) -> Run:
    """Replace columns in the only shard of a run, and update its hashes."""
    path = run.shard_path(0)
    table = pq.read_table(path)
    for name, column in columns.items():
        table = table.set_column(table.column_names.index(name), name, column)
    pq.write_table(table, path)
    import hashlib

    run.mark_done(0, {**(run.done(0) or {}), "sha256": hashlib.sha256(path.read_bytes()).hexdigest()})
    run.mark_complete(run.complete() or {})
    return run


IDS = pa.array([35, 36, 37, 38], pa.uint16())
WEIGHTS = pa.array(np.array([1.0, 0.5, 2.0, 0.25], np.float16))
BAD_COLUMNS: list[tuple[dict[str, Any], str]] = [
    ({"weights": ragged([0, 1, 4], WEIGHTS)}, r"row 0 \(id 'a'\) has 2 token ids and 1 weights"),
    ({"token_ids": ragged([0, 2, 4], pa.array([35, 36, 37, 999], pa.uint16()))},
     rf"row 1 \(id 'b'\) has a token id outside the vocabulary, which has {len(VOCABULARY)}: 999"),
    ({"token_ids": ragged([0, 2, 4], pa.array([35, 36, 38, 37], pa.uint16()))},
     r"row 1 \(id 'b'\) has token ids that do not ascend: 37"),
    ({"token_ids": ragged([0, 2, 4], pa.array([36, 36, 37, 38], pa.uint16()))}, r"row 0 \(id 'a'\) has token ids that"),
    ({"token_ids": ragged([0, 2, 4], pa.array([35, 36, -1, 38], pa.int32()))}, "column token_ids is list of int32"),
    ({"doc_id": pa.array([1, 2])}, "column doc_id is int64, expected string"),
    ({"doc_id": pa.array(["a", None])}, "column doc_id has nulls"),
    ({"doc_id": pa.array([b"a", b"\xff"]).view(pa.string())}, "can't decode byte 0xff"),
    ({"fields": pa.array(["{}", None])}, "column fields has nulls"),
    *(({"weights": ragged([0, 2, 4], pa.array(np.array([1.0, 0.5, weight, 1.0], np.float16)))},
       r"row 1 \(id 'b'\) has a weight that is negative or not finite: " + str(weight))
      for weight in (np.inf, np.nan, -1.0)),
]  # fmt: skip


@pytest.mark.parametrize(("columns", "message"), BAD_COLUMNS)
def test_impossible_values_are_refused_with_row_and_id(tmp_path: Path, columns: dict[str, Any], message: str) -> None:
    run = make_run(tmp_path / "run", {"a": {"t35": 1.0, "t36": 1.0}, "b": {"t37": 1.0, "t38": 1.0}},
                   vocabulary=[f"t{place}" for place in range(len(VOCABULARY))])  # fmt: skip
    replace_columns(run, **{"token_ids": ragged([0, 2, 4], IDS), "weights": ragged([0, 2, 4], WEIGHTS), **columns})
    for reader in (search_run, read_by_parts) if "fields" in columns else (search_run, read_by_parts, compare_run):
        if "fields" in columns and reader is search_run:
            reader = compare_run
        with pytest.raises(RunError, match=f"part-00000.parquet cannot be read as a shard: .*{message}"):
            reader(run.path)


def test_fields_that_are_not_a_json_object_are_reported(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", {"a": {"river": 1.0}})
    for fields in ("", "[]", "null", '{"text": ', DEEP):
        replace_columns(run, fields=pa.array([fields]))
        with pytest.raises(RunError, match="The fields of document 'a' are not a JSON object"):
            search_run(run.path)


# Out of memory and other system errors are not damage


def test_out_of_memory_is_not_reported_as_damage(tmp_path: Path) -> None:
    ids = [f"d{place}" for place in range(8000)]
    fields = {doc_id: {"text": f"{doc_id} " * 500} for doc_id in ids}
    run = make_run(tmp_path / "run", {doc_id: {"river": 1.0} for doc_id in ids}, fields=fields, shard_rows=8000)
    script = (
        "import resource, sys; from sparse_ingest.runs.checking import checked_parts\n"
        "from sparse_ingest.runs.run import open_run; from sparse_ingest.errors import RunError\n"
        "from sparse_ingest.runs import shards\n"
        "import pathlib; now = int(pathlib.Path('/proc/self/statm').read_text().split()[0]) * 4096\n"
        "resource.setrlimit(resource.RLIMIT_AS, (now + int(sys.argv[2]), -1))\n"
        "try: kept = list(checked_parts(open_run(sys.argv[1]), [0]))\n"
        "except (RunError, MemoryError) as error: print(type(error).__name__, error)\n"
    )
    for more in (1 << 19, 1 << 23):
        done = subprocess.run([sys.executable, "-c", script, run.path, str(more)], capture_output=True, text=True)
        assert "Traceback" not in done.stderr, done.stderr
        assert "out of memory" in done.stdout or done.stdout.startswith("MemoryError"), done.stdout
        assert "done/" not in done.stdout and "encode" not in done.stdout


def test_a_disk_error_is_not_reported_as_damage(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    reader = checked_parts(open_run(run.path), [0])
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
    try:
        with pytest.raises(SparseIngestError) as caught:
            next(reader)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert "Too many open files" in str(caught.value) and "encode" not in str(caught.value)


# Links and named pipes


@pytest.mark.parametrize(
    "name", ["manifest.json", "vocab.json", "complete.json", "done/part-00000.json", "shards/part-00000.parquet"]
)
def test_a_named_pipe_in_a_run_is_refused_without_opening_it(tmp_path: Path, name: str) -> None:
    run = make_run(tmp_path / "run")
    (run.path / name).unlink()
    os.mkfifo(run.path / name)
    with pytest.raises(RunError, match=f"{name} cannot be read.*: it is not a regular file"):
        search_run(run.path)


def test_a_lock_that_is_a_link_or_a_pipe_is_refused(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    victim = tmp_path / "victim"
    victim.write_text("precious")
    lock = run.path / "locks" / "x.lock"
    with run.lock("x") as held:
        assert held
    for make in (lambda: lock.symlink_to(victim), lambda: os.mkfifo(lock)):
        lock.unlink()
        make()
        with pytest.raises(RunError, match="x.lock is a link or not a regular file"), run.lock("x"):
            pass
    assert victim.read_text() == "precious"


def test_a_symbolic_link_as_temporary_file_or_journal_keeps_its_target_unchanged(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", {"a": {"river": 1.0}, "b": {"river": 1.0}})
    victim = tmp_path / "victim"
    victim.write_text("precious")
    run.scratch_path("part-00000.parquet").symlink_to(victim)
    from sparse_ingest.runs.ids import remove_rows

    remove_rows(run, 0, {1: SkippedRow(1, "f", 2, "r")})
    run.mark_complete({**(run.complete() or {}), "rows": 1, "terms": 1})
    assert run.rows_of(0) == 1
    journal = open_journal(run, "CLUSTER", "INDEX")
    journal.begin([0])
    for name, write in (
        ("journal.jsonl", lambda: journal.finish(0, {"rows": 1})),
        ("dead.jsonl", lambda: journal.record_dead([Refusal("a", 0, 0, 400, "r")])),
    ):
        path = journal.dead_path.with_name(name)
        path.symlink_to(victim)
        with pytest.raises(OSError, match="symbolic links"):
            write()
        path.unlink()
    assert victim.read_text() == "precious"


def test_a_run_or_its_shards_may_be_symbolic_links_to_folders(
    tmp_path: Path, opensearch_url: str, index_name: str
) -> None:
    run = make_run(tmp_path / "elsewhere" / "run")
    shutil.move(run.path / "shards", tmp_path / "shards")
    (run.path / "shards").symlink_to(tmp_path / "shards")
    shard = tmp_path / "shards" / "part-00000.parquet"
    shutil.move(shard, tmp_path / "kept.parquet")
    shard.symlink_to(tmp_path / "kept.parquet")
    (tmp_path / "link").symlink_to(run.path)
    assert load(tmp_path / "link", index=index_name, url=opensearch_url).acknowledged == 5
    search_run(tmp_path / "link")


# Every key of every file, replaced or removed

VALUES: list[object] = [None, "x", -1, 2**70, True, [], {}, [1], {"a": 1}]


def mutations(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, each in list(inner)[:12]:
        yield (*at, key)
        yield from mutations(each, (*at, key))


def changed(value: Any, at: tuple[Any, ...], new: object) -> str:
    copy = json.loads(json.dumps(value))
    place = copy
    for key in at[:-1]:
        place = place[key]
    if new is ...:
        del place[at[-1]]
    else:
        place[at[-1]] = "DEEP" if new is DEEP else new
    return json.dumps(copy).replace('"DEEP"', DEEP)


def variants(text: str) -> Iterator[str]:
    value = json.loads(text)
    yield from ("", "{", "\0", "[1,]", DEEP, *map(json.dumps, VALUES))
    for at in mutations(value):
        for new in (*VALUES, ..., DEEP):
            yield changed(value, at, new)


@pytest.fixture(scope="module")
def loaded(opensearch_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[SearchableRun]:
    from sparse_ingest.cluster.client import connect

    run = make_run(tmp_path_factory.mktemp("loaded") / "run")
    run.write_skipped(1, [SkippedRow(3, "f", 3, "r")])
    load(run, index="sparse-ingest-test-foreign", url=opensearch_url)
    yield searchable(run.path)
    client = connect(Connection(opensearch_url))
    client.call("DELETE", "/sparse-ingest-test-foreign")
    client.close()


# Each key has 11 variants; a step of 4 tries other ones of them for each key.
@pytest.mark.parametrize("step", [4, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "name",
    ["manifest.json", "vocab.json", "complete.json", "done/part-00000.json", "skipped/part-00001.jsonl",
     "journal.jsonl", "dead.jsonl", "merged.json"],
)  # fmt: skip
def test_no_value_in_a_file_of_a_run_causes_a_traceback(loaded: Run, name: str, step: int, opensearch_url: str) -> None:
    journal = Path(str(next((loaded.path / "load").glob("*/*/"))))
    letter = {"id": "empty", "shard": 0, "row": 1, "status": 400, "reason": "r"}
    contents = {"dead.jsonl": json.dumps(letter), "merged.json": '{"0": 5}'}
    path = loaded.path / name if "/" in name or name not in (*contents, "journal.jsonl") else journal / name
    before = path.read_bytes() if path.exists() else None
    text = contents.get(name) or (before or b"").decode().split("\n")[0 if name.endswith("l") else slice(None)]
    text = "\n".join(text) if isinstance(text, list) else text
    many = list(variants(text))[::step]

    def status() -> None:
        answer = command("status", loaded.path)
        if answer.code:
            raise SparseIngestError(answer.err)

    def skipped() -> None:
        open_run(loaded.path).skipped(1)

    tasks = [status, skipped, *(lambda reader=reader: reader(loaded.path) for reader in READERS)]
    refused = 0
    try:
        for number, content in enumerate(many):
            path.write_text(content + "\n")
            for task in [*tasks, *([lambda: load_and_verify(loaded.path, opensearch_url)] if number % 12 == 0 else [])]:
                try:
                    task()
                except SparseIngestError as error:
                    assert any(each in str(error) for each in (path.name, str(journal.parent), "done/")), (
                        content[:100],
                        str(error),
                    )
                    refused += 1
    finally:
        path.unlink() if before is None else path.write_bytes(before)
    assert refused or name == "merged.json"  # harmless: it only costs one more merge


def load_and_verify(folder: Path, url: str) -> None:
    load(folder, index="sparse-ingest-test-foreign", url=url)
    verify(folder, index="sparse-ingest-test-foreign", url=url)


def test_settings_of_the_wrong_type_are_refused_even_if_the_id_matches(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    path = run.path / "manifest.json"
    before = json.loads(path.read_text())
    for changes in ({"identity": {"top_k": "abc"}}, {"identity": {"overflow": 3}}, {"model": {"max_length": "abc"}},
                    {"model": {"query_side": [1]}}, {"model": {"sha256": 5}}, {"shard_rows": 0}):  # fmt: skip
        manifest = json.loads(json.dumps(before))
        for key, value in changes.items():
            manifest[key] = {**manifest[key], **value} if isinstance(value, dict) else value
        manifest["run_id"] = run_id(manifest["identity"])
        path.write_text(json.dumps(manifest))
        with pytest.raises(RunError, match="manifest.json is not the manifest of a run: "):
            open_run(run.path)


@pytest.mark.parametrize("name", ["part-abc.json", "part-5.json", "part-00000 (copy).json", "part-².json"])
def test_a_stray_file_among_the_records_is_reported(tmp_path: Path, name: str) -> None:
    run = make_run(tmp_path / "run")
    (run.path / "done" / name).write_text("{}")
    answer = command("status", run.path)
    assert answer.code == 1 and "is not named like a shard" in answer.err and name in answer.err
