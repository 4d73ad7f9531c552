"""Options that several commands share, each group one decorator; those of a stage come from its dataclass."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable
from dataclasses import Field, fields, replace
from pathlib import Path
from typing import Any, Literal, TypeVar, cast, get_args, get_origin, get_type_hints

import click

from sparse_ingest.errors import UsageError, first_line
from sparse_ingest.pipeline import EngineName, ModelSettings, Pipeline, override, read_pipeline
from sparse_ingest.storage.places import Place, place_of

F = TypeVar("F", bound=Callable[..., Any])


class _PlaceType(click.ParamType):  # type: ignore[type-arg]  # generic in newer releases only
    """Where a run lies: a folder, or an address such as s3://bucket/prefix."""

    name = "place"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Place:
        return place_of(value) if isinstance(value, str) else cast(Place, value)


class _NamesType(click.ParamType):  # type: ignore[type-arg]
    """Names with commas between them."""

    name = "names"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, ...]:
        return tuple(value.split(",")) if isinstance(value, str) else tuple(value)


PLACE = _PlaceType()
_NAMES = _NamesType()
_FILTER = '{"term": {"language": "en"}}'

json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON on standard output")


def stage_options(kind: type[Any], omitted: tuple[str, ...] = ()) -> Callable[[F], F]:
    """One option for each setting of a dataclass that has a help text; the command receives the keyword `options`."""
    hints = get_type_hints(kind)
    entries = [entry for entry in fields(kind) if entry.metadata.get("help") and entry.name not in omitted]

    def decorate(command: F) -> F:
        @functools.wraps(command)
        def with_options(*args: Any, **kwargs: Any) -> Any:
            given = {entry.name: kwargs.pop(entry.name) for entry in entries}
            return command(*args, options=kind(**given), **kwargs)

        wrapped: Callable[..., Any] = with_options
        for entry in reversed(entries):
            wrapped = _option_of(entry, hints[entry.name])(wrapped)
        return cast(F, wrapped)

    return decorate


def _option_of(entry: Field[Any], hint: Any) -> Callable[[Any], Any]:
    """The option of one setting; its type decides what may be given."""
    settings: dict[str, Any] = {"help": entry.metadata["help"], "metavar": entry.metadata["metavar"]}
    kinds = [each for each in get_args(hint) or (hint,) if each is not type(None)]
    if get_origin(hint) is Literal:
        kinds = [hint]
    if kinds == [bool]:
        settings["is_flag"] = True
    elif get_origin(kinds[0]) is Literal:
        settings["type"] = click.Choice(get_args(kinds[0]))
    elif get_origin(kinds[0]) is tuple or get_origin(hint) is tuple:
        settings |= {"type": _NAMES} if entry.default is None else {"multiple": True}
    elif Path in kinds:
        settings["type"] = PLACE
    elif kinds[0] is int:
        settings["type"] = click.IntRange(min=1)
    elif kinds[0] is float:
        low, high = entry.metadata["range"]
        settings["type"] = click.FloatRange(low, None if high == math.inf else high, min_open=high == math.inf)
    if entry.default not in (None, False, ()):
        settings |= {"default": entry.default, "show_default": True}
    return click.option(f"--{entry.name.replace('_', '-')}", entry.name, **settings)


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
        type=click.Choice(get_args(EngineName)),
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
