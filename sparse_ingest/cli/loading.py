"""The commands `load` and `verify`."""

from __future__ import annotations

from dataclasses import asdict
from dataclasses import replace as with_changes
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from sparse_ingest.cli.options import connection_options, json_option, pipeline_options, print_json
from sparse_ingest.cli.progress import Progress, asked_to_stop

if TYPE_CHECKING:
    from sparse_ingest.load import LoadReport
    from sparse_ingest.opensearch.client import Connection
    from sparse_ingest.pipeline import Pipeline
    from sparse_ingest.verify import VerifyReport

_RUN = click.argument("run", type=click.Path(path_type=Path))


@click.command()
@_RUN
@click.option("--index", required=True, help="Index to load into; made when missing")
@pipeline_options
@click.option("--field", help="Name of the sparse field  [default: that of the pipeline, else sparse]")
@click.option("--kind", type=click.Choice(["rank_features", "sparse_vector"]), help="Type of the sparse field")
@click.option("--replace", is_flag=True, help="Delete the index first, unless it is an unfinished load of this run")
@click.option("--from-scratch", is_flag=True, help="With --replace: delete that one too")
@click.option("--partial", is_flag=True, help="Load the finished shards of an unfinished run")
@connection_options
@json_option
def load(
    run: Path,
    index: str,
    pipeline: Pipeline,
    field: str | None,
    kind: str | None,
    replace: bool,
    from_scratch: bool,
    partial: bool,
    connection: Connection,
    as_json: bool,
) -> int:
    """Load a run folder into an OpenSearch index; started again, it continues.

    Exit code 3: finished, but OpenSearch refused documents; dead.jsonl beside the journal names them.
    """
    from sparse_ingest import load as verb

    given: dict[str, Any] = {name: value for name, value in (("field", field), ("kind", kind)) if value}
    pipeline = with_changes(pipeline, index=with_changes(pipeline.index, **given))
    with Progress("documents", _rows(run)) as progress, asked_to_stop() as stop:
        report = verb.load(
            run,
            index=index,
            pipeline=pipeline,
            connection=connection,
            replace=replace,
            from_scratch=from_scratch,
            partial=partial,
            progress=progress.reach,
            stop=stop,
        )
    if as_json:
        print_json(asdict(report))
    else:
        _print_load(report)
    return 3 if report.refused else 0


@click.command()
@_RUN
@click.option("--index", required=True, help="Index to compare the run with")
@click.option("--sample", type=click.IntRange(min=1), default=200, show_default=True, help="Documents to compare")
@click.option("--all", "all_documents", is_flag=True, help="Compare every document")
@click.option("--field", help="Name of the sparse field  [default: the one the index is stamped with]")
@connection_options
@json_option
def verify(
    run: Path, index: str, sample: int, all_documents: bool, field: str | None, connection: Connection, as_json: bool
) -> int:
    """Compare an index with the run folder that was loaded into it, bit for bit.

    Exit code 1: something is missing or differs.
    """
    from sparse_ingest import verify as verb

    total = _rows(run)
    with Progress("documents", total if all_documents else min(sample, total or sample)) as progress:
        report = verb.verify(
            run,
            index=index,
            connection=connection,
            sample=None if all_documents else sample,
            field=field,
            progress=progress.reach,
        )
    if as_json:
        print_json({"same": report.same, **_as_json(report)})
    else:
        _print_verify(report)
    return 0 if report.same else 1


COMMANDS = [load, verify]


def _rows(run: Path) -> int | None:
    """How many documents a run has, None while it is not complete."""
    from sparse_ingest.runs.manifest import open_run

    complete = open_run(run).complete()
    return int(complete["rows"]) if complete else None


def _print_load(report: LoadReport) -> None:
    click.echo(
        f"{report.acknowledged} of {report.documents} documents are in index {report.index!r} "
        f"({report.loaded_shards} of {report.shards} shards loaded now, {report.seconds:.1f} s)."
    )
    if report.refused:
        click.echo(f"OpenSearch refused {report.refused} documents; {report.dead} names them and says why.", err=True)


def _as_json(report: VerifyReport) -> dict[str, object]:
    return {**asdict(report), "differences": [difference._asdict() for difference in report.differences]}


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
    for doc_id in report.missing_ids:
        click.echo(f"  missing: {doc_id}")
    if report.missing > len(report.missing_ids):
        click.echo(f"  and {report.missing - len(report.missing_ids)} more are missing")
    for doc_id, token, wanted, found in report.differences:
        what = "sum of all weights of a group of tokens" if token is None else f"token {token!r}"
        click.echo(
            f"  differs: {doc_id}: {what}: expected {wanted:.9g}, found {'none' if found is None else f'{found:.9g}'}"
        )
    if report.differing > len(report.differences):
        click.echo(f"  and {report.differing - len(report.differences)} more differ")
    click.echo("The index holds what the run says." if report.same else "The index differs from the run.")
