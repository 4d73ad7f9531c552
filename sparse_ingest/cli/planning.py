"""The command `plan`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from sparse_ingest.cli.options import connection_options, json_option, pipeline_options, print_report, stage_options
from sparse_ingest.cli.progress import TerminalReporter
from sparse_ingest.planning.options import PlanOptions
from sparse_ingest.storage.places import Place, place_of

PATH = click.Path(path_type=Path)


@click.command()
@click.argument("run", type=place_of)
@click.option("--queries", required=True, type=PATH, metavar="F",
              help="Queries: a file, or the folder of a collection")  # fmt: skip
@click.option("--index", metavar="NAME", help="Index that holds the run: its engines are measured, and one is chosen")
@stage_options(
    PlanOptions, qrels=PATH, out=PATH, loss=click.FloatRange(0, 1, max_open=True), sample=click.IntRange(10, 2000)
)
@pipeline_options("model index query", "engine")
@connection_options
@json_option
def plan(run: Place, queries: Path, options: PlanOptions, as_json: bool, **named: Any) -> int:
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
    from sparse_ingest.planning.plan import plan as plan_run

    with TerminalReporter() as reporter:
        report = plan_run(run, queries, options=options, progress=reporter, **named)
    lines = [as_text(report)]
    if report.load_flags:
        lines.append(f"Load it so: sparse-ingest load {run} --index NAME{report.load_flags}")
    print_report(as_json, report.to_dict(), lines)
    for path in report.written:
        click.echo(f"Wrote {path}", err=True)
    return 0 if report.choice else 1


COMMANDS = [plan]
