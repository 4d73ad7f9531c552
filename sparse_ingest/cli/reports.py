"""The command `report`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from sparse_ingest.cli.completion import RUN
from sparse_ingest.cli.help import command
from sparse_ingest.cli.options import CONNECTION_FLAGS, connection_options, json_option, print_result, refuse_flags
from sparse_ingest.cli.progress import TerminalReporter
from sparse_ingest.storage.places import Place

if TYPE_CHECKING:
    from sparse_ingest.cluster.connection import Connection


@command()
@click.argument("run", type=RUN)
@click.option("--out", type=RUN, required=True, metavar="FILE", help="HTML file to write; an existing one is kept")
@click.option("--index", metavar="NAME", help="Index loaded from RUN: show its size, mapping and state")
@click.option(
    "--plan", type=click.Path(path_type=Path), metavar="DIR", help="Folder of a plan of RUN: show its frontier"
)
@click.option("--verify", is_flag=True, help="Compare the index with RUN, as `verify` does")
@connection_options
@json_option
def report(
    run: Place, out: Place, index: str | None, plan: Path | None, verify: bool, connection: Connection, as_json: bool
) -> int:
    """Write a report of a run folder and its loads as one HTML file.

    \b
    report RUN --out report.html
    report RUN --index NAME --verify --plan DIR --out report.html

    It shows corpus, model, settings, speed by stage, the distributions of terms, weights, texts and posting lists, and
    the history of loads. All vectors of RUN are read once; above 10 million documents, those of evenly spaced shards.
    Without --index no request is sent.

    Exit code 1: with --verify, the index differs from RUN.
    """
    if index is None:
        refuse_flags(CONNECTION_FLAGS, "is for --index: a run folder is read without a server")
    from sparse_ingest.reports.report import report as write_report

    with TerminalReporter() as reporter:
        figures = write_report(
            run, out=out, index=index, plan=plan, verify=verify, connection=connection, progress=reporter
        )
    print_result(as_json, figures.to_dict(), [f"Wrote {out}."])
    return 0 if figures.ok else 1
