"""A run folder: its manifest, vocabulary, locks and markers of what is done.

Every file appears under its final name complete: temporary name, fsync, rename. The manifest is created exclusively
by the first process and never changed; a shard is done when its file in done/ is there. A lock is an `flock` on a
file in locks/: the kernel releases it when its process dies, so a killed process leaves nothing to clean up.

A run may lie in a store (s3://bucket/prefix) too: each file is put there in one request, locks are leases (leases.py),
and what is being made lies in a folder of this machine. On the web (https://) a run is for reading: it must be
complete, since nothing tells which files are there, and journals of its loads are kept in this user's state folder.
Not covered: the shards themselves (shards.py) and what the loader keeps under load/.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, cast

from sparse_ingest.errors import RunError
from sparse_ingest.runs.leases import Leases
from sparse_ingest.runs.manifest import FORMAT, Identity, Manifest, differences
from sparse_ingest.storage.durable import sync_folder, write_atomic
from sparse_ingest.storage.places import Place, RemotePath
from sparse_ingest.storage.scratch import ScratchFolder, state_folder


class SkippedRow(NamedTuple):
    """A source row that `--on-bad-document skip` left out; `line` counts from 1 within `file`."""

    row: int
    file: str
    line: int
    reason: str


class Run:
    """A run folder that has a manifest."""

    def __init__(self, path: Place, manifest: Manifest) -> None:
        self.path = path
        self.manifest = manifest
        self._vocabulary: list[str | None] | None = None

    @property
    def loads(self) -> Place:
        """The folder of what loads of this run have done."""
        if isinstance(self.path, RemotePath) and not self.path.writable:
            return self._state / "load"
        return self.path / "load"

    def load_folders(self) -> Sequence[Place]:
        """The folders of the journals of its loads, one for each index."""
        loads = self.loads
        if isinstance(loads, Path):
            return sorted(loads.glob("*/*/"))
        return [folder for cluster in loads.iterdir() for folder in cluster.iterdir()]

    @property
    def _state(self) -> Path:
        """What is kept on this machine of a run that cannot be written."""
        return state_folder() / "runs" / self.manifest.run_id

    @cached_property
    def _scratch(self) -> ScratchFolder:
        return ScratchFolder()

    @cached_property
    def _leases(self) -> Leases | None:
        """The locks of a run in a store."""
        return Leases(self.path / "locks") if isinstance(self.path, RemotePath) and self.path.writable else None

    def shard_path(self, shard: int) -> Place:
        """Where a shard lies under its final name."""
        return self.path / "shards" / f"{part_name(shard)}.parquet"

    def scratch_path(self, name: str) -> Path:
        """Where a file of this machine is made before it gets its final name; its maker holds a lock."""
        if isinstance(self.path, RemotePath):
            return self._scratch.path / name
        folder = self.path / "tmp"
        folder.mkdir(exist_ok=True)
        return folder / name

    def skipped_path(self, shard: int) -> Place:
        """Where the rows that a shard left out are named."""
        return self.path / "skipped" / f"{part_name(shard)}.jsonl"

    def write_skipped(self, shard: int, rows: Sequence[SkippedRow]) -> None:
        """Name the rows that a shard leaves out; nothing lies there when it leaves out none."""
        path = self.skipped_path(shard)
        if rows:
            write_atomic(path, "".join(json.dumps(row._asdict(), ensure_ascii=False) + "\n" for row in rows).encode())
        else:
            path.unlink(missing_ok=True)

    def skipped(self, shard: int) -> list[SkippedRow]:
        """The rows that a shard left out."""
        path = self.skipped_path(shard)
        lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.exists() else []
        return [SkippedRow(**json.loads(line)) for line in lines]

    def has_vocabulary(self) -> bool:
        """False only for a run whose maker died between its first two files."""
        return (self.path / "vocab.json").exists()

    def vocabulary(self) -> list[str | None]:
        """The token string of each id; None where an id has no token. Read once: the file never changes."""
        if self._vocabulary is None:
            self._vocabulary = cast(list[str | None], _read_json(self.path / "vocab.json"))
        return self._vocabulary

    def done(self, shard: int) -> dict[str, Any] | None:
        """The record of a finished shard, or None; without its file a shard is not finished."""
        record = _read_if_there(self.path / "done" / f"{part_name(shard)}.json")
        return record if record is not None and self.shard_path(shard).exists() else None

    def done_shards(self) -> list[int]:
        """The numbers of the finished shards, ascending."""
        if isinstance(self.path, RemotePath) and not self.path.listable:
            complete = self.complete()
            if complete is None:
                raise RunError(
                    f"{self.path} is not complete, and a web server does not say which shards are there. Copy the run "
                    "to a folder, or wait until it is complete."
                )
            return list(range(complete["shards"]))
        return sorted(int(path.stem.removeprefix("part-")) for path in (self.path / "done").glob("part-*.json"))

    def totals(self) -> dict[str, int]:
        """The number of finished shards, and what their records count, summed."""
        records = [record for shard in self.done_shards() if (record := self.done(shard))]
        counts = ("rows", "nnz", "empty", "truncated", "skipped", "underflow", "windows", "reused", "deduplicated")
        # Earlier releases did not count the last three.
        return {"shards": len(records), **{name: sum(record.get(name, 0) for record in records) for name in counts}}

    def refuse_lost(self) -> None:
        """Refuse to go on under a lock that another process has taken over; see leases.py.

        Raises:
            RunError: it is not ours any more.
        """
        if self._leases:
            self._leases.refuse_lost()

    def mark_done(self, shard: int, record: dict[str, Any]) -> None:
        """Declare a shard finished; its file and skipped/ must be in place."""
        self.refuse_lost()
        # In a store the first one stays: that of a process which has lost its lock right now may be of other bytes.
        exclusive = isinstance(self.path, RemotePath)
        write_json(self.path / "done" / f"{part_name(shard)}.json", record, exclusive=exclusive)

    def unmark_done(self, shard: int) -> None:
        """Declare a shard unfinished again, before it is replaced."""
        (self.path / "done" / f"{part_name(shard)}.json").unlink(missing_ok=True)
        sync_folder(self.path / "done")

    def complete(self) -> dict[str, Any] | None:
        """The content of complete.json, or None while shards are missing."""
        return _read_if_there(self.path / "complete.json")

    def mark_complete(self, record: dict[str, Any]) -> None:
        """Declare the run finished."""
        self.refuse_lost()
        write_json(self.path / "complete.json", record)

    def sweep(self) -> None:
        """Remove unfinished files that killed processes left; every shard must be done, so that nobody writes any."""
        if isinstance(self.path, RemotePath):
            # Of shards whose maker died with its file in done/ written.
            for lock in (self.path / "locks").glob("part-*.lock"):
                lock.unlink(missing_ok=True)
            return
        for folder in (self.path, self.path / "done", self.path / "skipped"):
            for path in folder.glob(".new-*"):
                path.unlink(missing_ok=True)

    def unmark_complete(self) -> None:
        """Declare the run unfinished again, before a shard that it lost is made."""
        (self.path / "complete.json").unlink(missing_ok=True)

    @contextlib.contextmanager
    def lock(self, name: str) -> Iterator[bool]:
        """Hold the lock `name` for the block if no other process does; yields whether it is held."""
        if self._leases:
            held = self._leases.take(name)
            try:
                yield held
            finally:
                if held:
                    self._leases.release(name)
            return
        folder = (self._state if isinstance(self.path, RemotePath) else self.path) / "locks"
        folder.mkdir(exist_ok=True, parents=isinstance(self.path, RemotePath))
        with (folder / f"{name}.lock").open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
                return
            yield True


def part_name(shard: int) -> str:
    """`part-00000`, the name that a shard's files share."""
    return f"part-{shard:05d}"


