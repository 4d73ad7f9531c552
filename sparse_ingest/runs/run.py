"""A run folder: manifest, vocabulary, locks, and the markers of finished shards.

Files are written atomically. The manifest is created exclusively and never changes. A shard is done when its record in
done/ exists. In a store (s3://bucket/prefix) each file is one request, locks are leases (leases.py), and unfinished
files are in a scratch folder of this machine. A run on the web (https://) must be complete, since a web server lists no
files. The locks and journals of a run that this process cannot write are in the user's state folder.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeAlias

from sparse_ingest.errors import RunError, first_line
from sparse_ingest.reporting import SILENT, Reporter
from sparse_ingest.runs.files import (
    CompleteRecord,
    DoneRecord,
    RunReport,
    SkippedRow,
    has_manifest,
    json_bytes,
    part_name,
    read_record,
    reading,
    refuse_other_content,
    sha256_of,
    totals_of,
    write_json,
)
from sparse_ingest.runs.leases import Leases, file_lock
from sparse_ingest.runs.manifest import FORMAT, Identity, Manifest, differences
from sparse_ingest.storage.durable import add_whole, remove_folder, sync_folder, write_atomic
from sparse_ingest.storage.foreign_json import checked, parse_json, read_bytes
from sparse_ingest.storage.places import Place, RemotePath, place_of
from sparse_ingest.storage.scratch import ScratchFolder, user_folder

_MAX_SKIPPED_BYTES = 1 << 30  # a shard of 65,536 rows has about 13 MB if all are skipped


class Run:
    """A run folder that has a manifest."""

    def __init__(self, path: Place, manifest: Manifest) -> None:
        self.path = path
        self.manifest = manifest
        self._vocabulary: list[str | None] | None = None
        self._noted = False

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

    def _record_path(self, shard: int) -> Place:
        return self.path / "done" / f"{part_name(shard)}.json"

    def scratch_path(self, name: str) -> Path:
        """Return the path of a temporary file on this machine. Hold a lock while you write it."""
        if isinstance(self.path, RemotePath) or not self.writable:
            return self._scratch.path / name
        folder = self.path / "tmp"
        folder.mkdir(exist_ok=True)
        return folder / name

    def spool_path(self, shard: int) -> Place:
        """Return the folder of the finished windows of an unfinished shard (encoding/spool.py)."""
        return self.path / "tmp" / part_name(shard)

    def skipped_path(self, shard: int) -> Place:
        """Return the path of the list of rows that a shard skipped."""
        return self.path / "skipped" / f"{part_name(shard)}.jsonl"

    def write_skipped(self, shard: int, rows: Sequence[SkippedRow]) -> None:
        """Write the rows that a shard skipped; no file if it skipped none."""
        path = self.skipped_path(shard)
        if rows:
            write_atomic(path, "".join(json.dumps(row._asdict(), ensure_ascii=False) + "\n" for row in rows).encode())
        else:
            path.unlink(missing_ok=True)

    def skipped(self, shard: int) -> list[SkippedRow]:
        """Return the rows that a shard skipped."""
        path = self.skipped_path(shard)
        with reading(path):
            lines = read_bytes(path, _MAX_SKIPPED_BYTES).split(b"\n")[:-1] if path.exists() else []
            records = (checked(parse_json(line), dict[str, Any]) for line in lines)
            return [checked(list(map(record.get, SkippedRow._fields)), SkippedRow) for record in records]

    def has_vocabulary(self) -> bool:
        """Return whether vocab.json exists; it does not if the process that created the run died before it."""
        return (self.path / "vocab.json").exists()

    def vocabulary(self) -> list[str | None]:
        """Return the token string of each id, None for an id without a token. Raise `RunError` if the hash differs."""
        if self._vocabulary is None:
            path, expected = self.path / "vocab.json", self.manifest.vocabulary_sha256
            with reading(path):
                content = read_bytes(path)
                if expected and (found := hashlib.sha256(content).hexdigest()) != expected:
                    raise ValueError(f"it has SHA-256 {found[:12]}, manifest.json has {expected[:12]}")
                self._vocabulary = checked(parse_json(content), list[str | None])
        return self._vocabulary

    def unchecked_vocabulary(self) -> str | None:
        """Return a note for a run of an earlier release, whose vocab.json has no hash; at the first call only."""
        noted, self._noted = self._noted, True
        if noted or self.manifest.vocabulary_sha256:
            return None
        return f"{self.path} was written by an earlier release without a hash of vocab.json: changes are not detected."

    def done(self, shard: int) -> dict[str, Any] | None:
        """Return the record of a finished shard, or None if the record or the shard is missing; see `read_record`."""
        record = read_record(path := self._record_path(shard), DoneRecord)
        if record is None or not self.shard_path(shard).exists():
            return None
        # Earlier releases recorded neither the run nor the hash of vocab.json.
        unnamed = "an earlier release" if self.manifest.vocabulary_sha256 and record else self.manifest.run_id
        if (found := record.get("run_id", unnamed)) != self.manifest.run_id:
            raise RunError(
                f"{path} belongs to run {found[:18]}, expected run {self.manifest.run_id[:18]}. Copy the run again, or "
                "delete that file and complete.json, and finish the run with the same `sparse-ingest encode` command."
            )
        return record

    def rows_of(self, shard: int) -> int:
        """Return the number of documents of a finished shard; 0 if it is not finished."""
        return int((self.done(shard) or {}).get("rows", 0))

    def has_documents(self) -> bool:
        """Return whether any finished shard has a document."""
        return any(map(self.rows_of, self.done_shards()))

    def done_shards(self) -> list[int]:
        """Return the numbers of the finished shards, ascending."""
        if isinstance(self.path, RemotePath) and not self.path.listable:
            complete = self.complete()
            if complete is None:
                raise RunError(
                    f"{self.path} is not complete, and a web server does not list its shards. Copy the run to a "
                    "folder, or wait until it is complete."
                )
            return list(range(complete["shards"]))
        paths = {path.name: path for path in (self.path / "done").glob("part-*.json")}
        shards = {f"{part_name(int(n))}.json": int(n) for name in paths if (n := name[5:-5]).isdecimal()}
        for stray in paths.keys() - shards.keys():
            raise RunError(f"{paths[stray]} is not named like a shard's record, part-00000.json. Delete or move it.")
        return sorted(shards.values())

    def groups(self, shards: int, rows: int) -> list[range]:
        """Divide the first `shards` shards into groups of about `rows` rows, at least one shard each."""
        step = max(1, rows // self.manifest.shard_rows)
        return [range(first, min(first + step, shards)) for first in range(0, shards, step)]

    def totals(self) -> dict[str, int]:
        """Return the number of finished shards, and the sums of the counts in their records."""
        return totals_of(self._records())

    def _records(self) -> list[dict[str, Any]]:
        return [record for shard in self.done_shards() if (record := self.done(shard))]

    def refuse_lost(self) -> None:
        """Raise `RunError` if another process has acquired a lock that this one held; see leases.py."""
        if self._leases:
            self._leases.refuse_lost()

    def add_shard(self, shard: int, scratch: Path, sha256: str) -> bool:
        """Move a new shard to its final name. Return False if another process has finished it, whose file stays."""
        record = self._record_path(shard)
        if record.exists() and not self.shard_path(shard).exists():  # the shard was lost after it was done
            record.unlink(missing_ok=True)

        def kept() -> bool:
            self.refuse_lost()
            return record.exists()

        self.refuse_lost()
        return add_whole(scratch, self.shard_path(shard), sha256, kept)

    def mark_done(self, shard: int, record: dict[str, Any], *, exclusive: bool = False) -> None:
        """Mark a shard as finished; with `exclusive` an existing record is kept.

        Its file, and the one in skipped/, must exist.
        """
        self.refuse_lost()
        content = {**record, "run_id": self.manifest.run_id}
        write_json(self._record_path(shard), content, exclusive=exclusive)

    def unmark_done(self, shard: int) -> None:
        """Mark a shard as unfinished, before it is replaced."""
        self._record_path(shard).unlink(missing_ok=True)
        sync_folder(self.path / "done")

    def complete(self) -> dict[str, Any] | None:
        """Return the content of complete.json, or None while shards are missing."""
        return read_record(self.path / "complete.json", CompleteRecord)

    @property
    def report(self) -> RunReport:
        """The counts of the run. Raises `RunError` if it is not complete."""
        complete = self.complete()
        if complete is None:
            raise RunError(f"{self.path} is not complete. Finish it with the same `sparse-ingest encode` command.")
        counted = {key: complete.get(key, 0) for key in RunReport.__dataclass_fields__ if key not in ("run", "run_id")}
        return RunReport(str(self.path), self.manifest.run_id, **counted)

    def mark_complete(self, record: dict[str, Any], records: Iterable[Mapping[str, Any]] | None = None) -> None:
        """Mark the run as complete; `records` are those in done/ if they were read already."""
        self.refuse_lost()
        sha256 = sha256_of(self._records() if records is None else records)
        write_json(self.path / "complete.json", {**record, "shards_sha256": sha256})

    def need_done(self, shard: int) -> dict[str, Any]:
        """Return the record of a finished shard. Raise `RunError` if the shard, its hash or its rows are missing."""
        path, record = self.shard_path(shard), self.done(shard)
        if record is None:
            raise RunError(f"{path} is missing, but has a record in done/. Delete that record and encode again.")
        if not {"sha256", "rows"} <= record.keys():
            raise RunError(f"{self._record_path(shard)} has no sha256 or rows. Delete that file and encode again.")
        return record

    def refuse_mixed(self) -> None:
        """Raise `RunError` if complete.json does not match the records in done/: shards are lost or of another run."""
        if (complete := self.complete()) is None:
            return
        records = [self.need_done(shard) for shard in self.done_shards()]
        found = {"terms" if name == "nnz" else name: count for name, count in totals_of(records).items()}
        for name, here in {**found, "shards_sha256": sha256_of(records)}.items():
            if (expected := complete.get(name, here)) != here:
                what = "lost shards" if name == "shards" else "mixed files"
                raise RunError(
                    f"{self.path} has {what}: {name} is {expected} in complete.json, and {here} by the records in "
                    "done/. Copy the run again, or delete complete.json and finish it with the same `sparse-ingest "
                    "encode` command."
                )

    def sweep(self) -> None:
        """Remove unfinished files of killed processes. Every shard must be done, so that no process writes one."""
        if (tmp := self.path / "tmp").exists():
            for left in tmp.glob("part-*"):
                if left.is_dir():
                    remove_folder(left)
                else:
                    left.unlink(missing_ok=True)
        if isinstance(self.path, RemotePath):
            return
        for folder in (self.path, self.path / "shards", self.path / "done", self.path / "skipped"):
            for path in folder.glob(".new-*"):
                path.unlink(missing_ok=True)

    def unmark_complete(self) -> None:
        """Mark the run as incomplete, before a lost shard is encoded again."""
        (self.path / "complete.json").unlink(missing_ok=True)

    @contextlib.contextmanager
    def lock(self, name: str, reporter: Reporter = SILENT) -> Iterator[bool]:
        """Hold the lock `name` for the block. Yield False if another process holds it.

        The lock of a process that died on another machine is acquired after up to a minute.
        """
        if self._leases:
            held = self._leases.take(name) or self._leases.wait(name, reporter)
            try:
                yield held
            finally:
                if held:
                    self._leases.release(name)
            return
        with file_lock(Path(str(self._own_files)) / "locks" / f"{name}.lock") as held:
            yield held


# A run, its folder, or its address such as s3://bucket/prefix.
RunLike: TypeAlias = Run | Place | str


def open_run(run: RunLike) -> Run:
    """Open an existing run folder.

    Raises:
        RunError: the manifest is missing or damaged, or has a format that this release does not read.
    """
    if isinstance(run, Run):
        return run
    path = place_of(run)
    manifest = path / "manifest.json"
    if not has_manifest(path):
        lacks = "it has no manifest.json" if path.exists() else "there is no such folder"
        raise RunError(f"{path} is not a run: {lacks}. Check the name, or create it with `sparse-ingest encode --out`.")
    with reading(manifest):
        content = parse_json(read_bytes(manifest))
        if isinstance(content, dict) and isinstance(found := content.get("format"), int) and found != FORMAT:
            raise RunError(
                f"{manifest} has run format {found}; this release reads format {FORMAT}. "
                "Use the release that created it, or a newer one."
            )
        try:
            return Run(path, checked(content, Manifest))
        except ValueError as error:
            advice = "Copy the run again, or encode into a new folder."
            raise RunError(f"{manifest} is not the manifest of a run: {first_line(error)}. {advice}") from error


def existing_run(path: Place) -> Run | None:
    """Open the run at a path, or return None if one can be created there; see `open_run` and `refuse_other_content`."""
    refuse_other_content(path)
    return open_run(path) if has_manifest(path) else None


def create_or_open_run(path: Place, manifest: Manifest, vocabulary: Sequence[str | None]) -> Run:
    """Create a run folder, or open an existing one with the same identity.

    Raise `RunError` if the folder contains a run of another identity (each difference is named), or other files.
    """
    if existing_run(path) is None:
        path.mkdir(parents=True, exist_ok=True)
        manifest = replace(manifest, vocabulary_sha256=hashlib.sha256(json_bytes(list(vocabulary))).hexdigest())
        write_json(path / "manifest.json", asdict(manifest), exclusive=True)
    run = open_run(path)
    refuse_differences(run, manifest.identity)
    for folder in ("shards", "done", "skipped"):
        (path / folder).mkdir(exist_ok=True)
    if not (path / "vocab.json").exists():
        write_json(path / "vocab.json", list(vocabulary))
    return run


def refuse_differences(run: Run, identity: Identity) -> None:
    """Raise `RunError` with both values of each setting in which a run differs from an identity."""
    found = differences(run.manifest.identity, identity)
    if found:
        lines = "".join(f"\n  {one.in_words('the run')}" for one in found)
        raise RunError(
            f"{run.path} was started with other settings and cannot be continued with these:{lines}\n"
            "Use the settings of the run, or another --out folder."
        )


def refuse_incomplete(run: Run, *, partial: bool = False) -> None:
    """Raise `RunError` if a run is not complete, unless `partial`, or its complete.json does not match its shards."""
    if run.complete() is None and not partial:
        raise RunError(
            f"{run.path} is not complete: {len(run.done_shards())} shards are finished, complete.json is missing. "
            "Finish it with the same `sparse-ingest encode` command, or load the finished shards with --partial."
        )
    run.refuse_mixed()
