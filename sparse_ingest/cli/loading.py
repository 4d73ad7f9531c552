"""The commands `load` and `verify`."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import click

from sparse_ingest.cli.completion import RUN
from sparse_ingest.cli.help import command
from sparse_ingest.cli.options import (
    NO_MODEL,
    connection_options,
    json_option,
    pipeline_options,
    print_report,
    print_result,
    refuse_flags,
    stage_options,
)
from sparse_ingest.cli.progress import TerminalReporter
from sparse_ingest.errors import counted, shown
from sparse_ingest.loading.options import PublishOptions
from sparse_ingest.reporting import shortened, size_text
from sparse_ingest.storage.places import Place, place_of
from sparse_ingest.verification.options import SAMPLE, VerifyOptions

if TYPE_CHECKING:
    from sparse_ingest.cluster.connection import Connection
    from sparse_ingest.loading.load import LoadReport
    from sparse_ingest.loading.publish import PublishReport
    from sparse_ingest.pipeline import Pipeline
    from sparse_ingest.verification.verify import VerifyReport

_OF_LOADS = {*PublishOptions.__dataclass_fields__, "file", "assignments"} - {"allow_fewer"}


@command()
@click.argument("run", type=RUN, required=False)
@click.option("--index", help="Index to load into, created if it does not exist")
@click.option("--alias", help="Load into a new index ALIAS-<run id>, verify it, then point this alias to it")
@click.option("--to", help="With --alias: point it to this index without loading (RUN is not read)")
@click.option(
    "--restore", is_flag=True, help="Restore index settings that a killed load changed (with RUN: from its journal too)"
)
@pipeline_options("index load query", *NO_MODEL)
@stage_options(PublishOptions, "worker_gpus", "accelerator")
@connection_options
@json_option
def load(
    run: Place | None, pipeline: Pipeline, options: PublishOptions, connection: Connection, as_json: bool, **target: Any
) -> int:
    """Load a run folder into an index; rerun the command to continue.

    \b
    load RUN --index NAME                     into an index
    load RUN --alias NAME                     into a new index behind the alias
    load --alias NAME --to INDEX              move the alias, without loading
    load [RUN] --index NAME --restore         restore settings of a killed load
    load RUN --index NAME --since OLD_RUN     only changes since OLD_RUN
    load RUN --index NAME --update            add vectors to existing documents
    load RUN --index NAME --pipeline FILE     with a file that `plan --out` wrote

    Options override [index] and [load] of a pipeline file; the index remembers [query].

    --update needs all other fields in the index's _source. If _source excludes the vector (fixed when the index is
    created), a client that changes the document with _update removes its vector.

    Exit code 3: finished, but the cluster refused documents, listed in dead.jsonl next to the journal.
    """
    index, alias, to, restore = (target[name] for name in ("index", "alias", "to", "restore"))
    _refuse_conflicts(index, alias, to, restore, options)
    from sparse_ingest.loading.load import load as load_run
    from sparse_ingest.loading.load import restore_settings
    from sparse_ingest.loading.publish import publish, roll_back

    if to:
        with TerminalReporter() as reporter:
            before = roll_back(alias, to, allow_fewer=options.allow_fewer, connection=connection, progress=reporter)
        line = f"Alias {alias!r} serves {to!r}; before: {before or 'nothing'}."
        print_report(as_json, {"alias": alias, "serves": to, "previous": before}, [line])
        return 0
    if restore:
        with TerminalReporter() as reporter:
            restored = restore_settings(index, run=run, connection=connection, progress=reporter)
        line = f"Index {index!r}: {'restored ' + ', '.join(restored) if restored else 'nothing to restore'}."
        print_report(as_json, {"index": index, "restored": restored}, [line])
        return 0
    if run is None:
        raise click.UsageError("Missing argument 'RUN'.")
    how: dict[str, Any] = {"connection": connection, "pipeline": pipeline, "options": options}
    with TerminalReporter(stops_after="shard") as reporter:
        if alias:
            published = publish(run, alias=alias, progress=reporter, **how)
        else:
            report = load_run(run, index=index, progress=reporter, **how)
    if alias:
        return _print_loaded(published.load, published.to_dict(), _served(published, options.drop_old), as_json)
    return _print_loaded(report, report.to_dict(), (), as_json)


def _refuse_conflicts(
    index: str | None, alias: str | None, to: str | None, restore: bool, options: PublishOptions
) -> None:
    if (index is None) == (alias is None):
        raise click.UsageError("Give either --index or --alias.")
    if not alias and (to or options.drop_old or options.allow_fewer):
        raise click.UsageError("--to, --drop-old and --allow-fewer need --alias.")
    if restore and not index:
        raise click.UsageError("--restore needs --index.")
    if to and options.drop_old:
        raise click.UsageError("--to deletes nothing: omit --drop-old.")
    if to or restore:
        refuse_flags(_OF_LOADS, "has no effect with --to or --restore, which load no run")


def _print_loaded(report: LoadReport, content: object, also: Iterable[str], as_json: bool) -> int:
    """Print what a load did, and return its exit code."""
    lines = [
        f"{report.acknowledged:,} of {report.documents:,} documents are in index {report.index!r} "
        f"({report.loaded_shards:,} of {report.shards:,} shards loaded by this command, {report.seconds:.1f} s)."
    ]
    if report.merged_from_bytes is not None and report.merged_to_bytes is not None:
        one = "One segment per shard" if report.merged else "Not merged completely"
        lines.append(
            f"{one}: {size_text(report.merged_from_bytes)} before the merge, {size_text(report.merged_to_bytes)} after."
        )
    if report.unchanged:
        lines.append(f"{report.unchanged:,} of them are the same as in the older run and were not sent.")
    if report.deleted:
        lines.append(f"{report.deleted:,} documents that are only in the older run were deleted.")
    if report.retried:
        lines.append(f"{report.retried:,} refused documents were sent again.")
    print_result(as_json, content, (*lines, *also))
    if report.dead and not as_json:
        with place_of(report.dead).open("rb") as letters:
            first = json.loads(letters.readline())
        why = _printable(shortened(first["reason"].rstrip("."), 300))
        click.echo(
            f"The cluster refused {counted(report.refused, 'document')}, such as {shown(first['id'])}: {why}. All are "
            f"listed in {report.dead}. Fix the cause, then rerun with --retry-dead.",
            err=True,
        )
    return 3 if report.refused else 0


def _served(report: PublishReport, drop_old: bool) -> Iterator[str]:
    if report.serves == report.load.index:
        yield f"Alias {report.alias!r} serves {report.serves!r}{' now' if report.moved else ' already'}."
    if report.dropped:
        yield f"Index {report.dropped!r} was deleted."
    if report.previous:
        yield (
            f"The previous index {report.previous!r} is kept{'' if drop_old else '; --drop-old deletes it'}. "
            f"To go back: sparse-ingest load --alias {report.alias} --to {report.previous}"
        )


@command()
@click.argument("run", type=RUN)
@click.option("--index", required=True, help="Index to compare with")
@click.option(
    "--sample", metavar="N", type=click.IntRange(min=1), default=SAMPLE, show_default=True, help="Vectors to compare"
)
@click.option("--all", "all_documents", is_flag=True, help="Compare every vector")
@stage_options(VerifyOptions, "worker_gpus", "accelerator")
@connection_options
@json_option
def verify(
    run: Place, index: str, options: VerifyOptions, connection: Connection, as_json: bool, **compared: Any
) -> int:
    """Compare an index with the run folder that was loaded into it, bit for bit.

    Compares all ids, and the weights of a sample or of --all documents. Documents that are not in the run are a
    difference only if no other client wrote to the index.
    Exit code 1: documents are missing, extra or different.
    """
    from sparse_ingest.verification.verify import verify as verify_index

    options = replace(options, sample=None if compared["all_documents"] else compared["sample"])
    with TerminalReporter() as reporter:
        report = verify_index(run, index=index, connection=connection, options=options, progress=reporter)
    print_report(as_json, report.to_dict(), _verified(report))
    if not as_json:
        for note in report.notes:
            click.echo(note, err=True)
    return 0 if report.ok else 1


def _verified(report: VerifyReport) -> Iterator[str]:
    expected = report.expected_documents
    wanted = "other clients or loads of other runs wrote to it too" if expected is None else f"expected {expected:,}"
    yield f"Index {report.index!r} has {report.index_documents:,} documents ({wanted})."
    if report.refused_documents:
        yield f"{report.refused_documents:,} documents of the run were refused by the load (dead.jsonl)."
    if report.unloaded_shards:
        yield f"{report.unloaded_shards:,} shards of the run are not loaded yet: rerun the load."
    yield f"Compared {report.checked_weights:,} weights of {report.checked_documents:,} documents."
    yield from _listed("missing", report.missing_ids, report.missing)
    yield from _listed("duplicate", report.doubled_ids, report.doubled)
    # Documents of other clients and of an unfinished shard are not differences.
    if expected is not None and not report.unloaded_shards:
        yield from _listed("extra", report.extra_ids, report.extra)
    for doc_id, token, weight, found in report.differences:
        what = "sum of all weights of a group of tokens" if token is None else f"token {token!r}"
        there = "none" if found is None else f"{found:.9g}"
        yield f"  differs: {_printable(doc_id)}: {what}: expected {weight:.9g}, found {there}"
    if report.differing > len(report.differences):
        yield f"  and {report.differing - len(report.differences):,} more differ"
    yield "The index matches the run." if report.same else "The index differs from the run."


def _listed(what: str, doc_ids: Sequence[str], count: int) -> Iterator[str]:
    yield from (f"  {what}: {_printable(doc_id)}" for doc_id in doc_ids)
    if count > len(doc_ids):
        yield f"  and {count - len(doc_ids):,} more are {what}"


def _printable(text: str) -> str:
    """Return an id or a reason, quoted if it could move the cursor or add lines: any client may have chosen it."""
    return text if text.isprintable() else ascii(text)
