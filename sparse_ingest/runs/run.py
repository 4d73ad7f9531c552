"""A run folder: manifest, vocabulary, locks, and the markers of finished shards.

Every file appears under its final name complete: temporary name, fsync, rename. The first process creates the manifest
with exclusive create, and it never changes. A shard is done when its file in done/ exists. A lock is an
`flock` on a file in locks/: the kernel releases it when its process dies, so a killed process leaves nothing behind.

A run can also be in a store (s3://bucket/prefix). Each file is written there in one request, locks are leases
(leases.py), and unfinished files are in a scratch folder of this machine. A run on the web (https://) must be complete,
since a web server lists no files. Where a run cannot be written, as on the web or in a folder that is read-only for
this process, the locks and journals of its loads are kept in the user's state folder.

Not covered: the content of shards (shards.py) and of load/ (cluster/journal.py).
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias, cast

from sparse_ingest.errors import RunError
from sparse_ingest.runs.leases import Leases, file_lock
from sparse_ingest.runs.manifest import FORMAT, Identity, Manifest, differences
from sparse_ingest.storage.durable import sync_folder, write_atomic
from sparse_ingest.storage.places import Place, RemotePath, place_of
from sparse_ingest.storage.scratch import ScratchFolder, user_folder


class SkippedRow(NamedTuple):
    """A source row that `--on-bad-document skip` skipped. `line` counts from 1 within `file`."""

    row: int
    file: str
    line: int
    reason: str


@dataclass(frozen=True)
class RunReport:
    """What a complete run holds, summed over its shards; `--json` prints these keys (`without_token` if above 0)."""

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
    without_token: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON has them."""
        return _without_zero(asdict(self))


