"""`sparse-ingest server`: a local OpenSearch, without Docker and without a Java of the system.

Options in, one call of `local_server`, one answer out: data on standard output, notes on standard error.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from sparse_ingest.cli.options import json_option, print_json
from sparse_ingest.cli.progress import TerminalReporter

if TYPE_CHECKING:
    from sparse_ingest.local_server.process import Instance

port_type = click.IntRange(1024, 65535)


@click.group()
def server() -> None:
    """Run a local OpenSearch with its neural-search plugin (needs the extra "local").

    \b
    sparse-ingest server start
    sparse-ingest server status
    sparse-ingest server stop
    """


@server.command()
@click.option("--port", type=port_type, default=9200, show_default=True, help="Port on 127.0.0.1")
@click.option("--heap", default="1g", show_default=True, help="Size of the Java heap")
@click.option(
    "--data",
    "data_folder",
    type=click.Path(file_okay=False, path_type=Path),
    metavar="DIR",
    help="Keep the data in DIR/sparse-ingest-opensearch",
)
@click.option(
    "--with-ml", is_flag=True, help="With the machine-learning plugin: analyzers bert-uncased and mbert-uncased, models"
)
@json_option
def start(port: int, heap: str, data_folder: Path | None, with_ml: bool, as_json: bool) -> None:
    """Start a server, and print its URL when it is healthy.

    The first start downloads 180 MB, the first one --with-ml 390 MB more. A server that runs already on that port is
    left as it is; one without the plugin is not taken for one with it.
    """
    from sparse_ingest.local_server import process

    with TerminalReporter() as reporter:
        instance = process.start(port, data=data_folder, heap=heap, with_ml=with_ml, reporter=reporter)
    if as_json:
        print_json({**_shown(instance), "already_running": instance.already_running})
    else:
        click.echo(instance.url)


@server.command()
@click.option("--port", type=port_type, help="Which server; needed when several run")
@json_option
def stop(port: int | None, as_json: bool) -> None:
    """Stop a server that `server start` started; its data stays."""
    from sparse_ingest.local_server import process

    instance = process.stop(port)
    if as_json:
        print_json({"stopped": _shown(instance) if instance else None})
    elif instance:
        click.echo(f"Stopped {instance.url}; its data stays in {instance.data}")
    else:
        click.echo("No local server of ours is running" + (f" on port {port}" if port else ""))


@server.command()
@json_option
def status(as_json: bool) -> None:
    """List the servers that `server start` started."""
    from sparse_ingest.local_server import process

    running = [
        {**_shown(one), "health": process.health(one), "documents": process.document_count(one)}
        for one in process.instances()
    ]
    if as_json:
        print_json(running)
        return
    if not running:
        click.echo("No local server of ours is running")
    for one in running:
        click.echo(
            f"{one['url']}  {one['health']}  documents {one['documents']}  pid {one['pid']}  "
            f"heap {one['heap']}  data {one['data']}" + ("  with ml" if one["with_ml"] else "")
        )


def _shown(instance: Instance) -> dict[str, Any]:
    return {
        "url": instance.url,
        "port": instance.port,
        "pid": instance.pid,
        "version": instance.version,
        "heap": instance.heap,
        "with_ml": instance.with_ml,
        "data": str(instance.data),
        "log": str(instance.log),
        "started": instance.started,
    }


COMMANDS = [server]
