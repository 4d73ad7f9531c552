"""The stages of `encode` overlap, change no byte, report the slowest one, and end together on any error."""

from __future__ import annotations

import io
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pyarrow.parquet as pq
import pytest
from support.checkpoints import make_masked_lm
from support.deadlines import HANGING_S, until
from support.forked import Answer, command, start
from support.run_contents import contents, lasting, write

from sparse_ingest.cli import progress
from sparse_ingest.encoding import shard_maker as parts
from sparse_ingest.encoding.stages import Ahead, Stages
from sparse_ingest.models.documents import DocumentEncoder
from sparse_ingest.models.memory import BudgetLowered
from sparse_ingest.models.vectors import NotFinite, VectorMaker
from sparse_ingest.runs.run import open_run

ROWS = [{"_id": f"d{place}", "text": f"the river stone {place % 9} " * (place % 7)} for place in range(60)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_masked_lm(tmp_path_factory.mktemp("stages") / "tiny")


@pytest.fixture
def encode(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Answer]]:
    """Yield a function that encodes rows in windows of 4 rows, then assert that no thread is left."""
    monkeypatch.setattr(parts, "PART_ROWS", 4)
    before = {thread.name for thread in threading.enumerate()} | {"tqdm_monitor"}

    def run(out: str, *options: object, rows: list = ROWS) -> Answer:
        corpus = write(tmp_path / "corpus.jsonl", rows)
        return command("encode", "--model", model, "--corpus", corpus, "--out", tmp_path / out, "--shard-rows", 40,
                       "--device", "cpu", "--dtype", "float32", "--max-length", 20, *options)  # fmt: skip

    yield run
    assert {thread.name for thread in threading.enumerate()} <= before


# One stage


def test_exactly_one_item_is_produced_ahead() -> None:
    produced: list[int] = []
    ahead = Ahead(produced.append(number) or number for number in range(6))

    def are_there(count: int) -> bool:
        return len(produced) >= count

    for number in ahead:
        ahead_of = min(number + 2, 6)
        until(partial(are_there, ahead_of))
        time.sleep(0.005)
        assert len(produced) == ahead_of
    ahead.close()


def test_an_error_is_raised_after_the_items_before_it() -> None:
    def items() -> Iterator[int]:
        yield from range(3)
        raise ValueError("four")

    seen = []
    with pytest.raises(ValueError, match="four"):
        for item in Ahead(items()):
            seen.append(item)
    assert seen == [0, 1, 2]


def test_an_abandoned_stage_ends_its_thread() -> None:
    before = threading.active_count()
    for used in range(3):
        ahead = Ahead(iter(range(10)))
        for item in ahead:
            if item == used:
                break
        ahead.close()
        assert threading.active_count() == before
    Ahead(iter(range(10))).close()


def test_a_stage_is_not_busy_while_it_waits_for_another() -> None:
    stages = Stages()

    def slow_items() -> Iterator[int]:
        for number in range(3):
            time.sleep(0.02)
            yield number

    with stages.busy("wall"), stages.busy("write"):
        for _ in stages.waiting("write", stages.making("read", slow_items())):
            time.sleep(0.002)
    seconds = stages.seconds()
    assert seconds["read"] >= 0.06 and seconds["write"] >= 0.006
    # Here both stages are in one thread, so they are never busy at the same time.
    assert seconds["read"] + seconds["write"] <= seconds["wall"] + 1e-6
    assert seconds["tokenise"] == seconds["encode"] == 0.0
    assert stages.slowest().startswith(f"slowest: {max(('read', 'write'), key=lambda stage: seconds[stage])} (")
    assert set(stages.since(seconds).values()) == {0.0}


# The same bytes


class Sequential:
    """`Ahead` without a thread."""

    def __init__(self, items: Iterable) -> None:
        self.items = items

    def __iter__(self) -> Iterator:
        return iter(self.items)

    def close(self) -> None:
        pass