class Run:
    """A run folder that has a manifest."""

    def __init__(self, path: Place, manifest: Manifest) -> None:
        self.path = path
        self.manifest = manifest
        self._vocabulary: list[str | None] | None = None

    def __repr__(self) -> str:
        state = f"{complete['rows']:,} rows" if (complete := self.complete()) else "not complete"
        return f"<{type(self).__name__} {self.path}: {state}, run_id {self.manifest.run_id[:8]}>"

    @cached_property
    def writable(self) -> bool:
        """Whether this process may write into the run; checked once."""
        if isinstance(self.path, RemotePath):
            return self.path.writable
        folders = (folder if (folder := self.path / name).exists() else self.path for name in ("load", "locks", "tmp"))
        return all(os.access(folder, os.W_OK | os.X_OK) for folder in folders)

    @property
    def loads(self) -> Place:
        """The folder of the journals of this run's loads."""
        return self._own_files / "load"

    @property
    def _own_files(self) -> Place:
        """The folder of locks and journals: the run, or the user's folder for a run that cannot be written."""
        return self.path if self.writable else user_folder() / "runs" / self.manifest.run_id

    @cached_property
    def _scratch(self) -> ScratchFolder:
        return ScratchFolder()

    @cached_property
    def _leases(self) -> Leases | None:
        """The locks of a run in a store."""
        return Leases(self.path / "locks") if isinstance(self.path, RemotePath) and self.path.writable else None

    def shard_path(self, shard: int) -> Place:
        """Return the final path of a shard."""
        return self.path / "shards" / f"{part_name(shard)}.parquet"

    def scratch_path(self, name: str) -> Path:
        """Return the path of a temporary file on this machine. Hold a lock while you write it."""
        if isinstance(self.path, RemotePath) or not self.writable:
            return self._scratch.path / name
        folder = self.path / "tmp"
        folder.mkdir(exist_ok=True)
        return folder / name

    def skipped_path(self, shard: int) -> Place:
        """Return the path of the list of rows that a shard skipped."""
        return self.path / "skipped" / f"{part_name(shard)}.jsonl"

    def write_skipped(self, shard: int, rows: Sequence[SkippedRow]) -> None:
        """Write the rows that a shard skipped. Without any, there is no file."""
        path = self.skipped_path(shard)
        if rows:
            write_atomic(path, "".join(json.dumps(row._asdict(), ensure_ascii=False) + "\n" for row in rows).encode())
        else:
            path.unlink(missing_ok=True)

    def skipped(self, shard: int) -> list[SkippedRow]:
        """Return the rows that a shard skipped."""
        path = self.skipped_path(shard)
        lines = path.read_bytes().decode().split("\n")[:-1] if path.exists() else []
        return [SkippedRow(**json.loads(line)) for line in lines]

    def has_vocabulary(self) -> bool:
        """Return False only if the process that created the run died between its first two files."""
        return (self.path / "vocab.json").exists()

    def vocabulary(self) -> list[str | None]:
        """Return the token string of each id, None where an id has no token. The file is read only once."""
        if self._vocabulary is None:
            self._vocabulary = cast(list[str | None], _read_json(self.path / "vocab.json"))
        return self._vocabulary

    def done(self, shard: int) -> dict[str, Any] | None:
        """Return the record of a finished shard, or None if the record or the shard is missing."""
        record: dict[str, Any] | None = _read_json(self.path / "done" / f"{part_name(shard)}.json", missing_ok=True)
        return record if record is not None and self.shard_path(shard).exists() else None

    def rows_of(self, shard: int) -> int:
        """Return how many documents a finished shard holds; 0 if it is not finished."""
        return int((self.done(shard) or {}).get("rows", 0))

    def has_documents(self) -> bool:
        """Return whether any finished shard holds a document."""
        return any(map(self.rows_of, self.done_shards()))

    def done_shards(self) -> list[int]:
        """Return the numbers of the finished shards, ascending."""
        if isinstance(self.path, RemotePath) and not self.path.listable:
            complete = self.complete()
            if complete is None:
                raise RunError(
                    f"{self.path} is not complete, and a web server does not say which shards are there. Copy the run "
                    "to a folder, or wait until it is complete."
                )
            return list(range(complete["shards"]))
        names = (path.name for path in (self.path / "done").glob("part-*.json"))
        return sorted(int(name.removeprefix("part-").removesuffix(".json")) for name in names)

    def totals(self) -> dict[str, int]:
        """Return the number of finished shards, and the sums of the counts in their records."""
        records = self._records()
        counts = "rows nnz empty truncated skipped underflow windows reused deduplicated without_token".split()
        # Earlier releases did not count the last ones.
        sums = {name: sum(record.get(name, 0) for record in records) for name in counts}
        return _without_zero({"shards": len(records), **sums})

    def rows_done(self) -> int:
        """Source rows of the finished shards, those that were skipped included."""
        return sum(record["next"][-1] - record["first_row"] for record in self._records())

    def _records(self) -> list[dict[str, Any]]:
        return [record for shard in self.done_shards() if (record := self.done(shard))]

    def refuse_lost(self) -> None:
        """Stop if another process has acquired a lock that this one held; see leases.py.

        Raises:
            RunError: a lock was lost.
        """
        if self._leases:
            self._leases.refuse_lost()

    def mark_done(self, shard: int, record: dict[str, Any]) -> None:
        """Mark a shard as finished. Its file, and the one in skipped/, must exist."""
        self.refuse_lost()
        # In a store the first record stays: a process that has just lost its lock may have made other bytes.
        exclusive = isinstance(self.path, RemotePath)
        write_json(self.path / "done" / f"{part_name(shard)}.json", record, exclusive=exclusive)

    def unmark_done(self, shard: int) -> None:
        """Mark a shard as unfinished, before it is replaced."""
        (self.path / "done" / f"{part_name(shard)}.json").unlink(missing_ok=True)
        sync_folder(self.path / "done")

    def complete(self) -> dict[str, Any] | None:
        """Return the content of complete.json, or None while shards are missing."""
        return cast(dict[str, Any] | None, _read_json(self.path / "complete.json", missing_ok=True))

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
        """Mark the run as complete."""
        self.refuse_lost()
        write_json(self.path / "complete.json", record)

    def sweep(self) -> None:
        """Remove unfinished files of killed processes. Every shard must be done, so that no process writes one."""
        if isinstance(self.path, RemotePath):
            # A process that died after it wrote to done/ left its lock.
            for lock in (self.path / "locks").glob("part-*.lock"):
                lock.unlink(missing_ok=True)
            return
        for folder in (self.path, self.path / "done", self.path / "skipped"):
            for path in folder.glob(".new-*"):
                path.unlink(missing_ok=True)

    def unmark_complete(self) -> None:
        """Mark the run as incomplete, before a lost shard is encoded again."""
        (self.path / "complete.json").unlink(missing_ok=True)

    @contextlib.contextmanager
    def lock(self, name: str) -> Iterator[bool]:
        """Hold the lock `name` for the block. Yield False if another process holds it."""
        if self._leases:
            held = self._leases.take(name)
            try:
                yield held
            finally:
                if held:
                    self._leases.release(name)
            return
        with file_lock(Path(str(self._own_files)) / "locks" / f"{name}.lock") as held:
            yield held


def _without_zero(counts: dict[str, Any]) -> dict[str, Any]:
    """Drop `without_token` if it is 0: few runs have it, and files of earlier releases lack it."""
    return {name: count for name, count in counts.items() if count or name != "without_token"}


def part_name(shard: int) -> str:
    """Return the stem of a shard's files, such as `part-00000`."""
    return f"part-{shard:05d}"


