"""A maker of stub shards for tests of executors: small files with fixed contents, at a given speed."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from sparse_ingest.errors import CorpusError, Interrupted, MissingExtraError, StorageError
from sparse_ingest.executors.local import Worker
from sparse_ingest.reporting import Reporter

ROWS = 10  # of a shard


class Stub(NamedTuple):
    """Where the files are written, the seconds of a shard, and a shard that behaves in another way."""

    folder: Path
    seconds: float = 0.0
    behavior: str = ""  # raise, extra, store, bug, kill, kill_once, freeze_once
    shard: int = -1


def build(worker: Worker, stub: Stub, reporter: Reporter) -> Callable[[range], object]:
    """Return a maker, and note that it was built."""
    with (stub.folder / "built").open("a") as file:
        file.write(f"{os.getpid()} {worker.device} {len(os.sched_getaffinity(0))}\n")
    reporter.note("Building a stub.")

    def make(shards: range) -> object:
        for shard in shards:
            made(stub, shard, reporter)
        return [shards.start, shards.stop]

    return make


def made(stub: Stub, shard: int, reporter: Reporter) -> None:
    reporter.plan(ROWS, ROWS)
    for _ in range(ROWS):
        time.sleep(stub.seconds / ROWS)
        if reporter.stop_requested():
            raise Interrupted("Stopped after a window.")
        reporter.advance(1, tokens=1, detail="stub")
    if shard == stub.shard:
        misbehave(stub)
    target = stub.folder / f"shard-{shard:05}"
    scratch = target.with_suffix(f".{os.getpid()}")
    scratch.write_bytes(content(shard))
    scratch.replace(target)


def misbehave(stub: Stub) -> None:
    first = not (stub.folder / "misbehaved").exists()
    (stub.folder / "misbehaved").touch()
    if stub.behavior == "raise":
        raise CorpusError("corpus.jsonl:3: bad.")
    if stub.behavior == "extra":
        raise MissingExtraError("fast", "This")
    if stub.behavior == "store" and first:
        raise StorageError("The store did not answer.")
    if stub.behavior == "bug":
        raise ZeroDivisionError("a bug")
    if stub.behavior == "kill" or (stub.behavior == "kill_once" and first):
        os.kill(os.getpid(), signal.SIGKILL)
    if stub.behavior == "freeze_once" and first:
        os.kill(os.getpid(), signal.SIGSTOP)


def content(shard: int) -> bytes:
    """Return the bytes of a shard."""
    return f"shard {shard}\n".encode() * 100


def is_complete(folder: Path, shards: int) -> bool:
    """Return whether exactly these shards are there, with their bytes."""
    found = {path.name: path.read_bytes() for path in folder.glob("shard-*")}
    return found == {f"shard-{shard:05}": content(shard) for shard in range(shards)}
