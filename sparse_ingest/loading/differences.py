"""Load only the differences to the run that an index holds: `--since OLD_RUN`, `--delete-missing`.

In: the two runs, the index. Out: the documents that differ (runs/changes.py), the ids to delete, and the stamp of the
index. The index must hold the older run completely: its `_meta` names that run as loaded, and the journal has a
line for every shard as it is now. After a kill, the same command continues: the stamp names the older run until all is
done, and sending or deleting a document again changes nothing.

Not covered: documents that other clients wrote. Documents of the older run that they deleted are not sent again
(`verify` reports them).
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
    """A load of the differences between `old`, which the index holds, and `new`.

    `update` is true if documents are updated, not indexed. `refused` are documents of `old` that the index refused.
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
        """Refuse an index that does not hold the older run, and read which of its documents were refused.

        Raises:
            UsageError, RunError, ClusterError: names what was found, and what the index must hold.
        """
        refuse_incomplete(self.old)
        whole = f"load {self.new.path} whole, without --since"
        if self.old.manifest.run_id == self.new.manifest.run_id:
            raise UsageError(
                f"--since names the run that is to be loaded. Name the one that the index holds, or {whole}."
            )
        if self.delete_missing and self.new.complete() is None:
            raise RunError(
                f"{self.new.path} is not complete: --delete-missing would delete documents that it still lacks. "
                "Finish it with the same `sparse-ingest encode` command first."
            )
        if there is None:
            raise ClusterError(
                f"There is no index {name!r}; --since changes one that holds {self.old.path}. Or {whole}."
            )
        held = there.stamp is not None and (there.stamp.run_id, there.stamp.load) == (self.old.manifest.run_id, "done")
        if not self._begun(there) and not held:
            raise ClusterError(
                f"Index {there.name!r} does not hold {self.old.path} (run {self.old.manifest.run_id[:8]}) as fully "
                f"loaded: its _meta names {_named(there.stamp)}. Finish that load, or {whole}."
            )
        if self._delete_missing_before(there) and not self.delete_missing:
            refuse_unfinished_since(there, self.new)
        self._read_journal(open_journal(self.old, client.cluster_uuid, there.uuid), there, whole)

    def stamp(self, there: Index, stamp: Stamp) -> Stamp:
        """Return the stamp for the time when differences are sent."""
        delete_missing = self.delete_missing or self._delete_missing_before(there)
        return replace(stamp, since={"run_id": self.old.manifest.run_id, "delete_missing": delete_missing})

    def deletes(self, there: Index) -> bool:
        """Return whether documents may be left to delete, by the stamp."""
        stamp = there.stamp
        finished = stamp is not None and stamp.load == "done" and self.old.manifest.run_id not in stamp.runs
        return self.delete_missing and not (finished and self._delete_missing_before(there))

    def deleted(self, stamp: Stamp) -> Stamp:
        """Return the stamp for an index in which no document of the older run alone is left."""
        old, new = self.old.manifest.run_id, self.new.manifest.run_id
        created_by = new if stamp.created_by == old else stamp.created_by
        return replace(stamp, created_by=created_by, runs=tuple(run for run in stamp.runs if run != old))

    def _begun(self, there: Index) -> dict[str, Any] | None:
        """Return what the stamp says of an earlier start of this load, finished or not; None if there was none."""
        since = there.stamp.since if there.stamp and there.stamp.run_id == self.new.manifest.run_id else None
        return since if since and since.get("run_id") == self.old.manifest.run_id else None

    def _delete_missing_before(self, there: Index) -> bool:
        """Return whether an earlier start of this load had `--delete-missing`."""
        return bool((self._begun(there) or {}).get("delete_missing"))

    def _read_journal(self, journal: Journal, there: Index, whole: str) -> None:
        lines, shards = loaded_shards(self.old, journal), self.old.done_shards()
        if len(lines) < len(shards):
            raise RunError(
                f"{self.old.path} has no whole journal of its load into index {there.name!r} ({len(lines)} of "
                f"{len(shards)} shards are in {journal.dead_path.parent}), so what the index holds of it is not known. "
                f"Name the folder that it was loaded from, or {whole}."
            )
        if any(bool(line.get("rules", {}).get("update")) != self.update for line in lines.values()):
            raise RunError(
                f"{self.old.path} was loaded {'without' if self.update else 'with'} --update, this load is asked for "
                f"{'with' if self.update else 'without'}. Give the same option, or {whole}."
            )
        self.refused = frozenset(letter.doc_id for letter in journal.dead())


def refuse_unfinished_since(there: Index, run: Run) -> None:
    """Refuse to finish a `--since` load without `--since`: its deletes would be skipped.

    Raises:
        ClusterError: the load of this run into the index was started with --since and is not finished.
    """
    stamp = there.stamp
    if stamp and stamp.run_id == run.manifest.run_id and stamp.load == "loading" and stamp.since:
        options = "--since OLD_RUN" + (" --delete-missing" if stamp.since.get("delete_missing") else "")
        raise ClusterError(
            f"The load of {run.path} into index {there.name!r} was begun with {options} (run "
            f"{str(stamp.since.get('run_id'))[:8]}) and is not finished. Start it again with these options, or begin "
            "anew with --replace --from-scratch."
        )


def _named(stamp: Stamp | None) -> str:
    if stamp is None:
        return "no run"
    return f"run {stamp.run_id[:8]}" + ("" if stamp.load == "done" else ", whose load is not finished")
