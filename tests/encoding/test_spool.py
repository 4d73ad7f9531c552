"""An interrupted shard continues after its last finished window, with the same bytes."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from support.checkpoints import make_masked_lm
from support.reporters import Recorder
from support.run_contents import contents, lasting, write
from support.too_large import refuse_texts_of

from sparse_ingest.encoding import encode as encoding
from sparse_ingest.encoding import job, shard_maker
from sparse_ingest.errors import CorpusError, Interrupted
from sparse_ingest.models.documents import DocumentEncoder
from sparse_ingest.models.memory import BudgetLowered
from sparse_ingest.runs.run import Run, open_run

LONG = "river stone cloud " * 30
# Equal texts in several windows, and long ones. With windows of 4 rows and shards of 24 the first shard has 6 windows.
ROWS: list[Any] = [{"_id": f"d{place}", "text": f"the river stone {place % 9} " * (place % 7)} for place in range(30)]
ROWS[10]["text"] = ROWS[17]["text"] = LONG
ROWS[2] = "{broken"
BEFORE = 15  # documents in the first four windows


class Meter(Recorder):
    """Measures the `computed` tokens and the units `kept` from an earlier start. Ctrl-C comes after `at` units."""

    def __init__(self, at: int | None = None, **options: Any) -> None:
        super().__init__(**options)
        self.computed = self.kept = 0
        self.tokens_of: dict[int, int] = {}  # all tokens by the units so far
        self._at = at

    def earlier(self, count: int) -> None:
        super().earlier(count)
        self.kept += count

    def advance(self, count: int, *, tokens: int = 0, detail: str = "") -> None:
        super().advance(count, tokens=tokens, detail=detail)
        self.computed += tokens
        self.tokens_of[self.done] = self.computed
        if self._at is not None and self.done > self._at:
            raise KeyboardInterrupt


Encode = Callable[..., Meter]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_masked_lm(tmp_path_factory.mktemp("spool") / "tiny")


@pytest.fixture
def encode(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Encode:
    """Return a function that encodes rows into a run, interrupted in a window after some units."""
    monkeypatch.setattr(shard_maker, "PART_ROWS", 4)
    corpus = write(tmp_path / "corpus.jsonl", ROWS)

    def run(out: str | Path, *, at: int | None = None, stop_at: int | None = None, **options: Any) -> Meter:
        meter = Meter(at, stop_at=stop_at)
        given = {"shard_rows": 24, "dtype": "float32", "device": "cpu", "max_length": 20, "on_bad_document": "skip"}
        given = {"corpus": corpus, "model": str(model), **given, **options}
        try:
            encoding.encode(out=tmp_path / out, progress=meter, **given)
        except (KeyboardInterrupt, Interrupted) as end:
            assert isinstance(end, Interrupted if at is None else KeyboardInterrupt)
            meter.notes.append(str(end))
        else:
            assert at is stop_at is None
        return meter

    return run


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a run that `complete` encodes once."""
    return tmp_path_factory.mktemp("undisturbed") / "run"


@pytest.fixture
def complete(undisturbed: Path, encode: Encode) -> Path:
    """Return the undisturbed run of the rows, without options."""
    if not undisturbed.exists():
        encode(undisturbed)
    return undisturbed


def spooled(run: Path) -> list[Path]:
    """Return the files of windows of the first shard, oldest first."""
    return sorted(run.glob("tmp/part-00000/*.window"), key=lambda path: path.stat().st_mtime_ns)


def compare(found: Path, expected: Path) -> Run:
    """Assert that two runs have the same bytes, and that the first one has no temporary file."""
    for folder in ("shards", "skipped"):
        assert contents(found / folder) == contents(expected / folder)
    assert lasting(open_run(found)) == lasting(open_run(expected))
    assert (found / "complete.json").read_bytes() == (expected / "complete.json").read_bytes()
    assert not list((found / "tmp").iterdir())
    return open_run(found)


# The same bytes


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="truncate", marks=pytest.mark.slow),
        pytest.param({"overflow": "windows"}, id="windows"),
        pytest.param({"overflow": "passages"}, id="passages", marks=pytest.mark.slow),
        pytest.param({"dedup_text": "encode-once", "weights": "float32"}, id="dedup", marks=pytest.mark.slow),
        pytest.param({"reuse": True, "dedup_text": "encode-once"}, id="reuse-dedup"),
    ],
)  # fmt: skip
def test_an_interrupted_shard_continues_after_its_finished_windows(
    options: dict[str, Any], encode: Encode, tmp_path: Path
) -> None:
    if "reuse" in options:
        encode("old", corpus=write(tmp_path / "old.jsonl", [row for row in ROWS[::3] if isinstance(row, dict)]))
        options = {**options, "reuse": tmp_path / "old"}
    complete = encode("complete", **options)
    assert not (tmp_path / "complete" / "tmp" / "part-00000").exists()
    interrupted = encode("run", at=BEFORE, **options)
    assert len(spooled(tmp_path / "run")) == 4
    assert open_run(tmp_path / "run").done_shards() == []
    resumed = encode("run", **options)
    assert interrupted.kept == 0 and resumed.kept == BEFORE
    assert resumed.computed == complete.computed - complete.tokens_of[BEFORE]
    assert resumed.done == complete.done
    compare(tmp_path / "run", tmp_path / "complete")


def test_a_second_interruption_continues_too(encode: Encode, complete: Path, tmp_path: Path) -> None:
    encode("run", at=BEFORE)
    encode("run", at=BEFORE + 4)
    assert len(spooled(tmp_path / "run")) == 5
    assert encode("run").kept == BEFORE + 4
    compare(tmp_path / "run", complete)


