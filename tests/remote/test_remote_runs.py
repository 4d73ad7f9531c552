"""Runs in an object store and on the web hold the same bytes as in a local folder."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.checkpoints import make_masked_lm
from support.forked import command, start
from support.run_contents import ROWS, contents, lasting, write
from support.runs import make_run
from support.stores import FaultyStore, put_folder, stored, web_server

from sparse_ingest.encoding import shard_maker
from sparse_ingest.errors import RunError
from sparse_ingest.models.documents import DocumentEncoder
from sparse_ingest.runs.checking import checked_parts
from sparse_ingest.runs.run import open_run
from sparse_ingest.runs.shards import read_doc_ids, read_vectors
from sparse_ingest.searching.run_search import search_run
from sparse_ingest.storage.places import RemotePath

KEPT = ("manifest.json", "vocab.json", "starts.json", "complete.json", "shards/", "skipped/")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_masked_lm(tmp_path_factory.mktemp("checkpoint") / "tiny")


@pytest.fixture
def encode_arguments(model: Path, tmp_path: Path) -> list[object]:
    rows = [*ROWS, {"_id": None, "text": "no id"}, ROWS[3]]
    corpus = write(tmp_path / "corpus.jsonl", rows)
    return ["encode", "--model", model, "--corpus", corpus, "--shard-rows", 8, "--device", "cpu", "--dtype", "float32",
            "--on-bad-document", "skip"]  # fmt: skip


def kept(files: dict[str, bytes]) -> dict[str, bytes]:
    return {name: content for name, content in files.items() if name.startswith(KEPT)}


def test_a_run_in_a_store_has_the_same_bytes_as_in_a_folder(
    encode_arguments: list[object], tmp_path: Path, bucket: str
) -> None:
    assert command(*encode_arguments, "--out", tmp_path / "run").code == 3
    answer = command(*encode_arguments, "--out", f"{bucket}/a/run", "--json")
    assert answer.code == 3, answer.err
    assert json.loads(answer.out)["run"] == f"{bucket}/a/run"
    run = RemotePath.at(f"{bucket}/a/run")
    assert kept(stored(run)) == kept(contents(tmp_path / "run"))
    assert lasting(open_run(run)) == lasting(open_run(tmp_path / "run"))
    assert not [name for name in stored(run) if not name.startswith((*KEPT, "done/"))]
    shown = command("status", f"{bucket}/a/run", "--json")
    assert json.loads(shown.out)["complete"] and json.loads(shown.out)["rows"] == 20


@pytest.mark.slow
def test_a_run_in_a_store_is_resumed(encode_arguments: list[object], bucket: str) -> None:
    assert command(*encode_arguments, "--out", f"{bucket}/run").code == 3
    run = RemotePath.at(f"{bucket}/run")
    before = stored(run)
    open_run(run).unmark_done(1)
    open_run(run).unmark_complete()
    assert command(*encode_arguments, "--out", f"{bucket}/run/").code == 3
    assert kept(stored(run)) == kept(before)
    refused = command(*encode_arguments, "--out", f"{bucket}/run", "--shard-rows", 9)
    assert refused.code == 1 and "shard_rows: the run has 8, requested: 9" in refused.err


def test_an_interrupted_shard_in_a_store_continues_after_its_finished_windows(
    encode_arguments: list[object], tmp_path: Path, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shard_maker, "PART_ROWS", 2)
    assert command(*encode_arguments, "--out", tmp_path / "run").code == 3
    original, calls = DocumentEncoder.encode_tokens, []

    def counted(self, *arguments):
        calls.append(self)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(self, *arguments)

    monkeypatch.setattr(DocumentEncoder, "encode_tokens", counted)
    assert command(*encode_arguments, "--out", f"{bucket}/run").code == 130
    run = RemotePath.at(f"{bucket}/run")
    assert [name.split("/")[1] for name in stored(run) if name.endswith(".window")] == ["part-00000"] * 2
    (run / "tmp" / "part-00001" / "of a killed process.window").write_whole(b"")
    assert command(*encode_arguments, "--out", f"{bucket}/run").code == 3
    assert len(calls) == 3 + 11 - 2  # windows of all shards
    assert kept(stored(run)) == kept(contents(tmp_path / "run"))
    assert lasting(open_run(run)) == lasting(open_run(tmp_path / "run"))
    assert not [name for name in stored(run) if not name.startswith((*KEPT, "done/"))]


@pytest.mark.slow
def test_vectors_of_a_run_in_a_store_are_reused(encode_arguments: list[object], bucket: str) -> None:
    assert command(*encode_arguments, "--out", f"{bucket}/old").code == 3
    answer = command(*encode_arguments, "--out", f"{bucket}/new", "--reuse", f"{bucket}/old", "--json")
    assert json.loads(answer.out)["reused"] == 20, answer.err
    shards = [{k: v for k, v in stored(RemotePath.at(f"{bucket}/{name}")).items() if k[:6] == "shards"}
              for name in ("old", "new")]  # fmt: skip
    assert shards[0] == shards[1] and shards[0]
    same = command(*encode_arguments, "--out", f"{bucket}/old", "--reuse", f"{bucket}/old/")
    assert same.code == 2 and "is the same run as --out" in same.err


@pytest.mark.slow
def test_two_processes_fill_one_run_in_a_store(encode_arguments: list[object], tmp_path: Path, bucket: str) -> None:
    assert command(*encode_arguments, "--out", tmp_path / "run").code == 3
    logs = [tmp_path / "log-0", tmp_path / "log-1"]
    workers = [start(*encode_arguments, "--out", f"{bucket}/run", log=log) for log in logs]
    for worker in workers:
        worker.join(120)
    assert [worker.exitcode for worker in workers] == [3, 3], [log.read_text() for log in logs]
    files = stored(RemotePath.at(f"{bucket}/run"))
    assert kept(files) == kept(contents(tmp_path / "run"))
    assert not [name for name in files if name.startswith("locks/")]


@pytest.mark.parametrize("place", ["s3", "memory"])
def test_a_place_that_is_no_run_is_not_changed(encode_arguments: list[object], bucket: str, place: str) -> None:
    folder = RemotePath.at(f"{bucket}/other" if place == "s3" else f"memory://{time.monotonic_ns()}")
    (folder / "notes.txt").write_whole(b"mine")
    answer = command(*encode_arguments, "--out", folder)
    assert answer.code == 1 and "is not empty and is not a run (found notes.txt)" in answer.err
    assert stored(folder) == {"notes.txt": b"mine"}


@pytest.mark.slow
def test_a_run_in_another_file_system_of_fsspec(encode_arguments: list[object], tmp_path: Path) -> None:
    """`memory://` stands for file systems that tests cannot reach, such as gs://."""
    assert command(*encode_arguments, "--out", tmp_path / "run").code == 3
    place = RemotePath.at(f"memory://{time.monotonic_ns()}/run")
    assert command(*encode_arguments, "--out", place).code == 3
    assert kept(stored(place)) == kept(contents(tmp_path / "run"))