def has_manifest(path: Place) -> bool:
    """Whether a run was begun in this folder."""
    return (path / "manifest.json").exists()


def open_run(path: Place) -> Run:
    """Open an existing run folder.

    Raises:
        RunError: there is no manifest, it is damaged, or its format is newer than this release.
    """
    manifest = path / "manifest.json"
    if not has_manifest(path):
        raise RunError(f"{path} is no run folder: it has no manifest.json. Make one with `sparse-ingest encode --out`.")
    content = _read_json(manifest)
    if not isinstance(content, dict) or not content.keys() >= {"format", "run_id", "identity", "shard_rows"}:
        raise RunError(f"{manifest} is not the manifest of a run; it lacks format, run_id, identity or shard_rows.")
    if content["format"] != FORMAT:
        raise RunError(
            f"{path} has run format {content['format']}; this release reads format {FORMAT}. "
            "Use the release that made it, or a newer one."
        )
    return Run(path, Manifest(**{key: content.get(key, {}) for key in Manifest.__dataclass_fields__}))


def create_or_open_run(path: Place, manifest: Manifest, vocabulary: Sequence[str | None]) -> Run:
    """Create a run folder, or open the one that is there when its identity is the same.

    Raises:
        RunError: the folder holds a run of another identity (each difference is named), or something else.
    """
    refuse_strangers(path)
    path.mkdir(parents=True, exist_ok=True)
    if not has_manifest(path):
        write_json(path / "manifest.json", asdict(manifest), exclusive=True)
    run = open_run(path)
    refuse_differences(run, manifest.identity)
    for folder in ("shards", "done", "skipped"):
        (path / folder).mkdir(exist_ok=True)
    if not (path / "vocab.json").exists():
        write_json(path / "vocab.json", list(vocabulary))
    return run


