"""The manifest of a run: its identity, the hash of that, and the differences between two identities.

In: every setting that changes a number, as a JSON object. Out: `run_id`, and named differences for the message that
refuses to resume.

Not covered: what is recorded but never compared (versions, devices, paths, times); done/ has that.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

FORMAT = 1
SHARD_ROWS = 65536
Identity = dict[str, Any]


@dataclass(frozen=True)
class Manifest:
    """The content of manifest.json.

    `model` names the checkpoint as the user gave it, and the values its settings resolved to, so that a search can use
    the same one. `auto` records what each `auto` chose and why. Neither is part of the identity.
    """

    format: int
    run_id: str
    identity: Identity
    shard_rows: int
    model: dict[str, Any]
    auto: dict[str, Any]


class Difference(NamedTuple):
    """A setting in which two identities differ. None: the identity lacks the setting."""

    setting: str
    stored: object
    asked: object


@dataclass(frozen=True)
class RunReport:
    """What a complete run holds, summed over its shards; `--json` prints these keys."""

    run: str
    run_id: str
    shards: int
    rows: int
    terms: int
    empty: int
    truncated: int
    skipped: int
    underflow: int
    windows: int = 0
    reused: int = 0
    deduplicated: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON has them."""
        return asdict(self)


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

    def rows_done(self) -> int:
        """Source rows of the finished shards, those that were skipped included."""
        records = (record for shard in self.done_shards() if (record := self.done(shard)))
        return sum(record["next"][-1] - record["first_row"] for record in records)

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

    @property
    def report(self) -> RunReport:
        """What the run holds.

        Raises:
            RunError: it is not complete.
        """
        complete = self.complete()
        if complete is None:
            raise RunError(f"{self.path} is not complete. Finish it with the same `sparse-ingest encode` command.")
        counted = {key: value for key, value in complete.items() if key in RunReport.__dataclass_fields__}
        return RunReport(str(self.path), self.manifest.run_id, **counted)

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


def run_id(identity: Identity) -> str:
    """Return the SHA-256 of the canonical JSON, in hexadecimal."""
    return hashlib.sha256(canonical_json(identity).encode()).hexdigest()


def identity_of(content: dict[str, Any]) -> tuple[str, Identity]:
    """Add the format to an identity. Return its hash, and the identity as it will be read back from JSON."""
    identity: Identity = json.loads(canonical_json({"format": FORMAT, **content}))
    return run_id(identity), identity


def differences(stored: Identity, asked: Identity) -> list[Difference]:
    """Return the settings in which two identities differ, by dotted name, sorted by name."""
    before, after = dict(_flatten(stored)), dict(_flatten(asked))
    names = sorted(before.keys() | after.keys())
    return [
        Difference(name, before.get(name), after.get(name)) for name in names if before.get(name) != after.get(name)
    ]


def _flatten(value: object, prefix: str = "") -> Iterator[tuple[str, object]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _flatten(inner, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, value
