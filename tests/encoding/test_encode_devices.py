"""Several devices give the same bytes as one, also if processes die. Here the devices are shares of the CPU."""

from __future__ import annotations

import json
import os
import signal
import time
from contextlib import suppress
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import pytest
from support.checkpoints import make_masked_lm
from support.deadlines import HANGING_S, until
from support.forked import command, start
from support.run_contents import contents, lasting

from sparse_ingest.corpora import sources as corpora
from sparse_ingest.corpora.documents import FieldNames
from sparse_ingest.corpora.files import open_corpus
from sparse_ingest.encoding.encode import encode
from sparse_ingest.encoding.job import Job
from sparse_ingest.encoding.options import EncodeOptions
from sparse_ingest.errors import RunError, UsageError
from sparse_ingest.executors import local as devices
from sparse_ingest.pipeline import ModelSettings, Pipeline
from sparse_ingest.runs.run import open_run

ROWS = [{"_id": str(place), "text": f"the river stone {place} " * (place % 7)} for place in range(200)]
RUN_FILES = ("manifest.json", "vocab.json", "complete.json")


class Corpus:
    """A corpus, a model, and their run encoded on one device."""

    def __init__(self, folder: Path) -> None:
        self.file = folder / "corpus.jsonl"
        self.file.write_text("".join(json.dumps(row) + "\n" for row in [*ROWS, {"_id": None, "text": "bad"}]))
        self.model = make_masked_lm(folder / "model")
        self.run = folder / "run"
        assert command(*self.arguments(self.run, "cpu")).code == 3

    def arguments(self, out: Path, device: str, bad: str = "skip") -> list[object]:
        return ["encode", "--model", self.model, "--corpus", self.file, "--shard-rows", 20, "--out", out,
                "--on-bad-document", bad, "--dtype", "float32", "--device", device]  # fmt: skip

    def compare(self, out: Path) -> None:
        """Assert that all files except timings are identical to the files of one device."""
        for folder in ("shards", "skipped"):
            assert contents(out / folder) == contents(self.run / folder)
        for name in RUN_FILES:
            assert (out / name).read_bytes() == (self.run / name).read_bytes()
        assert lasting(open_run(out)) == lasting(open_run(self.run))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return Corpus(tmp_path_factory.mktemp("devices"))


def children_of(process: int) -> list[int]:
    """Return the pids of the device processes of a process."""
    found = []
    for children in Path("/proc").glob(f"{process}/task/*/children"):
        with suppress(OSError):  # the thread has ended
            for child in children.read_text().split():
                with suppress(OSError):  # the process has ended
                    if "executors.local" in Path(f"/proc/{child}/cmdline").read_text():
                        found.append(int(child))
    return sorted(found)


def wait_until(there: Any, process: Any, log: Path) -> Any:
    """Poll `there` until it returns something, and return it; fail if the process ends before."""

    def find() -> Any:
        found = there()
        assert found or process.is_alive(), log.read_text()
        return found

    return until(find, log.read_text)


def test_two_processes_give_the_bytes_of_one(corpus: Corpus, tmp_path: Path) -> None:
    """The first process is stopped until the second has finished a shard; otherwise it may encode all."""
    for attempt in range(10):
        out, log = tmp_path / f"run-{attempt}", tmp_path / f"log-{attempt}"
        parent = start(*corpus.arguments(out, "cpu,cpu"), "--json", "-v", log=log)
        first = wait_until(lambda parent=parent: children_of(parent.pid), parent, log)[0]
        wait_until(lambda out=out: any(out.glob("tmp/part-*")), parent, log)
        os.kill(first, signal.SIGSTOP)
        finished = len(list(out.glob("done/part-*")))
        if finished < 10:
            break
        # The first one was too fast.
        os.kill(first, signal.SIGCONT)
        parent.join(HANGING_S)
    wait_until(lambda: len(list(out.glob("done/part-*"))) > finished, parent, log)
    os.kill(first, signal.SIGCONT)
    parent.join(HANGING_S)
    assert parent.exitcode == 3, log.read_text()
    corpus.compare(out)
    message = log.read_text()
    report = json.loads(command(*corpus.arguments(corpus.run, "cpu"), "--json").out)
    assert json.loads(message[message.index("{") : message.rindex("}") + 1]) == {**report, "run": str(out)}
    # Each process sends its records, and an equal one is printed once.
    assert message.count("Head: ") == 1
    assert message.count("Encoding with") == 1 and "Bad documents that were skipped: 1 " in message