def refuse_strangers(path: Place) -> None:
    """Refuse a place where something else than a run lies.

    Raises:
        RunError: it is a file, or a folder that is not empty and has no manifest.
    """
    if isinstance(path, RemotePath):
        if not path.writable:
            raise RunError(f"{path} is a web address, which is for reading. Give --out a folder, or an s3:// address.")
        if path.is_file():
            raise RunError(f"{path} is a file; a run is a folder. Give --out an empty or new folder.")
    for place in (path, *path.parents) if isinstance(path, Path) else ():
        if place.exists() and not place.is_dir():
            raise RunError(f"{place} is a file; a run is a folder. Give --out an empty or new folder.")
    if (isinstance(path, RemotePath) or path.is_dir()) and not has_manifest(path):
        strangers = sorted(entry.name for entry in path.iterdir() if not entry.name.startswith(".new-"))
        if strangers:
            raise RunError(
                f"{path} is not empty and holds no run (found {strangers[0]}). Give --out an empty or new folder."
            )


def refuse_differences(run: Run, identity: Identity) -> None:
    """Refuse to go on with a run that was begun with other settings.

    Raises:
        RunError: with both values of each setting that differs.
    """
    found = differences(run.manifest.identity, identity)
    if found:
        lines = "".join(f"\n  {d.setting}: the run has {d.stored!r}, asked is {d.asked!r}" for d in found)
        raise RunError(
            f"{run.path} was begun with other settings and cannot be continued with these:{lines}\n"
            "Use the settings of the run, or another --out folder."
        )


def write_json(path: Place, value: object, *, exclusive: bool = False) -> None:
    """Write JSON so that `path` is never seen half written; see `write_atomic`."""
    text = json.dumps(value, ensure_ascii=False, indent=None if isinstance(value, list) else 1)
    write_atomic(path, text.encode() + b"\n", exclusive=exclusive)


def _read_if_there(path: Place) -> dict[str, Any] | None:
    return cast(dict[str, Any] | None, _read_json(path, missing_ok=True))


def _read_json(path: Place, *, missing_ok: bool = False) -> Any:
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        if missing_ok and isinstance(error, FileNotFoundError):
            return None
        raise RunError(f"{path} cannot be read: {error}. Restore it, or encode into a new folder.") from error