@pytest.mark.parametrize(
    "options",
    [
        pytest.param((), id="truncate", marks=pytest.mark.slow),
        pytest.param(("--set", "encode.overflow=windows", "--set", "encode.top_k=9"), id="windows"),
        pytest.param(("--set", "encode.overflow=passages"), id="passages", marks=pytest.mark.slow),
        pytest.param(("--dedup-text", "encode-once"), id="dedup", marks=pytest.mark.slow),
        pytest.param(("--reuse", "old"), id="reuse"),
    ],
)  # fmt: skip
def test_overlapping_stages_give_the_same_bytes(options: tuple, encode, tmp_path: Path, monkeypatch) -> None:
    rows = [*ROWS[:17], "{broken", *ROWS[17:], {"_id": "d3", "text": "again"}, {"_id": "d50", "text": "again"}]
    if "--reuse" in options:
        assert encode("old", rows=ROWS[::3]).code == 0
        options = ("--reuse", tmp_path / "old")
    assert encode("overlapping", "--on-bad-document", "skip", *options, rows=rows).code == 3
    monkeypatch.setattr(parts, "Ahead", Sequential)
    assert encode("in-turn", "--on-bad-document", "skip", *options, rows=rows).code == 3
    overlapping, in_turn = open_run(tmp_path / "overlapping"), open_run(tmp_path / "in-turn")
    for folder in ("shards", "skipped"):
        assert contents(overlapping.path / folder) == contents(in_turn.path / folder)
    assert lasting(overlapping) == lasting(in_turn)
    assert overlapping.complete() == in_turn.complete()


def test_reading_ahead_is_limited(encode, monkeypatch) -> None:
    """While a row group is written, at most three windows have been read after it."""
    read, written, most = 0, 0, 0
    true_read, true_write = parts.ShardMaker._read, pq.ParquetWriter.write_batch

    def counted(self, *arguments):
        nonlocal read
        for window in true_read(self, *arguments):
            read += 1
            yield window

    def write_batch(self, *arguments, **named):
        nonlocal written, most
        written += 1
        if written == 5:
            until(lambda: read >= 8)
        time.sleep(0.005)  # it might read too far now
        most = max(most, read - written)
        return true_write(self, *arguments, **named)

    monkeypatch.setattr(parts.ShardMaker, "_read", counted)
    monkeypatch.setattr(pq.ParquetWriter, "write_batch", write_batch)
    assert encode("run").code == 0
    assert (read, written, most) == (15, 15, 3)


# Progress


@pytest.mark.parametrize("slow", [pytest.param("tokenize", marks=pytest.mark.slow), "encode"])
def test_progress_reports_the_slowest_stage(slow: str, encode, monkeypatch) -> None:
    name = "tokenize" if slow == "tokenize" else "encode_tokens"
    original = getattr(DocumentEncoder, name)

    def slow_call(self, *arguments):
        time.sleep(0.5)
        return original(self, *arguments)

    monkeypatch.setattr(DocumentEncoder, name, slow_call)
    monkeypatch.setattr(progress, "LINE_EVERY_S", 0.0)
    lines = [line for line in encode("run", rows=ROWS[:8]).err.splitlines() if "slowest" in line]
    assert f", slowest: {slow} (" in lines[-1] and lines[-1].split("slowest")[1].split(")")[0].endswith(" % busy")


# Errors


def fail_at_call(original: Callable, at: int, error: BaseException) -> Callable:
    """Return `original`, but its call number `at` raises `error`."""
    calls = 0

    def call(*arguments, **named):
        nonlocal calls
        calls += 1
        if calls == at:
            raise error
        return original(*arguments, **named)

    return call


@pytest.mark.parametrize(
    ("owner", "name", "error", "message"),
    [
        (pq.ParquetWriter, "write_batch", OSError(28, "No space left on device", "disk"), "No space left"),
        (pq.ParquetWriter, "write_batch", KeyboardInterrupt(), "Interrupted; finished work is kept."),
        (DocumentEncoder, "encode_tokens", NotFinite("float32"), "infinite or undefined in float32"),
        (parts, "text_hash", OSError(5, "Input/output error", "corpus.jsonl"), "corpus.jsonl: Input/output error"),
    ],
)
def test_an_error_of_any_stage_ends_all_stages_and_keeps_finished_shards(
    owner, name: str, error: BaseException, message: str, encode, tmp_path: Path, monkeypatch
) -> None:
    # In the second shard, which begins with window 11 and text 41.
    monkeypatch.setattr(owner, name, fail_at_call(getattr(owner, name), 50 if name == "text_hash" else 13, error))
    answer = encode("run")
    assert answer.code == (130 if isinstance(error, KeyboardInterrupt) else 1), answer.err
    assert message in answer.err.splitlines()[-1]
    run = open_run(tmp_path / "run")
    assert run.done_shards() == [0] and run.complete() is None
    # The failed run can be resumed.
    assert encode("run").code == 0 and run.done_shards() == [0, 1]


