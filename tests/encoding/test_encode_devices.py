"""Several devices: the same bytes as one, whatever dies; here the devices are shares of the CPU."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from support.checkpoints import make_masked_lm
from support.forked import command, start
from support.run_contents import contents, lasting

from sparse_ingest.corpora import sources as corpora
from sparse_ingest.corpora.documents import FieldNames
from sparse_ingest.corpora.files import open_corpus
from sparse_ingest.encoding.encode import encode
from sparse_ingest.encoding.options import EncodeOptions
from sparse_ingest.errors import RunError, UsageError
from sparse_ingest.executors import local as devices
from sparse_ingest.pipeline import ModelSettings, Pipeline
from sparse_ingest.runs.run import open_run

ROWS = [{"_id": str(place), "text": f"the river stone {place} " * (place % 7)} for place in range(200)]
TOGETHER = ("manifest.json", "vocab.json", "complete.json")


class Corpus:
    """A corpus, a model, and the run that one device makes of them."""

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
        """Every byte that lasts must be that of one device."""
        for folder in ("shards", "skipped"):
            assert contents(out / folder) == contents(self.run / folder)
        for name in TOGETHER:
            assert (out / name).read_bytes() == (self.run / name).read_bytes()
        assert lasting(open_run(out)) == lasting(open_run(self.run))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return Corpus(tmp_path_factory.mktemp("devices"))


def children_of(process: int) -> list[int]:
    """The processes on its devices, by number."""
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            name, _, rest = status.read_text().rpartition(")")
            line = status.with_name("cmdline").read_text()
        except OSError:  # it has ended
            continue
        if rest.split()[1] == str(process) and "executors.local" in line:
            found.append(int(name.split()[0]))
    return sorted(found)


def until(there: Any, process: Any, log: Path, seconds: float = 90) -> Any:
    """The answer, once there is any."""
    end = time.monotonic() + seconds
    while not (found := there()):
        assert process.is_alive() and time.monotonic() < end, log.read_text()
        time.sleep(0.002)
    return found


def test_two_processes_make_the_bytes_of_one(corpus: Corpus, tmp_path: Path) -> None:
    """The first one is held up until the second has made a shard; alone it would be done before."""
    out, log = tmp_path / "run", tmp_path / "log"
    parent = start(*corpus.arguments(out, "cpu,cpu"), "--json", log=log)
    first = until(lambda: children_of(parent.pid), parent, log)[0]
    until(lambda: any(out.glob("done/part-*")), parent, log)
    os.kill(first, signal.SIGSTOP)
    made = len(list(out.glob("done/part-*")))
    assert made < 10, "the first one was too fast"
    until(lambda: len(list(out.glob("done/part-*"))) > made, parent, log)
    os.kill(first, signal.SIGCONT)
    parent.join(90)
    assert parent.exitcode == 3, log.read_text()
    corpus.compare(out)
    said = log.read_text()
    report = json.loads(command(*corpus.arguments(corpus.run, "cpu"), "--json").out)
    assert json.loads(said[said.index("{") : said.rindex("}") + 1]) == {**report, "run": str(out)}
    assert said.count("Encoding with") == 1 and "1 bad documents were skipped" in said


@pytest.mark.slow
def test_a_process_that_is_killed_is_named_and_the_other_makes_its_shards(corpus: Corpus, tmp_path: Path) -> None:
    out, log = tmp_path / "run", tmp_path / "log"
    # Stopped in the middle of a shard, so that the kill strikes while its lock is held.
    parent = start(*corpus.arguments(out, "cpu,cpu"), log=log)
    first = until(lambda: children_of(parent.pid), parent, log)[0]
    until(lambda: any(out.glob("done/part-*")), parent, log)
    os.kill(first, signal.SIGSTOP)
    until(lambda: len(children_of(parent.pid)) == 2, parent, log)
    os.kill(first, signal.SIGKILL)
    parent.join(90)
    assert parent.exitcode == 3, log.read_text()
    assert "The process on cpu died: SIGKILL ended it" in log.read_text()
    corpus.compare(out)


@pytest.mark.slow
def test_a_run_whose_processes_all_die_says_so_and_is_finished_by_the_next_start(
    corpus: Corpus, tmp_path: Path
) -> None:
    out, log = tmp_path / "run", tmp_path / "log"
    parent = start(*corpus.arguments(out, "cpu,cpu"), log=log)
    first = until(lambda: children_of(parent.pid), parent, log)[0]
    until(lambda: any(out.glob("done/part-*")), parent, log)
    os.kill(first, signal.SIGSTOP)
    for child in until(lambda: len(found := children_of(parent.pid)) == 2 and found, parent, log):
        os.kill(child, signal.SIGKILL)
    parent.join(90)
    assert parent.exitcode == 1
    assert "Error: No process is left: the process on cpu died: SIGKILL ended it" in log.read_text()
    assert not (out / "complete.json").exists()
    assert command(*corpus.arguments(out, "cpu")).code == 3
    corpus.compare(out)


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code", "said"), [
    (signal.SIGTERM, 130, "Stopped on request after a complete shard"), (signal.SIGINT, 130, "Interrupted"),
    (signal.SIGKILL, -9, ""),
])  # fmt: skip
def test_processes_end_with_the_one_that_started_them(
    corpus: Corpus, tmp_path: Path, number: int, code: int, said: str
) -> None:
    out, log = tmp_path / "run", tmp_path / "log"
    parent = start(*corpus.arguments(out, "cpu,cpu"), log=log)
    until(lambda: any(out.glob("tmp/part-*")), parent, log)
    children = children_of(parent.pid)
    os.kill(parent.pid, number)
    parent.join(90)
    assert parent.exitcode == code and said in log.read_text()
    end = time.monotonic() + 30
    while any(Path(f"/proc/{child}").exists() for child in children):
        assert time.monotonic() < end, "a process outlives the one that started it"
        time.sleep(0.01)
    assert not (out / "complete.json").exists()


@pytest.mark.slow
def test_a_bad_document_is_the_error_that_it_is_on_one_device(
    corpus: Corpus, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    one, two = (command(*corpus.arguments(tmp_path / name, name, "fail")) for name in ("cpu", "cpu,cpu"))
    assert two.code == one.code == 1
    assert two.err.splitlines()[-1] == one.err.splitlines()[-1]
    assert "corpus.jsonl:201: " in two.err
    assert "Traceback" not in capfd.readouterr().err  # of the processes, which are ended while they end


class Slow(corpora.Corpus):
    """A corpus that takes ten seconds to read."""

    def rows(self, start: corpora.Position = corpora.START) -> Any:
        for row in super().rows(start):
            time.sleep(0.05)
            yield row


@pytest.mark.slow
def test_a_process_ends_where_ctrl_c_is_ignored_as_in_the_background_of_a_shell(corpus: Corpus, tmp_path: Path) -> None:
    found = open_corpus([str(corpus.file)], fields=FieldNames())
    pipeline = Pipeline(model=ModelSettings(document=str(corpus.model)))
    work = Slow(found.sources, found.fields), pipeline, EncodeOptions(), tmp_path / "run"
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        child = devices._Child("cpu", sorted(os.sched_getaffinity(0)), 1, work)
    finally:
        signal.signal(signal.SIGINT, before)
    assert child.connection.recv()[0] == "note"
    child.connection.close()
    child.wait(30)
    assert child._process.returncode == 130


class Broken(corpora.Corpus):
    """A corpus on which a process fails in an unexpected way."""

    def rows(self, start: corpora.Position = corpora.START) -> Any:
        raise RuntimeError("CUDA error: an illegal memory access was encountered\nand more")


@pytest.mark.slow
def test_an_error_that_nobody_expects_is_named_with_its_device(corpus: Corpus, tmp_path: Path) -> None:
    found = open_corpus([str(corpus.file)], fields=FieldNames())
    pipeline = Pipeline(model=ModelSettings(document=str(corpus.model)))
    broken, options = Broken(found.sources, found.fields), EncodeOptions(device="cpu,cpu")
    with pytest.raises(RunError) as caught:
        encode(broken, tmp_path / "run", pipeline=pipeline, options=options)
    died = "the process on cpu died: RuntimeError: CUDA error: an illegal memory access was encountered"
    assert str(caught.value).startswith(f"No process is left: {died}; {died}; ")


@pytest.mark.slow
def test_a_process_without_a_shard_says_so(corpus: Corpus, tmp_path: Path) -> None:
    """The first one is held up in the only shard until the second has said it."""
    out, log = tmp_path / "run", tmp_path / "log"
    arguments = corpus.arguments(out, "cpu,cpu")
    arguments[arguments.index("--shard-rows") + 1] = 1000
    parent = start(*arguments, log=log)
    until(lambda: any(out.glob("tmp/part-*")), parent, log)
    first = children_of(parent.pid)[0]
    os.kill(first, signal.SIGSTOP)
    until(lambda: "A process found no shard left to encode" in log.read_text(), parent, log)
    os.kill(first, signal.SIGCONT)
    parent.join(90)
    assert parent.exitcode == 3, log.read_text()


def test_a_process_that_is_stopped_is_reported_with_its_number_within_20_s(corpus: Corpus, tmp_path: Path) -> None:
    out, log = tmp_path / "run", tmp_path / "log"
    parent = start(*corpus.arguments(out, "cpu,cpu"), log=log)
    until(lambda: any(out.glob("tmp/part-*")), parent, log)
    first = children_of(parent.pid)[0]
    os.kill(first, signal.SIGSTOP)
    said = f"The process on cpu (pid {first}) has not reported for 1"
    until(lambda: said in log.read_text(), parent, log, seconds=20)
    os.kill(first, signal.SIGCONT)
    parent.join(90)
    assert parent.exitcode == 3, log.read_text()
    corpus.compare(out)


def test_standard_input_is_for_one_device(corpus: Corpus, tmp_path: Path) -> None:
    arguments = corpus.arguments(tmp_path / "run", "cpu,cpu")
    arguments[arguments.index("--corpus") + 1] = "-"
    answer = command(*arguments)
    assert answer.code == 2 and "only one process can read standard input" in answer.err


def test_devices_that_cannot_go_together_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from sparse_ingest.models.documents import choose_devices

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert choose_devices("auto") == choose_devices("cuda") == ["cuda:0", "cuda:1"]
    assert choose_devices("cuda:1,cuda:1") == ["cuda:1", "cuda:1"]
    for asked in ("cpu,cuda:0", "cuda,cuda:0"):
        with pytest.raises(UsageError, match="a run needs devices of one kind"):
            choose_devices(asked)
    with pytest.raises(UsageError, match="torch sees 2 GPUs"):
        choose_devices("cuda:1,cuda:2")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert choose_devices("cuda") == ["cuda"]
