"""What a load has done, as files that need no program to read.

RUN/load/CLUSTER_UUID/INDEX_UUID/journal.jsonl has one line per finished shard, dead.jsonl beside it one line per
document that OpenSearch refused. Dead letters are on disk before the line of their shard, those of a shard without
a line do not count, and a shard that is loaded again first loses its old ones, so the two never disagree. A line is
complete when it ends with a line break: what a killed process left behind it is ignored, and cut off before the next
line. dead.jsonl says how many documents are refused; the counts in the journal follow it. Neither file is ever held
in memory whole, but for one number per shard.

The journal of a run in a store (s3://...) is worked on in a copy on this machine, and put there whole with each
finished shard, the dead letters first: who looks sees what a killed process would have left on a disk.
Not covered: sending dead letters again (load.py).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from sparse_ingest.errors import RunError
from sparse_ingest.runs.run import Run
from sparse_ingest.storage.durable import sync_folder
from sparse_ingest.storage.places import Place, RemotePath
from sparse_ingest.storage.scratch import ScratchFolder

_FILES = ("dead.jsonl", "journal.jsonl")  # in the order in which they are put in a store


class DeadLetter(NamedTuple):
    """A document that OpenSearch refused."""

    doc_id: str
    shard: int
    row: int
    status: int
    reason: str


class Journal:
    """The journal of one run in one index."""

    def __init__(self, folder: Place) -> None:
        self.dead_path = folder / "dead.jsonl"
        self._copy = _Copy(folder) if isinstance(folder, RemotePath) else None
        local = self._copy.folder if self._copy else folder
        assert isinstance(local, Path)
        self._journal, self._dead = local / "journal.jsonl", local / "dead.jsonl"

    def finished(self) -> dict[int, dict[str, Any]]:
        """The line of each finished shard; the last one counts."""
        return {int(line["shard"]): line for line in _lines(self._journal)}

    def dead(self) -> Iterator[DeadLetter]:
        """The dead letters of the finished shards."""
        finished = self.finished().keys()
        for line in _lines(self._dead):
            if line["shard"] in finished:
                yield _letter(line)

    def dead_rows(self, shard: int) -> list[int]:
        """The source rows of a shard's dead letters."""
        return [line["row"] for line in _lines(self._dead) if line["shard"] == shard]

    def refused(self) -> dict[int, int]:
        """How many documents of each finished shard are dead letters; shards without any are left out."""
        counts = Counter(letter.shard for letter in self.dead())
        return dict(sorted(counts.items()))

    def begin(self, shards: Collection[int]) -> None:
        """Forget the dead letters of earlier attempts at these shards."""
        self._dead.parent.mkdir(parents=True, exist_ok=True)
        if any(line["shard"] in shards for line in _lines(self._dead)):
            self._replace_dead(shards, ())
            self._publish()

    def clear(self) -> None:
        """Forget all: another run was loaded into the index since, and may have replaced any document."""
        # Dead letters without the line of their shard do not count, so the lines go first.
        for path in (self._journal, self._dead):
            path.unlink(missing_ok=True)
            if path.parent.exists():
                sync_folder(path.parent)
            self._publish()

    def bury(self, letters: Iterable[DeadLetter]) -> None:
        """Add dead letters of a shard that is being loaded; they count once its line is there."""
        lines = [_line(letter) for letter in letters]
        if lines:
            _append(self._dead, lines)

    def finish(self, shard: int, record: dict[str, Any]) -> None:
        """Write a shard's line: from here on it is loaded."""
        _append(self._journal, [{"shard": shard, **record}])
        self._publish()

    def retried(self, shard: int, letters: Iterable[DeadLetter]) -> None:
        """A finished shard has these dead letters now; its line is written again with the new counts.

        The letters are written as they come; when their iterator fails, the old ones stay.
        """
        self._replace_dead({shard}, letters)
        self._publish()
        self.recount()

    def recount(self) -> None:
        """Write the line of each shard again whose counts a killed process left behind dead.jsonl."""
        refused = self.refused()
        for shard, line in self.finished().items():
            count = refused.get(shard, 0)
            if line.get("refused", 0) != count:
                _append(self._journal, [{**line, "acknowledged": line["rows"] - count, "refused": count}])
        self._publish()

    def _replace_dead(self, shards: Collection[int], letters: Iterable[DeadLetter]) -> None:
        """Replace the dead letters of some shards in one step, a line at a time."""
        others = (line for line in _lines(self._dead) if line["shard"] not in shards)
        handle, temporary = tempfile.mkstemp(prefix=".new-", dir=self._dead.parent)
        try:
            with os.fdopen(handle, "wb") as file:
                for line in others:
                    file.write(_as_bytes(line))
                for letter in letters:
                    file.write(_as_bytes(_line(letter)))
                file.flush()
                os.fsync(file.fileno())
            Path(temporary).chmod(0o644)
            Path(temporary).replace(self._dead)
        finally:
            Path(temporary).unlink(missing_ok=True)
        sync_folder(self._dead.parent)

    def _publish(self) -> None:
        if self._copy:
            self._copy.publish()


