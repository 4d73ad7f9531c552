"""Options that several commands share, each group one decorator."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar, cast

import click

from sparse_ingest.errors import UsageError, first_line
from sparse_ingest.pipeline import ModelSettings, Pipeline, override, read_pipeline
from sparse_ingest.storage.places import Place, place_of

F = TypeVar("F", bound=Callable[..., Any])


class _PlaceType(click.ParamType):  # type: ignore[type-arg]  # generic in newer releases only
    """Where a run lies: a folder, or an address such as s3://bucket/prefix."""

    name = "place"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Place:
        return place_of(value) if isinstance(value, str) else cast(Place, value)


PLACE = _PlaceType()
_FILTER = '{"term": {"language": "en"}}'

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
        from sparse_ingest.cluster.client import Connection

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


def engine_option(command: F) -> F:
    """How to ask an index; it goes over `engine` in [query]. Stands below the options that give `pipeline`."""

    @click.option(
        "--engine",
        type=click.Choice(["exact", "two-phase", "seismic"]),
        help="How to ask the index  [default: exact; of a sparse_vector field seismic]",
    )
    @functools.wraps(command)
    def with_engine(*args: Any, engine: Any, pipeline: Pipeline, **kwargs: Any) -> Any:
        if engine:
            pipeline = replace(pipeline, query=replace(pipeline.query, engine=engine))
        return command(*args, pipeline=pipeline, **kwargs)

    return cast(F, with_engine)


def filter_option(command: F) -> F:
    """Which documents may be found; the command receives the keyword `filter`, a query or None."""

    @click.option("--filter", "filter_text", metavar="JSON", help="Find only what this query matches; @FILE reads it")
    @functools.wraps(command)
    def with_filter(*args: Any, filter_text: str | None, **kwargs: Any) -> Any:
        return command(*args, filter=None if filter_text is None else _query_of(filter_text), **kwargs)

    return cast(F, with_filter)


def _query_of(text: str) -> dict[str, Any]:
    """The query in the text of --filter, or in the file that it names."""
    place = "--filter"
    if text.startswith("@"):
        place = f"--filter {text}"
        try:
            text = Path(text[1:]).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"{place} cannot be read: {first_line(error)}.") from error
    try:
        query = json.loads(text)
    except ValueError as error:
        raise UsageError(f"{place} is no JSON: {error}. An example: '{_FILTER}'.") from error
    if not isinstance(query, dict) or len(query) != 1:
        raise UsageError(f"{place} must be one query of OpenSearch, an object with one key, such as '{_FILTER}'.")
    return query
