"""What a load has done, as files that need no program to read.

RUN/load/CLUSTER_UUID/INDEX_UUID/journal.jsonl has one line per finished shard, dead.jsonl beside it one line per
document that OpenSearch refused. Dead letters are on disk before the line of their shard, and a shard that is loaded
again first loses its old ones, so the two never disagree. A line is complete when it ends with a line break: what a
killed process left behind it is ignored, and cut off before the next line.
Not covered: sending dead letters again.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from sparse_ingest.durable import sync_folder, write_atomic
from sparse_ingest.errors import RunError


class DeadLetter(NamedTuple):
    """A document that OpenSearch refused."""

    doc_id: str
    shard: int
    row: int
    status: int
    reason: str


class Journal:
    """The journal of one run in one index."""

    def __init__(self, folder: Path) -> None:
        self._journal = folder / "journal.jsonl"
        self.dead_path = folder / "dead.jsonl"

    def finished(self) -> dict[int, dict[str, Any]]:
        """The line of each finished shard; the last one counts."""
        return {int(line["shard"]): line for line in _lines(self._journal)}

    def dead(self) -> Iterator[DeadLetter]:
        """The dead letters of all shards."""
        for line in _lines(self.dead_path):
            yield DeadLetter(line["id"], line["shard"], line["row"], line["status"], line["reason"])

    def begin(self, shard: int) -> None:
        """Forget the dead letters of an earlier attempt at this shard."""
        self.dead_path.parent.mkdir(parents=True, exist_ok=True)
        lines = list(_lines(self.dead_path))
        kept = [line for line in lines if line["shard"] != shard]
        if len(kept) < len(lines):
            write_atomic(self.dead_path, _as_bytes(kept))

    def finish(self, shard: int, record: dict[str, Any], dead: Sequence[DeadLetter]) -> None:
        """Write a shard's dead letters, then its line: from here on it is loaded."""
        if dead:
            _append(
                self.dead_path,
                [
                    {"id": one.doc_id, "shard": one.shard, "row": one.row, "status": one.status, "reason": one.reason}
                    for one in dead
                ],
            )
        _append(self._journal, [{"shard": shard, **record}])


def open_journal(run_path: Path, cluster_uuid: str, index_uuid: str) -> Journal:
    """The journal of a run for one index; its folder is made with the first line."""
    return Journal(run_path / "load" / cluster_uuid / index_uuid)


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    """The complete lines of a file, none when it is missing."""
    if not path.exists():
        return
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                return
            try:
                yield json.loads(line)
            except ValueError as error:
                raise RunError(
                    f"{path}, line {number} is no JSON ({error}). Restore the file, or delete its folder to load "
                    "all shards again; documents keep their ids, so none is doubled."
                ) from error


def _as_bytes(lines: Sequence[dict[str, Any]]) -> bytes:
    return b"".join(json.dumps(line, ensure_ascii=False).encode() + b"\n" for line in lines)


def _append(path: Path, lines: Sequence[dict[str, Any]]) -> None:
    """Append lines and wait until the disk has them."""
    new = not path.exists()
    with path.open("ab+") as file:
        file.truncate(_complete_bytes(path))
        file.write(_as_bytes(lines))
        file.flush()
        os.fsync(file.fileno())
    if new:
        sync_folder(path.parent)


def _complete_bytes(path: Path) -> int:
    """The length of a file without a torn last line."""
    size = path.stat().st_size
    with path.open("rb") as file:
        end = size
        while end:
            start = max(0, end - 65536)
            file.seek(start)
            line_break = file.read(end - start).rfind(b"\n")
            if line_break >= 0:
                return start + line_break + 1
            end = start
    return 0
