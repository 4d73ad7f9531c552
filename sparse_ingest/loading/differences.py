"""Load only the differences to the run that an index was loaded from: `--since OLD_RUN`, `--delete-missing`.

In: the two runs, the index. Out: the documents that differ (runs/changes.py), the ids to delete, and the stamp of the
index. The index must have the complete older run: its `_meta` names that run as loaded, and the journal has a line for
every shard. After a kill, the same command continues: the stamp names the older run until all is done, and sending or
deleting a document again changes nothing.

Documents of the older run that other clients deleted are not sent again (`verify` reports them).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from sparse_ingest.cluster.client import Client
from sparse_ingest.cluster.indexes import Index
from sparse_ingest.cluster.journal import Journal, loaded_shards, open_journal
from sparse_ingest.cluster.stamps import Stamp
from sparse_ingest.errors import ClusterError, RunError, UsageError
from sparse_ingest.runs.changes import Changes
from sparse_ingest.runs.run import Run, refuse_incomplete


@dataclass
class Since:
    """A load of the differences between `old`, from which the index was loaded, and `new`.

    `update`: documents are updated, not indexed. `refused` has ids of `old` that the index refused.
    """

    old: Run
    new: Run
    delete_missing: bool
    update: bool = False
    refused: frozenset[str] = frozenset()

    @cached_property
    def changes(self) -> Changes:
        """The differences. Both runs are read on first use."""
        return Changes(self.old, self.new, self.new.scratch_path("changes").parent, refused=self.refused)

    def check(self, client: Client, name: str, there: Index | None) -> None:
        """Refuse an index that was not loaded from the older run, and read which of its documents were refused."""
        refuse_incomplete(self.old)
        complete = f"load all of {self.new.path}, without --since"
        if self.old.manifest.run_id == self.new.manifest.run_id:
            raise UsageError(f"--since names the run to load. Name the older run, or {complete}.")
        if self.delete_missing and self.new.complete() is None:
            raise RunError(
                f"{self.new.path} is not complete: --delete-missing would delete documents that it does not have yet. "
                "Finish it with the same `sparse-ingest encode` command first."
            )
        if there is None:
            raise ClusterError(
                f"Index {name!r} does not exist, but --since needs one that was loaded from {self.old.path}. Name it, "
                f"or {complete}."
            )
        held = there.stamp is not None and (there.stamp.run_id, there.stamp.load) == (self.old.manifest.run_id, "done")
        if not self._started(there) and not held:
            raise ClusterError(
                f"Index {there.name!r} was not loaded from {self.old.path} (run {self.old.manifest.run_id[:8]}): "
                f"its _meta names {_named(there.stamp)}. Finish that load, or {complete}."
            )
        if self._delete_missing_before(there) and not self.delete_missing:
            refuse_unfinished_since(there, self.new)
        self._read_journal(open_journal(self.old, client.cluster_uuid, there.uuid), there, complete)

    def stamp(self, there: Index, stamp: Stamp) -> Stamp:
        """Return the stamp while differences are sent."""
        delete_missing = self.delete_missing or self._delete_missing_before(there)
        return replace(stamp, since={"run_id": self.old.manifest.run_id, "delete_missing": delete_missing})

    def deletes(self, there: Index) -> bool:
        """Return whether the stamp shows that documents may still have to be deleted."""
        stamp = there.stamp
        finished = stamp is not None and stamp.load == "done" and self.old.manifest.run_id not in stamp.runs
        return self.delete_missing and not (finished and self._delete_missing_before(there))

    def deleted(self, stamp: Stamp) -> Stamp:
        """Return the stamp after the documents that only the older run has are deleted."""
        old, new = self.old.manifest.run_id, self.new.manifest.run_id
        created_by = new if stamp.created_by == old else stamp.created_by
        return replace(stamp, created_by=created_by, runs=tuple(run for run in stamp.runs if run != old))

    def _started(self, there: Index) -> dict[str, Any] | None:
        """Return `since` of the stamp if this load was started before, finished or not."""
        since = there.stamp.since if there.stamp and there.stamp.run_id == self.new.manifest.run_id else None
        return since if since and since.get("run_id") == self.old.manifest.run_id else None

    def _delete_missing_before(self, there: Index) -> bool:
        return bool((self._started(there) or {}).get("delete_missing"))

    def _read_journal(self, journal: Journal, there: Index, complete: str) -> None:
        lines, shards = loaded_shards(self.old, journal), self.old.done_shards()
        if len(lines) < len(shards):
            raise RunError(
                f"The journal of the load of {self.old.path} into index {there.name!r} is incomplete ({len(lines)} of "
                f"{len(shards)} shards are in {journal.dead_path.parent}), so the content of the index is unknown. "
                f"Name the folder that it was loaded from, or {complete}."
            )
        if any(bool(line.get("rules", {}).get("update")) != self.update for line in lines.values()):
            raise RunError(
                f"{self.old.path} was loaded {'without' if self.update else 'with'} --update, this load is "
                f"{'with' if self.update else 'without'}. Pass the same option, or {complete}."
            )
        self.refused = frozenset(letter.doc_id for letter in journal.dead())


def refuse_unfinished_since(there: Index, run: Run) -> None:
    """Raise `ClusterError` if an unfinished load of the run had `--since`: its deletes would be skipped."""
    stamp = there.stamp
    if stamp and stamp.run_id == run.manifest.run_id and stamp.load == "loading" and stamp.since:
        options = "--since OLD_RUN" + (" --delete-missing" if stamp.since.get("delete_missing") else "")
        raise ClusterError(
            f"The load of {run.path} into index {there.name!r} was started with {options} (run "
            f"{str(stamp.since.get('run_id'))[:8]}) and is not finished. Start it again with these options, or start "
            "over with --replace --from-scratch."
        )


def _named(stamp: Stamp | None) -> str:
    if stamp is None:
        return "no run"
    return f"run {stamp.run_id[:8]}" + ("" if stamp.load == "done" else ", whose load is not finished")