def test_standard_input_continues(encode: Encode, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def pipe() -> None:
        monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=io.BytesIO((tmp_path / "corpus.jsonl").read_bytes())))

    pipe()
    encode("complete", corpus="-")
    pipe()
    encode("run", corpus="-", at=BEFORE)
    pipe()
    assert encode("run", corpus="-").kept == BEFORE
    compare(tmp_path / "run", tmp_path / "complete")


@pytest.mark.parametrize("overflow", [pytest.param("truncate", marks=pytest.mark.slow), "passages"])
def test_skipped_documents_of_finished_windows_stay_skipped(
    overflow: str, encode: Encode, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that does not fit into memory, and with passages one whose ids would be too long."""
    refuse_texts_of(20, monkeypatch)
    rows = [{"_id": f"d{place}", "text": f"the river {place}"} for place in range(20)]
    rows[1] = {"_id": "x" * 511, "text": "river"}
    rows[6]["text"] = LONG
    options = {"overflow": overflow, "corpus": write(tmp_path / "large.jsonl", rows)}
    encode("complete", **options)
    encode("run", at=9, **options)
    assert encode("run", **options).kept == 8
    run = compare(tmp_path / "run", tmp_path / "complete")
    reasons = [(row.row, row.line, row.reason.split()[-1]) for row in run.skipped(0)]
    assert reasons == [(1, 2, "512")][overflow == "truncate" :] + [(6, 7, "cpu")]
    # They are not skipped if bad documents are refused.
    encode("refused", at=9, **options)
    with pytest.raises(CorpusError, match=r"large.jsonl:(2|7): "):
        encode("refused", **options, on_bad_document="fail")


# Windows that must not be used


def test_damaged_windows_are_encoded_again(encode: Encode, complete: Path, tmp_path: Path) -> None:
    encode("run", at=BEFORE)
    changed, short, empty, kept = spooled(tmp_path / "run")
    content = bytearray(changed.read_bytes())
    content[content.index(b"<f2") + 20] ^= 1  # a bit of a weight
    changed.write_bytes(content)
    short.write_bytes(short.read_bytes()[:-1])
    empty.write_bytes(b"")
    assert encode("run").kept == 4
    compare(tmp_path / "run", complete)


def test_windows_of_another_budget_release_or_corpus_are_not_used(
    encode: Encode, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode("complete", batch_tokens=16)
    encode("run", batch_tokens=64, at=BEFORE)
    assert encode("run", batch_tokens=16, at=BEFORE).kept == 0
    corpus, before = tmp_path / "corpus.jsonl", (tmp_path / "corpus.jsonl").read_bytes()
    corpus.write_bytes(before.replace(b'"the river stone 5 ', b'"the river stone 4 ', 1))  # in the second window
    assert encode("run", batch_tokens=16, at=BEFORE).kept == 3
    corpus.write_bytes(before)
    version = job.version  # type: ignore[attr-defined]
    monkeypatch.setattr(job, "version", lambda package: "0" if package == "torch" else version(package))
    assert encode("run", batch_tokens=16, at=BEFORE).kept == 0
    monkeypatch.setattr(job, "version", version)
    assert encode("run", batch_tokens=16).kept == BEFORE
    compare(tmp_path / "run", tmp_path / "complete")


def test_a_lowered_budget_uses_windows_of_the_same_budget(
    encode: Encode, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory runs out in the fourth window, and the process is interrupted after two windows with a lower budget."""
    encode("complete", batch_tokens=16)
    original, calls = DocumentEncoder.encode_tokens, []

    def lower_budget(self: Any, *arguments: Any) -> Any:
        calls.append(self.batch_tokens)
        if self.batch_tokens == 64 and calls.count(64) == 4:
            self.batch_tokens = 16
            raise BudgetLowered("cpu", 4, 16, 1)
        return original(self, *arguments)

    monkeypatch.setattr(DocumentEncoder, "encode_tokens", lower_budget)
    encode("run", batch_tokens=64, at=11 + 8)  # 3 windows, then 2 and a half
    assert calls == [64] * 4 + [16] * 3 and len(spooled(tmp_path / "run")) == 5
    calls[:] = [64] * 3
    assert encode("run", batch_tokens=64).kept == 11 + 7
    assert calls[3:] == [64] + [16] * 6
    compare(tmp_path / "run", tmp_path / "complete")


# Stop requests and leftovers


def test_a_stop_request_ends_after_the_current_window(encode: Encode, complete: Path, tmp_path: Path) -> None:
    stopped = encode("run", stop_at=9)
    assert stopped.notes[-1] == (
        f"Stopped on request; {tmp_path / 'run'} keeps the finished shards and windows. Run the same command again to "
        "continue."
    )
    windows = len(spooled(tmp_path / "run"))
    assert windows in (2, 3)
    assert encode("run").kept == 4 * windows - 1
    compare(tmp_path / "run", complete)


def test_the_last_window_of_a_shard_is_not_stored(encode: Encode, tmp_path: Path) -> None:
    encode("run", at=20, shard_rows=4)
    encode("long", at=20, shard_rows=12)
    encode("short", at=1, corpus=write(tmp_path / "short.jsonl", ROWS[:2]))
    assert not list(tmp_path.glob("*/tmp/part-*/"))[1:]
    assert [path.parent.name for path in tmp_path.glob("*/tmp/part-*/*.window")] == ["part-00001"] * 2


def test_windows_of_a_finished_shard_are_removed(encode: Encode, complete: Path, tmp_path: Path) -> None:
    """A process was killed between a shard's record and the removal of its windows."""
    encode("run", at=27)
    left = tmp_path / "run" / "tmp" / "part-00000" / "a.window"
    left.parent.mkdir()
    left.write_bytes(json.dumps(ROWS).encode())
    encode("run")
    compare(tmp_path / "run", complete)