@pytest.mark.slow
def test_a_killed_process_is_reported_and_the_other_encodes_its_shards(corpus: Corpus, tmp_path: Path) -> None:
    out, log = tmp_path / "run", tmp_path / "log"
    # The process is stopped within a shard, which the other one makes again.
    parent = start(*corpus.arguments(out, "cpu,cpu"), log=log)
    first = wait_until(lambda: children_of(parent.pid), parent, log)[0]
    wait_until(lambda: any(out.glob("done/part-*")), parent, log)
    os.kill(first, signal.SIGSTOP)
    wait_until(lambda: len(children_of(parent.pid)) == 2, parent, log)
    os.kill(first, signal.SIGKILL)
    parent.join(HANGING_S)
    assert parent.exitcode == 3, log.read_text()
    assert "The process on cpu died: SIGKILL ended it" in log.read_text()
    corpus.compare(out)


@pytest.mark.slow
def test_a_run_whose_processes_all_died_is_an_error_and_can_be_resumed(corpus: Corpus, tmp_path: Path) -> None:
    out, log = tmp_path / "run", tmp_path / "log"
    parent = start(*corpus.arguments(out, "cpu,cpu"), log=log)
    first = wait_until(lambda: children_of(parent.pid), parent, log)[0]
    wait_until(lambda: any(out.glob("done/part-*")), parent, log)
    os.kill(first, signal.SIGSTOP)
    for child in wait_until(lambda: len(found := children_of(parent.pid)) == 2 and found, parent, log):
        os.kill(child, signal.SIGKILL)
    parent.join(HANGING_S)
    assert parent.exitcode == 1
    assert "Error: No process is left: the process on cpu died: SIGKILL ended it" in log.read_text()
    assert not (out / "complete.json").exists()
    assert command(*corpus.arguments(out, "cpu")).code == 3
    corpus.compare(out)


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code", "message"), [
    (signal.SIGTERM, 130, "Stopped on request; "), (signal.SIGINT, 130, "Interrupted"),
    (signal.SIGKILL, -9, ""),
])  # fmt: skip
def test_device_processes_end_with_their_parent(
    corpus: Corpus, tmp_path: Path, number: int, code: int, message: str
) -> None:
    out, log = tmp_path / "run", tmp_path / "log"
    parent = start(*corpus.arguments(out, "cpu,cpu"), log=log)
    wait_until(lambda: any(out.glob("tmp/part-*")), parent, log)
    children = children_of(parent.pid)
    os.kill(parent.pid, number)
    parent.join(HANGING_S)
    assert parent.exitcode == code and message in log.read_text()
    until(lambda: not any(Path(f"/proc/{child}").exists() for child in children))
    assert not (out / "complete.json").exists()


