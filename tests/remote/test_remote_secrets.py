"""Passwords, keys and signed links are used but never written to a file of a run or printed.

Each command gets its secrets in every possible way, succeeds, and fails in each possible way.
"""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.checkpoints import make_masked_lm
from support.forked import Answer, command
from support.run_contents import ROWS, write
from support.runs import make_run
from support.stores import FaultyStore, stored, web_server

from sparse_ingest.runs.run import open_run
from sparse_ingest.storage.places import RemotePath

HIDDEN = "hidden-3f9c"
SIGNED = f"X-Amz-Signature={HIDDEN}"


class Outputs:
    """What commands printed and logged, and the files they may have written."""

    def __init__(self, folder: Path, log: pytest.LogCaptureFixture) -> None:
        self._folder, self._log = folder, log
        self._texts: list[str] = []

    def command(self, *arguments: object, code: int) -> Answer:
        answer = command(*arguments)
        assert answer.code == code, answer.err
        self._texts += [answer.out, answer.err]
        return answer

    def refuse_secrets(self, *stores: RemotePath) -> None:
        logged = [record.getMessage() for record in self._log.records if record.name.startswith("sparse_ingest")]
        written = {str(path): path.read_bytes() for path in self._folder.rglob("*") if path.is_file()}
        for store in stores:
            written.update(stored(store))
        assert self._texts and written
        for name, content in {**written, "said": "\n".join(self._texts + logged).encode()}.items():
            assert HIDDEN not in name and HIDDEN.encode() not in content, name
            assert b"X-Amz-Signature" not in content, name


@pytest.fixture
def outputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> Iterator[Outputs]:
    """Collect everything written on this machine in one folder."""
    for name in ("home", "temporary"):
        (tmp_path / "here" / name).mkdir(parents=True)
    monkeypatch.setenv("SPARSE_INGEST_HOME", str(tmp_path / "here" / "home"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "here" / "temporary"))
    monkeypatch.setattr("sparse_ingest.storage.places._PAUSES_S", (0.01,))
    caplog.set_level(logging.DEBUG, "sparse_ingest")
    yield Outputs(tmp_path / "here", caplog)


def signed(url: str, name: str) -> str:
    return f"{url.replace('//', f'//me:{HIDDEN}/a?b#c@d%@')}/{name}?{SIGNED}"


def test_encode_reveals_no_secret(outputs: Outputs, faulty: FaultyStore, bucket: str, tmp_path: Path,
                                monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", HIDDEN)
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    monkeypatch.setattr("s3fs.S3FileSystem.retries", 2)
    rows = [*ROWS[:6], {"_id": None, "text": "no id"}, ROWS[3]]
    write(tmp_path / "corpus.jsonl", rows)
    model = make_masked_lm(tmp_path / "model")
    run = RemotePath.at(f"{bucket}/run")
    encode = ["encode", "--model", model, "--shard-rows", 4, "--device", "cpu", "--dtype", "float32", "--corpus"]
    with web_server(tmp_path, token=HIDDEN) as url:
        corpus = signed(url, "corpus.jsonl")
        outputs.command(*encode, corpus, "--out", run, "--on-bad-document", "skip", "--json", code=3)
        assert open_run(run).skipped(1), "skipped rows name their file"
        here = tmp_path / "here" / "run"
        outputs.command(*encode, corpus, "--out", here, code=1)
        outputs.command("encode", "--dry-run", "--corpus", corpus, code=3)
        outputs.command(*encode, signed(url, "none.jsonl"), "--out", run, code=1)
        outputs.command(*encode, signed(url, "corpus"), "--out", run, code=1)
        outputs.command(*encode, corpus.replace(SIGNED, f"X-Amz-Signature=not-{HIDDEN[:6]}"), "--out", run, code=1)
        outputs.command(*encode, corpus, "--out", corpus, code=1)
        write(tmp_path / "corpus.jsonl", rows[1:])
        outputs.command(*encode, corpus, "--out", run, "--on-bad-document", "skip", code=1)
        faulty.inject("", always=403)
        outputs.command(*encode, corpus, "--out", run, code=1)
    outputs.command(*encode, corpus, "--out", tmp_path / "here" / "other", code=1)
    faulty.inject("nothing")
    outputs.refuse_secrets(run)


def test_load_and_search_reveal_no_secret(
    outputs: Outputs, opensearch_url: str, index_name: str, tmp_path: Path
) -> None:
    make_run(tmp_path / "served" / "run")
    server = ["--index", index_name, "--url", opensearch_url.replace("//", f"//me:12/{HIDDEN}/a?b#c@d%@")]
    with web_server(tmp_path / "served", token=HIDDEN) as url:
        run = signed(url, "run")
        outputs.command("status", run, "--json", code=0)
        report = json.loads(outputs.command("load", run, *server, "--json", code=0).out)
        assert Path(report["journal"], "journal.jsonl").is_relative_to(tmp_path / "here")
        outputs.command("verify", run, *server, "--all", "--json", code=0)
        outputs.command("load", run, *server, "--field", "other", code=1)
        outputs.command("load", run, "--index", index_name, "--url", f"http://me:12/{HIDDEN}?x@127.0.0.1:9", code=1)
        outputs.command("load", signed(url, "none"), *server, code=1)
        (tmp_path / "served" / "run" / "shards" / "part-00000.parquet").write_bytes(b"damaged")
        outputs.command("verify", run, *server, "--all", code=1)
    outputs.refuse_secrets()
