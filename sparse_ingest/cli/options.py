"""Options that several commands share, each group one decorator."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, TypeVar

import click

F = TypeVar("F", bound=Callable[..., Any])

json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON on standard output")


def connection_options(command: F) -> F:
    """Where the cluster is and how to speak to it; the command receives the keyword `connection`, a dict."""
    options = [
        click.option("--url", envvar="SPARSE_INGEST_URL", default="http://127.0.0.1:9200", show_default=True,
                     help="Address of OpenSearch [env SPARSE_INGEST_URL]"),
        click.option("--user", envvar="SPARSE_INGEST_USER", help="User name [env SPARSE_INGEST_USER]"),
        click.option("--password", envvar="SPARSE_INGEST_PASSWORD",
                     help="Password; better given by its variable [env SPARSE_INGEST_PASSWORD]"),
        click.option("--ca", envvar="SPARSE_INGEST_CA", type=click.Path(exists=True, dir_okay=False),
                     help="CA certificates to trust [env SPARSE_INGEST_CA]"),
        click.option("--client-cert", envvar="SPARSE_INGEST_CLIENT_CERT",
                     type=click.Path(exists=True, dir_okay=False), help="Client certificate [env SPARSE_INGEST_CLIENT_CERT]"),
        click.option("--client-key", envvar="SPARSE_INGEST_CLIENT_KEY",
                     type=click.Path(exists=True, dir_okay=False), help="Client key [env SPARSE_INGEST_CLIENT_KEY]"),
        click.option("--aws-region", envvar="AWS_REGION", help="Sign requests with AWS SigV4 for this region when --aws-service is given"),
        click.option("--aws-service", envvar="SPARSE_INGEST_AWS_SERVICE", type=click.Choice(["es", "aoss"]),
                     help="Sign requests with AWS SigV4 for this service [env SPARSE_INGEST_AWS_SERVICE]"),
    ]
    for option in reversed(options):
        command = option(command)
    return command


def print_json(value: object) -> None:
    """Print `value` as JSON on standard output."""
    click.echo(json.dumps(value, ensure_ascii=False, indent=2))