def has_manifest(path: Place) -> bool:
    """Return whether this folder contains a run, finished or not."""
    return (path / "manifest.json").exists()


# A run, or where it is: a folder, or an address as s3://bucket/prefix.
RunLike: TypeAlias = Run | Place | str


def open_run(run: RunLike) -> Run:
    """Open an existing run folder.

    Raises:
        RunError: there is no manifest, it is damaged, or its format is not the one this release reads.
    """
    if isinstance(run, Run):
        return run
    path = place_of(run)
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


def is_begun(run: RunLike) -> bool:
    """Return whether a run has its manifest and vocabulary, so that other processes can work on it."""
    return isinstance(run, Run) or (has_manifest(place_of(run)) and open_run(run).has_vocabulary())


def begun_run(path: Place) -> Run | None:
    """Open the run at a path, or return None if one can be created there.

    Raises:
        RunError: as `open_run` and `refuse_strangers`.
    """
    refuse_strangers(path)
    return open_run(path) if has_manifest(path) else None


def create_or_open_run(path: Place, manifest: Manifest, vocabulary: Sequence[str | None]) -> Run:
    """Create a run folder, or open an existing one with the same identity.

    Raises:
        RunError: the folder contains a run of another identity (each difference is named), or other files.
    """
    if begun_run(path) is None:
        path.mkdir(parents=True, exist_ok=True)
        write_json(path / "manifest.json", asdict(manifest), exclusive=True)
    run = open_run(path)
    refuse_differences(run, manifest.identity)
    for folder in ("shards", "done", "skipped"):
        (path / folder).mkdir(exist_ok=True)
    if not (path / "vocab.json").exists():
        write_json(path / "vocab.json", list(vocabulary))
    return run


def refuse_strangers(path: Place) -> None:
    """Refuse a path that cannot become a run.

    Raises:
        RunError: it is a file, a web address, or a folder with other files and no manifest.
    """
    if isinstance(path, RemotePath) and not path.writable:
        raise RunError(f"{path} is a web address, which is for reading. Give --out a folder, or an s3:// address.")
    for place in (path, *path.parents) if isinstance(path, Path) else (path,):
        if place.exists() and not place.is_dir():
            raise RunError(f"{place} is a file; a run is a folder. Give --out an empty or new folder.")
    if isinstance(path, RemotePath) or path.is_dir():
        # Listed first: another process writes the manifest before everything else.
        strangers = sorted(entry.name for entry in path.iterdir() if not entry.name.startswith(".new-"))
        if strangers and not has_manifest(path):
            raise RunError(
                f"{path} is not empty and holds no run (found {strangers[0]}). Give --out an empty or new folder."
            )


def refuse_differences(run: Run, identity: Identity) -> None:
    """Refuse to continue a run with other settings.

    Raises:
        RunError: names both values of each setting that differs.
    """
    found = differences(run.manifest.identity, identity)
    if found:
        lines = "".join(f"\n  {d.setting}: the run has {d.stored!r}, asked is {d.asked!r}" for d in found)
        raise RunError(
            f"{run.path} was begun with other settings and cannot be continued with these:{lines}\n"
            "Use the settings of the run, or another --out folder."
        )


def refuse_incomplete(run: Run, *, partial: bool = False) -> None:
    """Refuse a run without complete.json, or with fewer shards than complete.json counts.

    Args:
        partial: accept a run without complete.json.

    Raises:
        RunError: the run is not complete, or has lost shards since it was.
    """
    complete, shards = run.complete(), len(run.done_shards())
    if complete is None and not partial:
        raise RunError(
            f"{run.path} is not complete: {shards} shards are finished, complete.json is missing. "
            "Finish it with the same `sparse-ingest encode` command, or load what is there with --partial."
        )
    if complete is not None and complete.get("shards", shards) != shards:
        raise RunError(
            f"{run.path} has lost shards: {shards} are in done/, complete.json says {complete['shards']}. Copy the run "
            "anew, or delete complete.json and finish it with the same `sparse-ingest encode` command."
        )


def write_json(path: Place, value: object, *, exclusive: bool = False) -> None:
    """Write JSON with `write_atomic`; bytes of a path that are not UTF-8 are escaped, as `\\udcff`."""
    text = json.dumps(value, ensure_ascii=False, indent=None if isinstance(value, list) else 1)
    write_atomic(path, text.encode(errors="backslashreplace") + b"\n", exclusive=exclusive)


def _read_json(path: Place, *, missing_ok: bool = False) -> Any:
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        if missing_ok and isinstance(error, FileNotFoundError):
            return None
        raise RunError(f"{path} cannot be read: {error}. Restore it, or encode into a new folder.") from error