class _Copy:
    """A journal's files on this machine, the truth being those at an address. One process writes them: load's lock."""

    def __init__(self, place: RemotePath) -> None:
        self._place = place
        self._scratch = ScratchFolder()
        self.folder = self._scratch.path
        self._published: dict[str, str] = {}
        for name in _FILES:
            with contextlib.suppress(FileNotFoundError), (place / name).open() as file:
                with (self.folder / name).open("wb") as copy:
                    shutil.copyfileobj(file, copy)
            self._published[name] = self._state(name)

    def publish(self) -> None:
        """Make the address hold what the copy holds."""
        for name in _FILES:
            state = self._state(name)
            if state == self._published[name]:
                continue
            if state:
                (self._place / name).upload(self.folder / name)
            else:
                (self._place / name).unlink(missing_ok=True)
            self._published[name] = state

    def _state(self, name: str) -> str:
        path = self.folder / name
        if not path.exists():
            return ""
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()


def open_journal(loads: Place, cluster_uuid: str, index_uuid: str) -> Journal:
    """The journal of a run for one index; its folder is made with the first line."""
    return Journal(loads / cluster_uuid / index_uuid)


def loaded_shards(run: Run, journal: Journal) -> dict[int, dict[str, Any]]:
    """Return the journal line of each shard that the index holds as it is in the run now.

    Returns none if any shard was encoded again after it was loaded: a row that this shard lost may have replaced the
    document of another shard.
    """
    lines = journal.finished()
    current = {shard: (run.done(shard) or {}).get("sha256") for shard in run.done_shards()}
    if any(current.get(shard) != line.get("sha256") for shard, line in lines.items()):
        return {}
    return {shard: lines[shard] for shard in current if shard in lines}


def documents_of(line: Mapping[str, Any]) -> int:
    """Return how many documents a journal line counts: those sent, and those that the index had already."""
    return int(line["rows"]) + int(line.get("unchanged", 0))


def _line(letter: DeadLetter) -> dict[str, Any]:
    return {
        "id": letter.doc_id,
        "shard": letter.shard,
        "row": letter.row,
        "status": letter.status,
        "reason": letter.reason,
    }


def _letter(line: dict[str, Any]) -> DeadLetter:
    return DeadLetter(line["id"], line["shard"], line["row"], line["status"], line["reason"])


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    """The complete lines of a file, none when it is missing."""
    if not path.exists():
        return
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                return
            try:
                content = json.loads(line)
                content["shard"]
            except (ValueError, TypeError, KeyError) as error:
                raise RunError(
                    f"{path}, line {number} is no JSON of a shard ({error}). Restore the file, or delete its folder to "
                    "load all shards again; documents keep their ids, so none is doubled."
                ) from error
            yield content


def _as_bytes(line: dict[str, Any]) -> bytes:
    return json.dumps(line, ensure_ascii=False).encode() + b"\n"


def _append(path: Path, lines: Iterable[dict[str, Any]]) -> None:
    """Append lines and wait until the disk has them."""
    new = not path.exists()
    with path.open("ab+") as file:
        file.truncate(_complete_bytes(path))
        for line in lines:
            file.write(_as_bytes(line))
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