@pytest.mark.slow
def test_a_bad_document_gives_the_same_error_as_on_one_device(
    corpus: Corpus, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    one, two = (command(*corpus.arguments(tmp_path / name, name, "fail")) for name in ("cpu", "cpu,cpu"))
    assert two.code == one.code == 1
    assert two.err.splitlines()[-1] == one.err.splitlines()[-1]
    assert "corpus.jsonl:201: " in two.err
    assert "Traceback" not in capfd.readouterr().err  # stderr of the device processes


class Slow(corpora.Corpus):
    def rows(self, start: corpora.Position = corpora.START) -> Any:
        for row in super().rows(start):
            time.sleep(0.05)
            yield row


@pytest.mark.slow
def test_a_device_process_ends_with_its_parent_even_if_sigint_is_ignored(corpus: Corpus, tmp_path: Path) -> None:
    found = open_corpus([str(corpus.file)], fields=FieldNames())
    pipeline = Pipeline(model=ModelSettings(document=str(corpus.model)))
    work = Slow(found.sources, found.fields), tmp_path / "run", pipeline, EncodeOptions()
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        child = devices._Child(
            devices.Worker("cpu"), sorted(os.sched_getaffinity(0)), ForkingPickler.dumps((Job, work))
        )
    finally:
        signal.signal(signal.SIGINT, before)
    child.connection.recv()  # a heartbeat or a note: it works
    child.connection.close()
    child.wait(HANGING_S)
    assert child._process.returncode == 130


class Broken(corpora.Corpus):
    """A corpus that raises an unexpected error."""

    def rows(self, start: corpora.Position = corpora.START) -> Any:
        raise RuntimeError("CUDA error: an illegal memory access was encountered\nand more")


@pytest.mark.slow
def test_an_unexpected_error_is_reported_with_its_device(corpus: Corpus, tmp_path: Path) -> None:
    found = open_corpus([str(corpus.file)], fields=FieldNames())
    pipeline = Pipeline(model=ModelSettings(document=str(corpus.model)))
    broken, options = Broken(found.sources, found.fields), EncodeOptions(device="cpu,cpu")
    with pytest.raises(RunError) as caught:
        encode(broken, tmp_path / "run", pipeline=pipeline, options=options)
    reason = "the process on cpu died: RuntimeError: CUDA error: an illegal memory access was encountered"
    assert str(caught.value).startswith(f"No process is left: {reason}; {reason}; ")


@pytest.mark.slow
def test_a_process_without_a_shard_is_reported(corpus: Corpus, tmp_path: Path) -> None:
    arguments = corpus.arguments(tmp_path / "run", "cpu,cpu")
    arguments[arguments.index("--shard-rows") + 1] = 1000
    answer = command(*arguments)
    assert answer.code == 3
    assert "Only 1 shard for 2 devices: some have nothing to do. Smaller shards (--shard-rows" in answer.err


@pytest.mark.slow  # 20 s of waiting
def test_a_stopped_process_is_reported_with_its_pid(corpus: Corpus, tmp_path: Path) -> None:
    out, log = tmp_path / "run", tmp_path / "log"
    parent = start(*corpus.arguments(out, "cpu,cpu"), log=log)
    wait_until(lambda: any(out.glob("tmp/part-*")), parent, log)
    first = children_of(parent.pid)[0]
    os.kill(first, signal.SIGSTOP)
    message = f"The process on cpu (pid {first}) has not reported for 1"
    wait_until(lambda: message in log.read_text(), parent, log)
    os.kill(first, signal.SIGCONT)
    parent.join(HANGING_S)
    assert parent.exitcode == 3, log.read_text()
    corpus.compare(out)


@pytest.mark.slow
def test_a_part_uses_all_devices(corpus: Corpus, tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert command(*corpus.arguments(out, "cpu"), "--plan-only").code == 0
    answer = command(*corpus.arguments(out, "cpu,cpu"), "--part", "1/2")
    assert answer.code == 0 and "part 1/2 is done (shards 0 to 5); 6 of 11 shards are done" in answer.out
    assert command(*corpus.arguments(out, "cpu"), "--part", "2/2").code == 0
    assert command(*corpus.arguments(out, "cpu"), "--finish").code == 3
    corpus.compare(out)


def test_standard_input_is_refused_with_several_devices(corpus: Corpus, tmp_path: Path) -> None:
    arguments = corpus.arguments(tmp_path / "run", "cpu,cpu")
    arguments[arguments.index("--corpus") + 1] = "-"
    answer = command(*arguments)
    assert answer.code == 2 and "only one process can read standard input" in answer.err


def test_invalid_combinations_of_devices_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from sparse_ingest.models.documents import choose_devices

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert choose_devices("auto") == choose_devices("cuda") == ["cuda:0", "cuda:1"]
    assert choose_devices("cuda:1,cuda:1") == ["cuda:1", "cuda:1"]
    for given in ("cpu,cuda:0", "cuda,cuda:0"):
        with pytest.raises(UsageError, match="a run needs devices of one kind"):
            choose_devices(given)
    with pytest.raises(UsageError, match="torch sees 2 GPUs"):
        choose_devices("cuda:1,cuda:2")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert choose_devices("cuda") == ["cuda"]
