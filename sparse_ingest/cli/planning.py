"""The command `plan`."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import click

from sparse_ingest.cli.completion import RUN
from sparse_ingest.cli.help import command
from sparse_ingest.cli.options import (
    CONNECTION_FLAGS,
    connection_options,
    json_option,
    pipeline_options,
    print_report,
    refuse_flags,
    stage_options,
)
from sparse_ingest.cli.progress import TerminalReporter
from sparse_ingest.planning.options import MOST_QUERIES, PlanOptions
from sparse_ingest.storage.places import Place

PATH = click.Path(path_type=Path)
SAMPLE = click.IntRange(10, MOST_QUERIES)


@command()
@click.argument("run", type=RUN)
@click.option("--queries", required=True, type=PATH, metavar="F",
              help="File of queries, or folder of a collection")  # fmt: skip
@click.option("--index", metavar="NAME", help="Index loaded from RUN: measure its engines and choose one")
@stage_options(PlanOptions, qrels=PATH, out=PATH, sample=SAMPLE, loss=click.FloatRange(0, 1, max_open=True))
@click.option("--all", "every", is_flag=True, help="Show all rows of the frontier, not only ten")
@pipeline_options("model index query", "engine")
@connection_options
@json_option
def plan(run: Place, queries: Path, options: PlanOptions, every: bool, as_json: bool, **named: Any) -> int:
    """Find the cheapest pruning, or with --index the fastest engine, that loses no more than --loss.

    \b
    plan RUN --queries F --out DIR                        how to prune
    load RUN --index NAME --pipeline DIR/pipeline.toml    apply it
    plan RUN --queries F --index NAME                     which engine to use

    The index remembers the query settings of the plan that was applied.

    Every pruning rule is tried in one pass; the ground truth is exact search of unpruned vectors. One half of the
    queries chooses, the other half confirms: on both, the 95% interval of the loss must end within --loss. The table
    shows the Pareto frontier, and exact search for comparison; * marks the chosen setting.

    Exit code 1: no setting is certain to keep the loss within --loss.
    """
    if named["index"] is None:
        refuse_flags(CONNECTION_FLAGS, "is for --index: a run folder is planned without a server")
    from sparse_ingest.planning.drawing import as_text
    from sparse_ingest.planning.plan import plan as plan_run

    with TerminalReporter() as reporter:
        report = plan_run(run, queries, options=options, progress=reporter, **named)
    lines = as_text(report, every=every).split("\n")
    if options.out and report.choice:
        flags = f" --pipeline {shlex.quote(str(Path(options.out) / 'pipeline.toml'))}"
    else:
        flags = report.load_flags
    if flags:
        lines.append(f"To apply it: sparse-ingest load {run} --index {report.index or 'NAME'}{flags}")
    print_report(as_json, report.to_dict(), lines)
    for path in report.written:
        click.echo(f"Wrote {path}", err=True)
    return 0 if report.choice else 1
