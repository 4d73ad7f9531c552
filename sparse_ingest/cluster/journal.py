"""The journal of a load: JSON Lines files that show which shards an index has, and which documents it refused.

In RUN/load/CLUSTER_UUID/INDEX_UUID/: journal.jsonl with one line per finished shard, dead.jsonl with one line per
refused document (dead letter), merged.json with the last operation of each shard of the index that the last complete
merge covered, settings.json with the old values of index settings until they are restored.

The files never disagree. Dead letters are on disk before the line of their shard; without that line they do not
count, and are deleted before the shard is loaded again. Where counts in journal.jsonl differ, dead.jsonl is right,
and the next load corrects them. A torn last line is ignored, and cut off before the next line is written. Files are
read line by line; memory holds one number per shard.

The journal of a run in a store (s3://...) is edited as a local copy. After each finished shard the changed files are
uploaded, dead letters first, so the store always has what a killed process would have left on a disk.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import mmap
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, NotRequired, TypedDict

from sparse_ingest.cluster.stamps import CHANGED_BY_LOADS, is_changed_by_loads
from sparse_ingest.errors import RunError, first_line
from sparse_ingest.records import Refusal, place_text
from sparse_ingest.runs.manifest import Count
from sparse_ingest.runs.run import Run
from sparse_ingest.storage.durable import atomic_file, naming, open_own, sync_folder, write_atomic
from sparse_ingest.storage.foreign_json import MAX_BYTES, checked, parse_json, read_json
from sparse_ingest.storage.places import Place, RemotePath
from sparse_ingest.storage.scratch import ScratchFolder

_FILES = ("settings.json", "dead.jsonl", "journal.jsonl", "merged.json")  # in order of upload


class _Rules(TypedDict):
    """How a load sent documents."""

    pruning: dict[str, Any]
    update: NotRequired[bool]


class _JournalLine(TypedDict):
    """The keys of a line of journal.jsonl that are read."""

    shard: Count
    rows: Count
    refused: NotRequired[Count]
    unchanged: NotRequired[Count]
    sha256: NotRequired[str | None]
    rules: NotRequired[_Rules]


class _Letter(TypedDict):
    """A line of dead.jsonl."""

    id: str
    shard: Count
    row: Count
    status: int
    reason: str


class Journal:
    """The journal of one run in one index."""

    def __init__(self, folder: Place) -> None:
        self.dead_path = folder / "dead.jsonl"
        self._copy = _Copy(folder) if isinstance(folder, RemotePath) else None
        local = self._copy.folder if self._copy else folder
        assert isinstance(local, Path)
        self._settings, self._dead, self._journal, self._merged = (local / name for name in _FILES)

    def finished(self) -> dict[int, dict[str, Any]]:
        """Return the last line of each finished shard."""
        return {line["shard"]: line for line in _lines(self._journal, _JournalLine)}

    def dead(self) -> Iterator[Refusal]:
        """Yield the dead letters of the finished shards."""
        finished = self.finished().keys()
        for line in _lines(self._dead, _Letter):
            if line["shard"] in finished:
                yield Refusal(*(line[key] for key in _Letter.__annotations__))

    def dead_rows(self, shard: int) -> list[int]:
        """Return the source rows of a shard's dead letters."""
        return [line["row"] for line in _lines(self._dead, _Letter) if line["shard"] == shard]

    def refused(self) -> dict[int, int]:
        """Return the number of dead letters of each finished shard that has any."""
        return Counter(letter.shard for letter in self.dead())

    def merged(self) -> dict[str, int] | None:
        """Return the last state of `record_merged`, or None. An unreadable file only costs one more merge."""
        with contextlib.suppress(FileNotFoundError, ValueError):
            return read_json(self._merged, dict[str, int])
        return None

    def record_merged(self, state: Mapping[str, int]) -> None:
        """Store the last operation of each shard that a complete merge covered."""
        self._write(self._merged, state)

    def settings(self) -> dict[str, dict[str, str | None]]:
        """Return the last state of `keep_settings`, or raise `RunError` if the file has other content."""
        try:
            kept = read_json(self._settings, dict[str, dict[str, str | None]])
            if foreign := {name: entry for name, entry in kept.items() if not is_changed_by_loads(name, entry)}:
                raise ValueError(f"loads do not change {foreign}")
        except FileNotFoundError:
            return {}
        except ValueError as error:
            raise RunError(
                f"{self._settings} does not contain index settings ({error}). Restore the file, or delete it and check "
                f"{', '.join(CHANGED_BY_LOADS)} of the index yourself."
            ) from error
        return kept

    def keep_settings(self, kept: Mapping[str, Mapping[str, str | None]]) -> None:
        """Store the settings that the load changes, in the form of `Stamp.settings`; delete the file if none."""
        if kept:
            self._write(self._settings, kept)
        elif self._settings.exists():
            self._remove(self._settings)

    def begin(self, shards: Collection[int]) -> None:
        """Delete the dead letters of earlier attempts at these shards."""
        self._dead.parent.mkdir(parents=True, exist_ok=True)
        if any(line["shard"] in shards for line in _lines(self._dead, _Letter)):
            self._replace_dead(shards, ())
            self._publish()

    def clear(self) -> None:
        """Delete journal.jsonl and dead.jsonl: a later load of another run may have replaced any document."""
        # Dead letters without the line of their shard do not count, so the lines go first.
        self._remove(self._journal)
        self._remove(self._dead)

    def record_dead(self, letters: Iterable[Refusal]) -> None:
        """Add dead letters of a shard that is being loaded. They count after `finish`."""
        if lines := list(map(_line, letters)):
            _append(self._dead, lines)

    def finish(self, shard: int, record: dict[str, Any]) -> None:
        """Write the line of a shard, which marks it as loaded."""
        _append(self._journal, [{"shard": shard, **record}])
        self._publish()

    def retried(self, shard: int, letters: Iterable[Refusal]) -> None:
        """Replace the dead letters of a finished shard, and write its line again. If the iterator fails, both stay."""
        self._replace_dead({shard}, letters)
        self._publish()
        self.recount()

    def recount(self) -> None:
        """Write the line of each shard again whose counts differ from dead.jsonl, as after a kill."""
        refused = self.refused()
        for shard, line in self.finished().items():
            count = refused.get(shard, 0)
            if line.get("refused", 0) != count:
                _append(self._journal, [{**line, "acknowledged": line["rows"] - count, "refused": count}])
        self._publish()

    def _replace_dead(self, shards: Collection[int], letters: Iterable[Refusal]) -> None:
        """Replace the dead letters of some shards atomically, one line at a time."""
        kept = (line for line in _lines(self._dead, _Letter) if line["shard"] not in shards)
        with atomic_file(self._dead) as file:
            file.writelines(map(_as_bytes, chain(kept, map(_line, letters))))

    def _write(self, path: Path, value: object) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, json.dumps(value).encode())
        self._publish(path.name)

    def _remove(self, path: Path) -> None:
        path.unlink(missing_ok=True)
        if path.parent.exists():
            sync_folder(path.parent)
        self._publish(path.name)

    def _publish(self, *names: str) -> None:
        if self._copy:
            self._copy.publish(names or _FILES)