def test_a_damaged_shard_in_a_store_is_refused(tmp_path: Path, bucket: str) -> None:
    make_run(tmp_path / "run")
    place = RemotePath.at(f"{bucket}/run")
    put_folder(tmp_path / "run", place)
    run = open_run(place)
    assert sum(len(part.fields) for part in checked_parts(run, run.done_shards())) == 5
    content = bytearray(run.shard_path(0).read_bytes())
    content[60] ^= 1
    run.shard_path(0).write_whole(bytes(content))
    with pytest.raises(RunError, match="The shard is damaged"):
        list(checked_parts(run, [0]))


def test_only_the_requested_columns_of_a_shard_in_a_store_are_fetched(
    tmp_path: Path, bucket: str, faulty: FaultyStore
) -> None:
    documents = {f"d{number}": {"river": 1.0 + number} for number in range(100)}
    fields = {doc_id: {"text": os.urandom(10_000).hex()} for doc_id in documents}
    make_run(tmp_path / "run", documents, shard_rows=100, fields=fields)
    place = RemotePath.at(f"{bucket}/shard.parquet")
    content = (tmp_path / "run" / "shards" / "part-00000.parquet").read_bytes()
    place.write_whole(content)
    assert [doc_id for _, doc_id in read_doc_ids(place)] == list(documents)
    assert read_vectors(place, 0).doc_ids == list(documents)
    # The footer, the last 64 KB, is read twice.
    assert faulty.sent_of("GET") < 200_000 < len(content)


def test_a_missing_bucket_gives_one_message(encode_arguments: list[object], bucket: str) -> None:
    answer = command(*encode_arguments, "--out", f"{bucket}-none/run")
    assert answer.code == 1
    assert "cannot be written: its bucket or folder does not exist" in answer.err


# The web


@pytest.fixture
def web(tmp_path: Path) -> Iterator[str]:
    make_run(tmp_path / "served" / "run")
    with web_server(tmp_path / "served", token="sig=hidden") as url:
        yield f"{url}/run?sig=hidden"


def test_a_run_on_the_web_is_searched_and_shown(web: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPARSE_INGEST_HOME", str(tmp_path / "home"))
    shown = command("status", web, "--json")
    assert shown.code == 0, shown.err
    assert json.loads(shown.out)["rows"] == 5
    assert "hidden" not in shown.out + shown.err
    run, here = open_run(RemotePath.at(web)), open_run(tmp_path / "served" / "run")
    assert search_run(run, {"river": 1.0}, size=3) == search_run(here, {"river": 1.0}, size=3) != []
    assert [part.fields for part in checked_parts(run, run.done_shards())] == [
        part.fields for part in checked_parts(here, here.done_shards())
    ]


def test_a_run_on_the_web_cannot_be_written(web: str, encode_arguments: list[object]) -> None:
    answer = command(*encode_arguments, "--out", web)
    assert answer.code == 1 and "is a web address, which is read-only" in answer.err
    assert "hidden" not in answer.err


def test_an_unfinished_run_on_the_web_gives_one_message(tmp_path: Path) -> None:
    make_run(tmp_path / "run", complete=False)
    with web_server(tmp_path) as url:
        answer = command("status", f"{url}/run")
    assert answer.code == 1 and "a web server does not list its shards" in answer.err


def test_a_web_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    with web_server(tmp_path) as url:
        answer = command("status", f"{url}/run")
    assert answer.code == 1 and "is not a run" in answer.err
