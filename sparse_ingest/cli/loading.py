"""The commands `load` and `verify`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

from sparse_ingest.cli.options import (
    PLACE,
    connection_options,
    json_option,
    pipeline_options,
    print_json,
    stage_options,
)
from sparse_ingest.cli.progress import TerminalReporter
from sparse_ingest.loading.options import PublishOptions
from sparse_ingest.storage.places import Place

if TYPE_CHECKING:
    from sparse_ingest.cluster.client import Connection
    from sparse_ingest.loading.load import LoadReport
    from sparse_ingest.loading.publish import PublishReport
    from sparse_ingest.pipeline import Pipeline
    from sparse_ingest.verification.verify import VerifyReport

_RUN = click.argument("run", type=PLACE)


@click.command()
@click.argument("run", type=PLACE, required=False)
@click.option("--index", help="Index to load into; made when missing")
@click.option("--alias", help="Load into ALIAS-<first 8 of the run's id>, verify it, then let this alias serve it")
@click.option("--to", help="With --alias: let it serve this index, and load nothing (RUN is not read)")
@click.option("--restore", is_flag=True, help="Put back the settings that a killed load left changed (RUN is not read)")
@pipeline_options
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
    load --index NAME --restore      settings for loading that a killed load left
    load RUN --index NAME --since OLD_RUN --delete-missing     what changed since OLD_RUN was loaded
    load RUN --index NAME --update   the vectors alone, into documents that somebody else made

    \b
    --update needs all other fields in the index's _source. A vector that its _source leaves
    out (fixed when the index was made) is lost when somebody changes the document with _update.

    Exit code 3: finished, but OpenSearch refused documents; dead.jsonl beside the journal names them.
    """
    index, alias, to, restore = (target[name] for name in ("index", "alias", "to", "restore"))
    if (index is None) == (alias is None):
        raise click.UsageError("Name the target, either with --index or with --alias.")
    if (to or options.drop_old) and not alias:
        raise click.UsageError("--to and --drop-old belong to --alias.")
    if restore and not index:
        raise click.UsageError("--restore belongs to --index.")
    if to and options.drop_old:
        raise click.UsageError("--to deletes nothing: leave out --drop-old.")
    if to and alias:
        return _roll_back(alias, to, connection, as_json)
    if restore and index:
        return _restore(index, connection, as_json)
    if run is None:
        raise click.UsageError("Missing argument 'RUN'.")
    how: dict[str, Any] = {"connection": connection, "pipeline": pipeline, "options": options}
    with TerminalReporter(stoppable=True) as reporter:
        if alias:
            from sparse_ingest.loading.publish import publish

            published = publish(run, alias=alias, progress=reporter, **how)
        else:
            from sparse_ingest.loading.load import load as load_run

            report = load_run(run, index=str(index), progress=reporter, **how)
    if alias:
        return _print_published(published, as_json)
    _print_load(report, as_json)
    return 3 if report.refused else 0


def _print_published(report: PublishReport, as_json: bool) -> int:
    if as_json:
        print_json(report.to_dict())
    else:
        _print_load(report.load, as_json)
        if report.serves == report.load.index:
            click.echo(f"Alias {report.alias!r} serves {report.serves!r}{' now' if report.moved else ' already'}.")
        if report.dropped:
            click.echo(f"Index {report.dropped!r} was deleted.")
        if report.previous:
            click.echo(
                f"Index {report.previous!r}, which it served before, stays; --drop-old deletes it. Back to it: "
                f"sparse-ingest load --alias {report.alias} --to {report.previous}"
            )
    return 3 if report.load.refused else 0


def _roll_back(alias: str, to: str, connection: Connection, as_json: bool) -> int:
    from sparse_ingest.loading.publish import roll_back

    with TerminalReporter() as reporter:
        before = roll_back(alias, to, connection=connection, progress=reporter)
    if as_json:
        print_json({"alias": alias, "serves": to, "previous": before})
    else:
        click.echo(f"Alias {alias!r} serves {to!r}; before: {before or 'nothing'}.")
    return 0


