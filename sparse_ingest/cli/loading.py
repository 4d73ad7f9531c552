"""The commands `load` and `verify`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import click

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
from sparse_ingest.loading.options import PublishOptions
from sparse_ingest.reporting import size_text
from sparse_ingest.storage.places import Place, place_of

if TYPE_CHECKING:
    from sparse_ingest.cluster.connection import Connection
    from sparse_ingest.loading.load import LoadReport
    from sparse_ingest.loading.publish import PublishReport
    from sparse_ingest.pipeline import Pipeline
    from sparse_ingest.verification.verify import VerifyReport

_OF_LOADS = {*PublishOptions.__dataclass_fields__, "file", "assignments"} - {"allow_fewer"}


@click.command()
@click.argument("run", type=place_of, required=False)
@click.option("--index", help="Index to load into; created if it does not exist")
@click.option("--alias", help="Load into ALIAS-<first 8 of the run's id>, verify it, then let this alias serve it")
@click.option("--to", help="With --alias: let it serve this index, and load nothing (RUN is not read)")
@click.option(
    "--restore", is_flag=True, help="Put back the settings that a killed load left changed (RUN: also from its journal)"
)
@pipeline_options("index load query", *NO_MODEL)
@stage_options(PublishOptions)
@connection_options
@json_option
def load(
    run: Place | None, pipeline: Pipeline, options: PublishOptions, connection: Connection, as_json: bool, **target: Any
) -> int:
    """Load a run folder into an OpenSearch index; started again, it continues.

    \b
    load RUN --index NAME            into an index
    load RUN --alias NAME            into an index of its own, which NAME then serves
    load --alias NAME --to INDEX     back to another index, in one step
    load [RUN] --index NAME --restore     settings for loading that a killed load left
    load RUN --index NAME --since OLD_RUN --delete-missing     what changed since OLD_RUN was loaded
    load RUN --index NAME --update   the vectors alone, into documents that another client made
    load RUN --index NAME --pipeline DIR/pipeline.toml         as `plan --out DIR` chose

    [index] and [load] of a pipeline file apply unless an option overrides them; the index remembers [query].
    \b
    --update needs all other fields in the index's _source. A vector that its _source leaves
    out (fixed when the index was made) is lost when a client changes the document with _update.

    Exit code 3: finished, but OpenSearch refused documents; dead.jsonl beside the journal names them.
    """
    index, alias, to, restore = (target[name] for name in ("index", "alias", "to", "restore"))
    for wrong, message in (
        ((index is None) == (alias is None), "Name the target, either with --index or with --alias."),
        (
            not alias and (to or options.drop_old or options.allow_fewer),
            "--to, --drop-old and --allow-fewer need --alias.",
        ),
        (restore and not index, "--restore belongs to --index."),
        (to and options.drop_old, "--to deletes nothing: leave out --drop-old."),
    ):
        if wrong:
            raise click.UsageError(message)
    if to or restore:
        refuse_flags(_OF_LOADS, "has no effect with --to or --restore, which load no run")
    if to:
        return _serve(alias, to, options.allow_fewer, connection, as_json)
    if restore:
        return _restore(index, run, connection, as_json)
    if run is None:
        raise click.UsageError("Missing argument 'RUN'.")
    from sparse_ingest.loading.load import load as load_run
    from sparse_ingest.loading.publish import publish

    how: dict[str, Any] = {"connection": connection, "pipeline": pipeline, "options": options}
    with TerminalReporter(stoppable=True) as reporter:
        if alias:
            published = publish(run, alias=alias, progress=reporter, **how)
        else:
            report = load_run(run, index=index, progress=reporter, **how)
    if alias:
        return _print_loaded(published.load, published.to_dict(), _served(published, options.drop_old), as_json)
    return _print_loaded(report, report.to_dict(), (), as_json)


def _serve(alias: str, index: str, allow_fewer: bool, connection: Connection, as_json: bool) -> int:
    """Let an alias serve another index."""
    from sparse_ingest.loading.publish import roll_back

    with TerminalReporter() as reporter:
        before = roll_back(alias, index, allow_fewer=allow_fewer, connection=connection, progress=reporter)
    line = f"Alias {alias!r} serves {index!r}; before: {before or 'nothing'}."
    print_report(as_json, {"alias": alias, "serves": index, "previous": before}, [line])
    return 0


def _restore(index: str, run: Place | None, connection: Connection, as_json: bool) -> int:
    """Restore the settings that a killed load left changed."""
    from sparse_ingest.loading.load import restore_settings

    with TerminalReporter() as reporter:
        restored = restore_settings(index, run=run, connection=connection, progress=reporter)
    line = f"Index {index!r}: {'put back ' + ', '.join(restored) if restored else 'nothing to put back'}."
    print_report(as_json, {"index": index, "restored": restored}, [line])
    return 0


def _print_loaded(report: LoadReport, content: object, also: Iterable[str], as_json: bool) -> int:
    """Print what a load did, and return its exit code."""
    lines = [
        f"{report.acknowledged} of {report.documents} documents are in index {report.index!r} "
        f"({report.loaded_shards} of {report.shards} shards loaded now, {report.seconds:.1f} s)."
    ]
    if report.merged_from_bytes is not None and report.merged_to_bytes is not None:
        one = "One segment per shard" if report.merged else "Not merged completely"
        lines.append(
            f"{one}: {size_text(report.merged_from_bytes)} before the merge, {size_text(report.merged_to_bytes)} after."
        )
    if report.unchanged:
        lines.append(f"{report.unchanged} of them did not differ from the older run and were not sent.")
    if report.deleted:
        lines.append(f"{report.deleted} documents that only the older run has were deleted.")
    if report.retried:
        lines.append(f"{report.retried} documents that were refused before were sent again.")
    print_result(as_json, content, (*lines, *also))
    if report.refused and not as_json:
        click.echo(
            f"OpenSearch refused {report.refused} documents; {report.dead} lists them with the reasons. Fix the "
            "cause, then rerun with --retry-dead.",
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
            f"Index {report.previous!r}, which it served before, stays{'' if drop_old else '; --drop-old deletes it'}. "
            f"Back to it: sparse-ingest load --alias {report.alias} --to {report.previous}"
        )


@click.command()
@click.argument("run", type=place_of)
@click.option("--index", required=True, help="Index to compare the run with")
@click.option("--sample", type=click.IntRange(min=1), default=200, show_default=True, help="Vectors to compare")
@click.option("--all", "all_documents", is_flag=True, help="Compare every vector")
@click.option("--field", help="Name of the sparse field  [default: the one the index is stamped with]")
@connection_options
@json_option
def verify(run: Place, sample: int, all_documents: bool, as_json: bool, **named: Any) -> int:
    """Compare an index with the run folder that was loaded into it, bit for bit.

    The ids of all documents are compared, and the weights of some or of --all. Documents that the run does not have
    are a difference only if no other client wrote into the index.
    Exit code 1: something is missing, is too much or differs.
    """
    from sparse_ingest.verification.verify import verify as verify_index

    with TerminalReporter() as reporter:
        report = verify_index(run, sample=None if all_documents else sample, progress=reporter, **named)
    print_report(as_json, report.to_dict(), _verified(report))
    if not as_json:
        for note in report.notes:
            click.echo(note, err=True)
    return 0 if report.ok else 1


COMMANDS = [load, verify]


def _verified(report: VerifyReport) -> Iterator[str]:
    expected = report.expected_documents
    wanted = "others wrote there too" if expected is None else f"expected {expected}"
    yield f"Index {report.index!r} has {report.index_documents} documents ({wanted})."
    if report.refused_documents:
        yield f"{report.refused_documents} documents of the run were refused when it was loaded (dead.jsonl)."
    if report.unloaded_shards:
        yield f"{report.unloaded_shards} shards of the run are not loaded yet: start the same load again."
    yield f"Compared {report.checked_weights} weights of {report.checked_documents} documents."
    yield from _listed("missing", report.missing_ids, report.missing)
    yield from _listed("duplicate", report.doubled_ids, report.doubled)
    # What others wrote, and what was sent of a shard that is not finished, is no difference of its own.
    if expected is not None and not report.unloaded_shards:
        yield from _listed("too many", report.extra_ids, report.extra)
    for doc_id, token, weight, found in report.differences:
        what = "sum of all weights of a group of tokens" if token is None else f"token {token!r}"
        there = "none" if found is None else f"{found:.9g}"
        yield f"  differs: {doc_id}: {what}: expected {weight:.9g}, found {there}"
    if report.differing > len(report.differences):
        yield f"  and {report.differing - len(report.differences)} more differ"
    yield "The index holds what the run says." if report.same else "The index differs from the run."


def _listed(what: str, doc_ids: Sequence[str], count: int) -> Iterator[str]:
    yield from (f"  {what}: {doc_id}" for doc_id in doc_ids)
    if count > len(doc_ids):
        yield f"  and {count - len(doc_ids)} more are {what}"
