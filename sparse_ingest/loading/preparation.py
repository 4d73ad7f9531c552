"""Prepare a load: check everything, refuse what cannot work, then create or stamp the index.

In: a run, the name of an index, the options. Out: a `LoadPlan`, which changes nothing, and the index to load into.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from sparse_ingest.cluster import claim, dialects, indexes, installed, mappings, preflight, seismic, updates
from sparse_ingest.cluster.client import Client
from sparse_ingest.cluster.journal import Journal, loaded_shards, open_journal
from sparse_ingest.cluster.stamps import NO_PRUNING, Stamp, continued_stamp
from sparse_ingest.cluster.token_map import MAX_KEYS
from sparse_ingest.errors import RunError, UsageError, counted
from sparse_ingest.loading.delivery import rules_of
from sparse_ingest.loading.differences import Since, refuse_unfinished_since
from sparse_ingest.loading.kept_types import KeptTypes
from sparse_ingest.loading.live_tokens import with_token_map
from sparse_ingest.loading.options import LoadOptions, WithheldOptions
from sparse_ingest.pipeline import QuerySettings, changed, in_words, query_settings
from sparse_ingest.pruning import count_emptied, prune
from sparse_ingest.reporting import Reporter
from sparse_ingest.runs.checking import checked_parts
from sparse_ingest.runs.run import Run
from sparse_ingest.runs.shards import ShardPart

_INSTEAD_OF_REPLACE = "load the run behind it (--alias NAME, without --index and --replace)"


class LoadPlan(NamedTuple):
    """The plan of a load: its index, and the changes to it.

    Attributes:
        there: the index to load into; None if it will be created.
        index_to_delete: the index that is deleted first.
        missing: the shards to send.
        stale: the journal of this run, if another run was loaded after it.
        update: documents are updated, not indexed.
        added: the mapping of the fields to add to an existing index.
        notes: messages about kept fields, method parameters and pruning.
        withheld: an alias that a new index must not have.
    """

    name: str
    there: indexes.Index | None
    index_to_delete: indexes.Index | None
    stamp: Stamp
    body: dict[str, Any]
    missing: list[int]
    stale: Journal | None = None
    update: bool = False
    added: Mapping[str, Any] = {}
    notes: Sequence[str] = ()
    withheld: str | None = None


def make_plan(
    client: Client,
    run: Run,
    name: str,
    stamp: Stamp,
    body: dict[str, Any],
    options: LoadOptions,
    since: Since | None,
    query: QuerySettings,
) -> LoadPlan:
    """Check everything, and change nothing. `query` has the [query] settings as given.

    Raises:
        RunError, UsageError, ClusterError: the load cannot work.
    """
    there, index_to_delete, stale = indexes.find_index(client, name), None, None
    kind, update = options.kind or "rank_features", options.update
    if there is not None and options.replace and _is_replaced(there, name, stamp.run_id, options.from_scratch):
        there, index_to_delete = None, there
    indexes.refuse_unreadable(there)
    missing = run.done_shards()
    if since:
        since.check(client, name, there)
    elif there is not None:
        refuse_unfinished_since(there, run)
    if there is not None:
        dialects.refuse_created(there.name, there.setting("version.created"))
    if update:
        there = updates.with_field(there, name, stamp.field, kind, client.dialect)
    if there is not None:
        indexes.refuse_other_field(there, stamp)
        indexes.refuse_required_routing(there)
        mappings.check_fits(there, stamp, kind)
        mappings.refuse_other_product(there, stamp.field, client.dialect)
        installed.refuse_encoding_final_pipeline(client, there, stamp.field)
        indexes.refuse_other_pruning(there, stamp)
        remembered = there.stamp.query if there.stamp else {}
        settings = query_settings(query, remembered, f"Index {there.name!r}: _meta.sparse_ingest.query")
        stamp = replace(continued_stamp(there.stamp, stamp), query=changed(settings))
        stamp = since.stamp(there, stamp) if since else stamp
        journal = open_journal(run, client.cluster_uuid, there.uuid)
        # Lines with another takeover are from before the index was loaded with another run.
        takeovers = {line.get("takeover") for line in journal.finished().values()}
        if there.stamp is None or there.stamp.run_id != stamp.run_id or takeovers - {there.stamp.takeover}:
            stale = journal
        loaded = {} if stale else loaded_shards(run, journal)
        _refuse_other_rules(journal, loaded, rules_of(stamp.pruning, update))
        missing = [shard for shard in missing if shard not in loaded]
    fields = KeptTypes(run, there, body, options)
    limits = preflight.IndexLimits(stamp.field, run.vocabulary(), kind, preflight.request_limit(client), fields.kept)
    pruned = _Pruned(run, missing, stamp.pruning)
    report = preflight.check_documents(pruned, limits)
    if kind == "sparse_vector":
        vectors, is_large = (part.vectors for part in pruned), len(run.vocabulary()) > MAX_KEYS
        stamp = with_token_map(client, there, stamp, report.token_ids, vectors, is_large=is_large)
    stamp, added, notes = fields.decided(stamp)
    notes += indexes.note_on_settings(there)
    notes += indexes.notes_on_routing(there, there.aliases) if there else []
    if there is None and kind == "sparse_vector":
        body, fitted = seismic.fit(body, stamp.field, report)
        notes += [*([fitted] if fitted else []), *seismic.advice(report.documents)]
    notes += pruned.notes()
    withheld = options.withheld if isinstance(options, WithheldOptions) else None
    return LoadPlan(name, there, index_to_delete, stamp, body, missing, stale, update, added, notes, withheld)


def _is_replaced(there: indexes.Index, name: str, run_id: str, from_scratch: bool) -> bool:
    """Return whether `--replace` deletes an index: unless it is an unfinished load of this run."""
    if there.name != name:
        raise UsageError(f"--replace deletes an index; {name!r} is an alias of {there.name!r}. Name the index itself.")
    unfinished = there.stamp is not None and (there.stamp.run_id, there.stamp.load) == (run_id, "loading")
    if unfinished and not from_scratch:
        return False
    indexes.refuse_serving(there, _INSTEAD_OF_REPLACE)
    return True


class _Pruned:
    """The parts of some shards as they are sent."""

    def __init__(self, run: Run, shards: list[int], pruning: Mapping[str, Any]) -> None:
        self._run, self._shards, self._pruning = run, shards, pruning
        self.emptied = 0

    def __iter__(self) -> Iterator[ShardPart]:
        for part in checked_parts(self._run, self._shards):
            vectors = prune(part.vectors, **self._pruning)
            self.emptied += count_emptied(part.vectors, vectors)
            yield part._replace(vectors=vectors)

    def notes(self) -> list[str]:
        """Return a note on the documents that lost their last term, after all parts were read."""
        note = f"Pruning leaves {counted(self.emptied, 'document')} without a term; no sparse query finds them."
        return [note] if self.emptied else []


def _refuse_other_rules(journal: Journal, loaded: Mapping[int, dict[str, Any]], rules: dict[str, Any]) -> None:
    """Raise `RunError` if a shard of this load was sent by other rules."""
    for shard, line in loaded.items():
        if (found := line.get("rules", {"pruning": NO_PRUNING})) != rules:
            raise RunError(
                f"Shard {shard} was loaded with {_in_words(found)}, this load has {_in_words(rules)} "
                f"({journal.dead_path.parent}). "
                "Pass the same options, or start over with --replace --from-scratch."
            )


def _in_words(rules: Mapping[str, Any]) -> str:
    return f"pruning {in_words(rules['pruning']) or 'none'}{' and --update' if rules.get('update') else ''}"


def ready_index(client: Client, plan: LoadPlan, reporter: Reporter) -> indexes.Index:
    """Create the index to load into, or stamp it with the run. Return it."""
    for note in plan.notes:
        reporter.note(note)
    if old := plan.index_to_delete:
        indexes.refuse_serving(indexes.check_uuid(client, old), _INSTEAD_OF_REPLACE)
        client.call("DELETE", old.path)
    if plan.there is None:
        # Index and alias in one request: each change of the cluster state takes a while.
        aliases = {**plan.body.get("aliases", {}), indexes.private_alias(plan.name, plan.stamp.run_id): {}}
        body = installed.carried_over(old, plan.body) if old else plan.body
        index = indexes.create_index(client, plan.name, {**body, "aliases": aliases})
        _undo_template(client, plan, index, reporter)
        if not updates.keeps_vectors(index, plan.stamp.field, client.dialect):
            reporter.note(updates.notice(index, plan.stamp.field, client.dialect))
        return index
    claim.refuse_other(indexes.check_uuid(client, plan.there), plan.there.stamp)
    if plan.stale:
        plan.stale.clear()
    if plan.update and updates.add_field(client, plan.there, plan.stamp.field):
        reporter.note(updates.notice(plan.there, plan.stamp.field, client.dialect))
    if plan.added:
        client.call("PUT", f"{plan.there.path}/_mapping", plan.added)
    before = plan.there.stamp
    changes = any(getattr(before, key, None) != getattr(plan.stamp, key) for key in ("run_id", "since", "query"))
    if plan.missing or plan.added or changes:
        indexes.stamp_index(client, plan.there, plan.stamp)
        return indexes.check_uuid(client, plan.there)
    return plan.there


def _undo_template(client: Client, plan: LoadPlan, index: indexes.Index, reporter: Reporter) -> None:
    """Undo what an index template gave to the new index: the alias of `publish`, and keys of another stamp.

    A template that was copied from the mapping of another index has the stamp of that one.
    """
    if plan.withheld in index.aliases:
        remove = {"remove": {"index": index.name, "alias": plan.withheld}}
        client.call("POST", "/_aliases", {"actions": [remove]})
        reporter.note(
            f"An index template gave index {index.name!r} the alias {plan.withheld!r}, so searches would find "
            "documents before they are verified. It was removed until then; remove it from the template too."
        )
    indexes.refuse_required_routing(index)
    if index.meta != plan.stamp.as_meta():
        indexes.update_stamp(client, index, lambda _: plan.stamp)
