"""`sparse-ingest server`: a local OpenSearch, without Docker or a system Java."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from sparse_ingest.cli.help import Group
from sparse_ingest.cli.options import json_option, print_report
from sparse_ingest.cli.progress import TerminalReporter

if TYPE_CHECKING:
    from sparse_ingest.local_server.process import Instance

PORT = click.IntRange(1024, 65535)
FOLDER = click.Path(file_okay=False, path_type=Path)
NONE_RUNS = "No local server is running"


@click.group(cls=Group)
def server() -> None:
    """Run a local OpenSearch with the neural-search plugin (needs the extra "local").

    \b
    sparse-ingest server start
    sparse-ingest server status
    sparse-ingest server stop
    """


@server.command()
@click.option("--port", metavar="N", type=PORT, default=9200, show_default=True, help="Port on 127.0.0.1")
@click.option("--heap", default="1g", show_default=True, help="Java heap size")
@click.option("--data", type=FOLDER, metavar="DIR", help="Store the data in DIR/sparse-ingest-opensearch")
@click.option("--with-ml", is_flag=True, help="Add the machine-learning plugin, for models and the BERT analyzers")
@json_option
def start(port: int, heap: str, data: Path | None, with_ml: bool, as_json: bool) -> None:
    """Start a server, and print its URL when it is healthy.

    The first start downloads 180 MB, the first start --with-ml 390 MB more. A server that is already running on the
    port is used unchanged; --with-ml refuses one without the plugin.
    """
    from sparse_ingest.local_server import process

    with TerminalReporter() as reporter:
        instance = process.start(port, data=data, heap=heap, with_ml=with_ml, reporter=reporter)
    print_report(as_json, {**_shown(instance), "already_running": instance.already_running}, [instance.url])


@server.command()
@click.option("--port", metavar="N", type=PORT, help="Port of the server; needed if several are running")
@json_option
def stop(port: int | None, as_json: bool) -> None:
    """Stop a server that `server start` started; its data is kept."""
    from sparse_ingest.local_server import process

    instance = process.stop(port)
    line = NONE_RUNS + (f" on port {port}" if port else "")
    if instance:
        line = f"Stopped {instance.url}; its data is kept in {instance.data}"
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
    shown = asdict(instance) | {"data": str(instance.data), "log": str(instance.log)}
    return {name: value for name, value in shown.items() if name not in ("token", "already_running")}
