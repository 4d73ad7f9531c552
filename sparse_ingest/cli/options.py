"""Options that several commands share, each group one decorator."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeVar, cast

import click

from sparse_ingest.pipeline import ModelSettings, Pipeline, override, read_pipeline

F = TypeVar("F", bound=Callable[..., Any])

json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON on standard output")


def connection_options(command: F) -> F:
    """Where the cluster is and how to speak to it; the command receives the keyword `connection`, a `Connection`."""
    file = click.Path(exists=True, dir_okay=False)
    options = [
        _variable(
            "--url", "SPARSE_INGEST_URL", "Address of OpenSearch", default="http://127.0.0.1:9200", show_default=True
        ),
        _variable("--user", "SPARSE_INGEST_USER", "User name; may stand in --url"),
        _variable("--password", "SPARSE_INGEST_PASSWORD", "Password; better given by its variable"),
        _variable("--ca", "SPARSE_INGEST_CA", "CA certificates to trust instead of the system's", type=file),
        _variable("--client-cert", "SPARSE_INGEST_CLIENT_CERT", "Client certificate", type=file),
        _variable("--client-key", "SPARSE_INGEST_CLIENT_KEY", "Its key, unless its file holds both", type=file),
        _variable("--aws-region", "AWS_REGION", "AWS region  [default: that of the AWS profile]"),
        _variable(
            "--aws-service",
            "SPARSE_INGEST_AWS_SERVICE",
            "Sign requests with AWS SigV4 as boto3 is set up; aoss is Serverless",
            type=click.Choice(["es", "aoss"]),
        ),
    ]

    @functools.wraps(command)
    def with_connection(*args: Any, **kwargs: Any) -> Any:
        # Imported here: it brings opensearchpy, which `--help` does without.
        from sparse_ingest.opensearch.client import Connection

        given = {name: kwargs.pop(name) for name in Connection.__dataclass_fields__}
        return command(*args, connection=Connection(**given), **kwargs)

    wrapped: Callable[..., Any] = with_connection
    for option in reversed(options):
        wrapped = option(wrapped)
    return cast(F, wrapped)


def _variable(name: str, variable: str, help_text: str, **settings: Any) -> Callable[[Any], Any]:
    """An option that an environment variable can give, named in its help."""
    return click.option(name, envvar=variable, help=f"{help_text}  [env: {variable}]", **settings)


def print_json(value: object) -> None:
    """Print `value` as JSON on standard output."""
    click.echo(json.dumps(value, ensure_ascii=False, indent=2))


def model_options(command: F) -> F:
    """Which model and settings; the command receives the keyword `pipeline`, a `Pipeline`.

    `pipeline.model.document` is None when the user named no model.
    """
    model = click.option("--model", metavar="M", help="Model: a hub id, a folder, or package:NAME/PATH")
    trust = click.option(
        "--trust-remote-code",
        is_flag=True,
        help="Run the Python files of a checkpoint that brings its own architecture",
    )
    return model(trust(pipeline_options(command)))


def pipeline_options(command: F) -> F:
    """Which settings, for a command that needs no model; it receives the keyword `pipeline`, a `Pipeline`."""

    @click.option("--pipeline", "pipeline_name", metavar="P", help="Pipeline file, or the name of a packaged one")
    @click.option("--set", "assignments", multiple=True, metavar="TABLE.KEY=VALUE", help="Override one setting")
    @functools.wraps(command)
    def with_pipeline(
        *args: Any,
        pipeline_name: str | None,
        assignments: tuple[str, ...],
        model: str | None = None,
        trust_remote_code: bool = False,
        **kwargs: Any,
    ) -> Any:
        pipeline = read_pipeline(pipeline_name) if pipeline_name else Pipeline()
        if model:
            # Nothing of the file's own model may linger, such as its query side or a revision.
            pipeline = replace(pipeline, model=ModelSettings(document=model))
        if trust_remote_code:
            pipeline = replace(pipeline, model=replace(pipeline.model, trust_remote_code=True))
        return command(*args, pipeline=override(pipeline, assignments), **kwargs)

    return cast(F, with_pipeline)