class _Copy:
    """A local copy of the files at an address, written by the process that has locked the load."""

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

    def publish(self, names: Iterable[str]) -> None:
        """Upload each of these files that has changed, or delete it at the address."""
        for name in names:
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


def open_journal(run: Run, cluster_uuid: str, index_uuid: str) -> Journal:
    """Return the journal of a run for one index. The folder is created with the first line.

    The journal of a run folder that became read-only is copied to the user's folder and continued there, or only read
    if that cannot be written either.
    """
    folder, inside = (loads / cluster_uuid / index_uuid for loads in (run.loads, run.path / "load"))
    if not isinstance(inside, Path) or not isinstance(folder, Path) or folder.exists() or not inside.exists():
        return Journal(folder)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent.parent.parent) as temporary:
            copy = Path(shutil.copytree(inside, Path(temporary) / "journal"))
            with contextlib.suppress(OSError):  # another process has copied it
                copy.rename(folder)
    except OSError:
        return Journal(inside)
    return Journal(folder)


def journals(run: Run) -> dict[tuple[str, str], Journal]:
    """Return the journals of a run, by the UUIDs of cluster and index."""
    folders: list[Place] = []
    for loads in dict.fromkeys((run.path / "load", run.loads)):  # the journal in the second place is newer
        if isinstance(loads, Path):
            folders += sorted(loads.glob("*/*/"))
        elif loads.listable:
            folders += [folder for cluster in loads.iterdir() for folder in cluster.iterdir()]
    return {(folder.parent.name, folder.name): Journal(folder) for folder in folders}


def loaded_shards(run: Run, journal: Journal) -> dict[int, dict[str, Any]]:
    """Return the journal line of each shard that the index has as it is in the run.

    If any shard was encoded again after it was loaded, return none: a row that it lost may have replaced the document
    of another shard.
    """
    lines = journal.finished()
    current = {shard: (run.done(shard) or {}).get("sha256") for shard in run.done_shards()}
    if any(current.get(shard) != line.get("sha256") for shard, line in lines.items()):
        return {}
    return {shard: lines[shard] for shard in current if shard in lines}


def documents_of(line: Mapping[str, Any]) -> int:
    """Return the number of documents of a journal line: those sent, and those that the index had before."""
    return int(line["rows"]) + int(line.get("unchanged", 0))


def _line(letter: Refusal) -> dict[str, Any]:
    return dict(zip(_Letter.__annotations__, letter, strict=True))


def _lines(path: Path, kind: type[Any]) -> Iterator[dict[str, Any]]:
    """Yield the complete lines of a file; none if there is no file."""
    if not path.exists():
        return
    if not path.is_file():
        raise RunError(f"{path} is not a regular file. Delete it to load all shards again.")
    with path.open("rb") as file:
        for number, line in enumerate(iter(partial(file.readline, MAX_BYTES + 1), b""), start=1):
            if not line.endswith(b"\n") and len(line) <= MAX_BYTES:
                return
            try:
                content: dict[str, Any] = parse_json(line)
                checked(content, kind)
            except ValueError as error:
                raise RunError(
                    f"{place_text(path, number)}: not a valid line of a journal ({first_line(error)}). Restore the "
                    "file, or delete its folder to load all shards again; documents keep their ids, so none is "
                    "duplicated."
                ) from error
            yield content


def _as_bytes(line: dict[str, Any]) -> bytes:
    # Servers may cut a message between the halves of a surrogate pair.
    return json.dumps(line, ensure_ascii=False).encode(errors="backslashreplace") + b"\n"


def _append(path: Path, lines: Iterable[dict[str, Any]]) -> None:
    """Append lines and flush them to disk."""
    new = not path.exists()
    with naming(path), os.fdopen(open_own(path, os.O_RDWR | os.O_APPEND), "ab+") as file:
        file.truncate(_complete_bytes(path))
        for line in lines:
            file.write(_as_bytes(line))
        file.flush()
        os.fsync(file.fileno())
    if new:
        sync_folder(path.parent)


def _complete_bytes(path: Path) -> int:
    """Return the length of a file without a torn last line."""
    if not path.stat().st_size:
        return 0
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return content.rfind(b"\n") + 1