def _restore(index: str, connection: Connection, as_json: bool) -> int:
    from sparse_ingest.loading.load import restore_settings

    with TerminalReporter() as reporter:
        restored = restore_settings(index, connection=connection, progress=reporter)
    if as_json:
        print_json({"index": index, "restored": restored})
    else:
        click.echo(f"Index {index!r}: {'put back ' + ', '.join(restored) if restored else 'nothing to put back'}.")
    return 0


@click.command()
@_RUN
@click.option("--index", required=True, help="Index to compare the run with")
@click.option("--sample", type=click.IntRange(min=1), default=200, show_default=True, help="Vectors to compare")
@click.option("--all", "all_documents", is_flag=True, help="Compare every vector")
@click.option("--field", help="Name of the sparse field  [default: the one the index is stamped with]")
@connection_options
@json_option
def verify(
    run: Place, index: str, sample: int, all_documents: bool, field: str | None, connection: Connection, as_json: bool
) -> int:
    """Compare an index with the run folder that was loaded into it, bit for bit.

    The ids of all documents are compared, and the weights of some or of --all. Documents that the run does not have
    are a difference only when nobody else wrote into the index.
    Exit code 1: something is missing, is too much or differs.
    """
    from sparse_ingest.verification.verify import verify as verify_index

    with TerminalReporter() as reporter:
        report = verify_index(
            run,
            index=index,
            connection=connection,
            sample=None if all_documents else sample,
            field=field,
            progress=reporter,
        )
    if as_json:
        print_json(report.to_dict())
    else:
        _print_verify(report)
    return 0 if report.ok else 1


COMMANDS = [load, verify]


def _print_load(report: LoadReport, as_json: bool) -> None:
    if as_json:
        print_json(report.to_dict())
        return
    click.echo(
        f"{report.acknowledged} of {report.documents} documents are in index {report.index!r} "
        f"({report.loaded_shards} of {report.shards} shards loaded now, {report.seconds:.1f} s)."
    )
    if report.unchanged:
        click.echo(f"{report.unchanged} of them did not differ from the older run and were not sent.")
    if report.deleted:
        click.echo(f"{report.deleted} documents that only the older run has were deleted.")
    if report.retried:
        click.echo(f"{report.retried} documents that were refused before were sent again.")
    if report.refused:
        click.echo(
            f"OpenSearch refused {report.refused} documents; {report.dead} names them and says why. When the cause is "
            "mended, the same command with --retry-dead sends them again.",
            err=True,
        )


def _print_verify(report: VerifyReport) -> None:
    expected = (
        "others wrote there too" if report.expected_documents is None else f"expected {report.expected_documents}"
    )
    click.echo(f"Index {report.index!r} has {report.index_documents} documents ({expected}).")
    if report.refused_documents:
        click.echo(f"{report.refused_documents} documents of the run were refused when it was loaded (dead.jsonl).")
    if report.unloaded_shards:
        click.echo(f"{report.unloaded_shards} shards of the run are not loaded yet: start the same load again.")
    click.echo(f"Compared {report.checked_weights} weights of {report.checked_documents} documents.")
    _print_ids("missing", report.missing_ids, report.missing)
    _print_ids("there twice", report.doubled_ids, report.doubled)
    # What others wrote, and what was sent of a shard that is not finished, is no difference of its own.
    if report.expected_documents is not None and not report.unloaded_shards:
        _print_ids("too many", report.extra_ids, report.extra)
    for doc_id, token, wanted, found in report.differences:
        what = "sum of all weights of a group of tokens" if token is None else f"token {token!r}"
        click.echo(
            f"  differs: {doc_id}: {what}: expected {wanted:.9g}, found {'none' if found is None else f'{found:.9g}'}"
        )
    if report.differing > len(report.differences):
        click.echo(f"  and {report.differing - len(report.differences)} more differ")
    for note in report.notes:
        click.echo(note, err=True)
    click.echo("The index holds what the run says." if report.same else "The index differs from the run.")


def _print_ids(what: str, doc_ids: Sequence[str], count: int) -> None:
    for doc_id in doc_ids:
        click.echo(f"  {what}: {doc_id}")
    if count > len(doc_ids):
        click.echo(f"  and {count - len(doc_ids)} more are {what}")
