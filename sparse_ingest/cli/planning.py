"""The command `plan`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from sparse_ingest.cli.options import PLACE, connection_options, json_option, model_options, print_json
from sparse_ingest.cli.progress import TerminalReporter
from sparse_ingest.pipeline import Pipeline

if TYPE_CHECKING:
    from sparse_ingest.cluster.client import Connection
    from sparse_ingest.storage.places import Place


@click.command()
@click.argument("run", type=PLACE)
@click.option("--queries", "queries_path", required=True, type=click.Path(path_type=Path), metavar="F",
              help="Queries: a file, or the folder of a collection")  # fmt: skip
@click.option("--qrels", type=click.Path(path_type=Path), metavar="F",
              help="Judgements: quality is nDCG@10 then, else the share of the ten best documents")  # fmt: skip
@click.option("--index", metavar="NAME", help="Index that holds the run: its engines are measured, and one is chosen")
@click.option("--loss", type=click.FloatRange(0, 1, max_open=True), default=0.01, show_default=True,
              help="Share of the quality that may be lost")  # fmt: skip
@click.option("--sample", type=click.IntRange(10, 2000), default=200, show_default=True, help="Queries to plan with")
@click.option("--out", type=click.Path(path_type=Path), metavar="DIR",
              help="Write plan.json, plan.png, plan.html and pipeline.toml here")  # fmt: skip
@model_options
@connection_options
@json_option
def plan(
    run: Place,
    queries_path: Path,
    index: str | None,
    pipeline: Pipeline,
    connection: Connection,
    as_json: bool,
    **given: Any,
) -> int:
    """Find the cheapest pruning, or with --index the fastest engine, that loses no more than --loss.

    \b
    plan RUN --queries F --out DIR                how to prune documents and queries
    load RUN --index NAME --max-ratio 0.1         as the plan says
    plan RUN --queries F --index NAME             which engine, with which settings, for that index

    Every rule is tried on the run folder in one pass; the truth is exact search of whole vectors. One half of the
    queries chooses, the other half must confirm. The table shows what no other point beats; * is the one taken.
    Exit code 1: nothing loses as little as --loss.
    """
    from sparse_ingest.planning.drawing import as_text
    from sparse_ingest.planning.options import PlanOptions
    from sparse_ingest.planning.plan import plan as plan_run

    with TerminalReporter() as reporter:
        report = plan_run(
            run,
            queries_path,
            index=index,
            connection=connection,
            pipeline=pipeline,
            options=PlanOptions(**given),
            progress=reporter,
        )
    if as_json:
        print_json(report.to_dict())
    else:
        click.echo(as_text(report))
        if report.load_flags:
            click.echo(f"Load it so: sparse-ingest load {run} --index NAME{report.load_flags}")
    for path in report.written:
        click.echo(f"Wrote {path}", err=True)
    return 0 if report.choice else 1


COMMANDS = [plan]