def test_a_bad_document_ends_its_shard(encode, tmp_path: Path) -> None:
    answer = encode("run", rows=[*ROWS[:45], "{broken", *ROWS[45:]])
    assert answer.code == 1 and answer.err.splitlines()[-1].startswith("Error: corpus.jsonl:46: broken JSON")
    assert open_run(tmp_path / "run").done_shards() == [0]


def test_encoding_stops_after_the_current_batch_if_writing_fails(encode, monkeypatch) -> None:
    monkeypatch.setattr(parts, "PART_ROWS", 20)
    written, failed = threading.Event(), threading.Event()
    original, computed, documents = VectorMaker.compute, [], 0

    def compute(self, token_ids, places):
        nonlocal documents
        documents += len(places)
        if documents > 20:  # in the second window
            assert written.wait(HANGING_S)
            computed.append(len(places))
            assert failed.wait(HANGING_S)
            time.sleep(0.2)
        return original(self, token_ids, places)

    def write_batch(*_: object, **__: object) -> None:
        written.set()
        until(lambda: computed)
        failed.set()
        raise OSError(28, "No space left on device", "disk")

    monkeypatch.setattr(VectorMaker, "compute", compute)
    monkeypatch.setattr(pq.ParquetWriter, "write_batch", write_batch)
    assert encode("run", "--batch-tokens", 20).code == 1
    assert 0 < len(computed) < 12  # of 20 batches with one document each


def test_a_lowered_budget_is_an_error_with_standard_input(encode, model, tmp_path, monkeypatch) -> None:
    content = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
    monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=io.BytesIO(content)))
    original = DocumentEncoder.encode_tokens
    monkeypatch.setattr(DocumentEncoder, "encode_tokens", fail_at_call(original, 13, BudgetLowered("cpu", 4, 16, 1)))
    answer = command("encode", "--model", model, "--corpus", "-", "--out", tmp_path / "run", "--shard-rows", 40,
                     "--device", "cpu", "--dtype", "float32")  # fmt: skip
    assert answer.code == 1 and "Run the command again with --batch-tokens 16, or with a file." in answer.err
    assert open_run(tmp_path / "run").done_shards() == [0]


def test_ctrl_c_interrupts_the_encoding_of_a_window(model: Path, tmp_path: Path) -> None:
    rows = [{"_id": str(place), "text": f"{place} the river stone " * 5} for place in range(8192)]
    corpus, out, log = write(tmp_path / "corpus.jsonl", rows), tmp_path / "run", tmp_path / "log"
    process = start("encode", "--model", model, "--corpus", corpus, "--out", out, "--device", "cpu",
                    "--dtype", "float32", "--batch-tokens", 64, log=log)  # fmt: skip
    until(lambda: any(out.glob("tmp/part-00000.*")), log.read_text)
    time.sleep(0.3)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGINT)
    process.join(HANGING_S)
    assert process.exitcode == 130, log.read_text()
    assert log.read_text().splitlines()[-1] == "Interrupted; finished work is kept."
    assert open_run(out).done_shards() == []


def test_ctrl_c_interrupts_waiting_for_standard_input(model: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(parts, "PART_ROWS", 4)
    os.mkfifo(tmp_path / "pipe")
    content = "".join(json.dumps(row) + "\n" for row in ROWS[:4]).encode()
    original, written, ended = pq.ParquetWriter.write_batch, threading.Event(), threading.Event()
    late: list[str] = []
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs of a shell ignore SIGINT

    def write_batch(self, *arguments, **named):
        written.set()
        return original(self, *arguments, **named)

    def interrupt(pipe: io.FileIO) -> None:
        written.wait(HANGING_S)
        time.sleep(0.3)  # encode now waits for the fifth row
        os.kill(os.getpid(), signal.SIGINT)
        if not ended.wait(HANGING_S):
            late.append("encode still waits for the fifth row")
            pipe.write(content)

    monkeypatch.setattr(pq.ParquetWriter, "write_batch", write_batch)
    with (tmp_path / "pipe").open("r+b", buffering=0) as pipe:
        pipe.write(content)
        monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=pipe))
        one = threading.Thread(target=interrupt, args=(pipe,))
        one.start()
        answer = command("encode", "--model", model, "--corpus", "-", "--out", tmp_path / "run", "--device", "cpu",
                         "--dtype", "float32")  # fmt: skip
        ended.set()
        one.join()
    signal.signal(signal.SIGINT, before)
    assert not late and answer.code == 130 and answer.err.splitlines()[-1] == "Interrupted; finished work is kept."
