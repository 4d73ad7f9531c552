"""`sparse-ingest server`: a local OpenSearch, without Docker and without a Java of the system.

Options in, one call of `local_server`, one answer out: data on standard output, notes on standard error.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from sparse_ingest.cli.options import json_option, print_report
from sparse_ingest.cli.progress import TerminalReporter

if TYPE_CHECKING:
    from sparse_ingest.local_server.process import Instance

PORT = click.IntRange(1024, 65535)
FOLDER = click.Path(file_okay=False, path_type=Path)
NONE_RUNS = "No local server of ours is running"


@click.group()
def server() -> None:
    """Run a local OpenSearch with its neural-search plugin (needs the extra "local").

    \b
    sparse-ingest server start
    sparse-ingest server status
    sparse-ingest server stop
    """


@server.command()
@click.option("--port", type=PORT, default=9200, show_default=True, help="Port on 127.0.0.1")
@click.option("--heap", default="1g", show_default=True, help="Size of the Java heap")
@click.option("--data", type=FOLDER, metavar="DIR", help="Keep the data in DIR/sparse-ingest-opensearch")
@click.option(
    "--with-ml", is_flag=True, help="With the machine-learning plugin: analyzers bert-uncased and mbert-uncased, models"
)
@json_option
def start(port: int, heap: str, data: Path | None, with_ml: bool, as_json: bool) -> None:
    """Start a server, and print its URL when it is healthy.

    The first start downloads 180 MB, the first one --with-ml 390 MB more. A server that runs already on that port is
    left as it is; one without the plugin is not taken for one with it.
    """
    from sparse_ingest.local_server import process

    with TerminalReporter() as reporter:
        instance = process.start(port, data=data, heap=heap, with_ml=with_ml, reporter=reporter)
    print_report(as_json, {**_shown(instance), "already_running": instance.already_running}, [instance.url])


@server.command()
@click.option("--port", type=PORT, help="Which server; needed when several run")
@json_option
def stop(port: int | None, as_json: bool) -> None:
    """Stop a server that `server start` started; its data stays."""
    from sparse_ingest.local_server import process

    instance = process.stop(port)
    line = NONE_RUNS + (f" on port {port}" if port else "")
    if instance:
        line = f"Stopped {instance.url}; its data stays in {instance.data}"
    print_report(as_json, {"stopped": _shown(instance) if instance else None}, [line])


@server.command()
@json_option
def status(as_json: bool) -> None:
    """List the servers that `server start` started."""
    from sparse_ingest.local_server import process

    running = [
        {**_shown(one), "health": process.health(one), "documents": process.document_count(one)}
        for one in process.instances()
    ]
    lines = (
        f"{one['url']}  {one['health']}  documents {one['documents']}  pid {one['pid']}  "
        f"heap {one['heap']}  data {one['data']}" + ("  with ml" if one["with_ml"] else "")
        for one in running
    )
    print_report(as_json, running, lines if running else [NONE_RUNS])


def _shown(instance: Instance) -> dict[str, Any]:
    names = ("url", "port", "pid", "version", "heap", "with_ml", "data", "log", "started")
    shown = {name: getattr(instance, name) for name in names}
    return {**shown, "data": str(instance.data), "log": str(instance.log)}


COMMANDS = [server]
