"""Options that several commands share: one decorator for each group. Options of a stage come from its dataclass."""

from __future__ import annotations

import functools
import json
import math
import os
import shutil
import sys
import textwrap
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import Field, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, TextIO, TypeVar, cast, get_args, get_origin, get_type_hints

import click
from click.core import ParameterSource

from sparse_ingest.cli.completion import RUN, PipelineName
from sparse_ingest.cli.terminal import bold, one_line
from sparse_ingest.cluster.connection import Connection
from sparse_ingest.errors import UsageError, first_line
from sparse_ingest.pipeline import EngineName, FieldType, Pipeline, option, override, pipeline_of
from sparse_ingest.reporting import aligned
from sparse_ingest.storage.foreign_json import MAX_BYTES, parse_json

F = TypeVar("F", bound=Callable[..., Any])
Option = Callable[[Any], Any]  # what click.option returns

_FILTER = '{"term": {"language": "en"}}'

json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON on standard output")


def print_json(value: object, indent: int | None = 2) -> None:
    """Print `value` as JSON; characters beyond ASCII are escaped if standard output is not in a UTF encoding."""
    is_utf = (sys.stdout.encoding or "utf-8").lower().startswith("utf")
    click.echo(json.dumps(value, ensure_ascii=not is_utf, indent=indent))


def print_report(as_json: bool, content: object, lines: Iterable[str]) -> None:
    """Print `content` as JSON, or `lines`, each on one line of a terminal."""
    if as_json:
        print_json(content)
    else:
        for line in lines:
            click.echo(one_line(line))


def terminal_width() -> int:
    """Return the columns of the terminal, or of COLUMNS; a large number for a file or pipe."""
    return shutil.get_terminal_size((1 << 16, 24)).columns


def print_table(as_json: bool, content: object, headings: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print `content` as JSON, or a table.

    If a row does not fit into the terminal, each is printed as one block: the first cell, and below it a line for each
    other cell. Output to a file or pipe is always a table.
    """
    width, margin = terminal_width(), max(map(len, headings[1:]))
    table = aligned([headings, *rows], str.ljust)
    if len(table[0]) <= width:
        print_report(as_json, content, (line.rstrip() for line in table) if rows else ())
        return
    lines: list[str] = []
    for row in rows:
        lines.append(bold(row[0]))
        for label, cell in zip(headings[1:], row[1:], strict=True):
            lines += wrapped(f"  {label:<{margin}}  ", cell, width)
    print_report(as_json, content, lines)


def wrapped(first: str, text: str, width: int) -> list[str]:
    """Return `first` and a text as lines of at most `width`; the text starts in the same column of each."""
    return textwrap.wrap(
        text,
        max(width, 40),
        initial_indent=first,
        subsequent_indent=" " * len(first),
        break_long_words=False,
        break_on_hyphens=False,
    )


def print_result(as_json: bool, content: object, lines: Iterable[str]) -> None:
    """Print the report of finished work. If standard output fails, print a note: the work is done."""
    try:
        print_report(as_json, content, lines)
    except OSError as error:
        drop_output(sys.stdout)
        click.echo(f"Done, but the report could not be written to standard output: {error.strerror}.", err=True)


def drop_output(stream: TextIO) -> None:
    """Discard what a closed pipe or a full disk refused: Python would try to write it again at exit."""
    try:
        stream.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def utf8_text(argument: str) -> str:
    """Decode an argument as UTF-8 in every locale. Raise `UsageError` if it is not UTF-8."""
    try:
        argument.encode()
    except UnicodeEncodeError:
        try:
            return os.fsencode(argument).decode()
        except UnicodeError:
            raise UsageError(f"{ascii(argument)} is not valid UTF-8. Pass it in UTF-8.") from None
    return argument


def joined_options(
    keyword: str, build: Callable[..., object], options: dict[str, Option], *given: str
) -> Callable[[F], F]:
    """Add options; the command receives `keyword`, the result of `build` on their values.

    `build` also receives `given`, the keywords of decorators above.
    """

    def decorate(command: F) -> F:
        @functools.wraps(command)
        def joined(*args: Any, **kwargs: Any) -> Any:
            values = {name: kwargs.pop(name) for name in (*options, *given)}
            return command(*args, **{keyword: build(**values)}, **kwargs)

        wrapped: Any = joined
        for add in reversed(options.values()):
            wrapped = add(wrapped)
        return cast(F, wrapped)

    return decorate


def refuse_flags(names: Collection[str], why: str) -> None:
    """Refuse options on the command line that would have no effect; environment variables are ignored."""
    context = click.get_current_context()
    for given in context.command.params:
        if given.name in names and context.get_parameter_source(given.name) is ParameterSource.COMMANDLINE:
            raise UsageError(f"{given.opts[-1]} {why}. Omit it.")


def stage_options(kind: type[Any], *omitted: str, **types: click.ParamType[Any]) -> Callable[[F], F]:
    """Add an option for each setting with a help text; the command receives the keyword `options`, a `kind`.

    `omitted` settings get no option; `types` restrict the values of options.
    """
    return joined_options("options", kind, _options_of(kind, *omitted, **types))


def _options_of(kind: type[Any], *omitted: str, **types: click.ParamType[Any]) -> dict[str, Option]:
    hints = get_type_hints(kind)
    entries = [entry for entry in fields(kind) if entry.metadata.get("help") and entry.name not in omitted]
    return {entry.name: _option_of(entry, hints[entry.name], types.get(entry.name)) for entry in entries}


def _option_of(entry: Field[Any], hint: Any, given: click.ParamType[Any] | None) -> Option:
    settings: dict[str, Any] = {"help": entry.metadata["help"], "metavar": entry.metadata["metavar"]}
    if variable := entry.metadata["env"]:
        settings |= {"envvar": variable, "show_envvar": True}
    kind = hint if get_origin(hint) in (Literal, tuple) else (get_args(hint) or (hint,))[0]
    choices, kind = get_args(kind), get_origin(kind) or kind
    settings["metavar"] = settings["metavar"] or {int: "N", float: "X"}.get(kind)
    if given:
        settings["type"] = given
    elif kind is bool:
        settings |= {"is_flag": True, "default": entry.default}
    elif kind is tuple and entry.default is not None:
        settings["multiple"] = True
        if entry.metadata["commas"]:
            settings["callback"] = lambda _context, _option, given: tuple(
                name for text in given for name in text.split(",")
            )
    elif kind is dict:
        settings |= {"multiple": True, "callback": _assigned}
    elif kind is Literal:
        settings["type"] = click.Choice(choices)
    elif kind is float:
        low, high = entry.metadata["range"]
        settings["type"] = click.FloatRange(low, None if high == math.inf else high, min_open=high == math.inf)
    else:
        settings["type"] = _numbers if float in choices else _TYPES.get(kind)
    if entry.default not in (None, False, ()):
        settings |= {"default": entry.default, "show_default": True}
    flags = entry.metadata["flags"] or f"--{entry.name.replace('_', '-')}"
    return click.option(*flags.split(), entry.name, **settings)


def _numbers(text: str) -> tuple[float, ...]:
    """Return the numbers of an option such as `--hybrid-weights 0.3,0.7`."""
    try:
        first, second = map(float, text.split(","))
    except ValueError:
        raise click.BadParameter(f"{text!r} is not two numbers, such as 0.3,0.7.") from None
    return first, second


def _assigned(_context: object, option: click.Parameter, given: tuple[str, ...]) -> dict[str, str] | None:
    """Return the pairs of an option such as `--map price=float --map year=integer`."""
    found: dict[str, str] = {}
    for text in given:
        name, _, value = text.rpartition("=")
        if not name or found.setdefault(name, value) != value:
            what = f"{name!r} is {found[name]} and {value}" if name else f"{text!r} is not {option.metavar}"
            raise UsageError(f"{option.opts[0]}: {what}. Give each field once, such as price=float.")
        if value not in get_args(FieldType):
            expected = ", ".join(get_args(FieldType))
            raise UsageError(f"{option.opts[0]}: the type of {name!r} is {value!r}; expected one of {expected}.")
    return found or None


def _query_of(text: str) -> dict[str, Any]:
    """Return the query in the text of --filter, or in the file after "@"."""
    content: bytes | str = (text := utf8_text(text))
    place = f"--filter {text}" if text.startswith("@") else "--filter"
    try:
        if text.startswith("@"):
            with Path(text[1:]).open("rb") as file:  # also a pipe
                content = file.read(MAX_BYTES + 1)
        query = parse_json(content)
    except OSError as error:
        raise UsageError(f"{place} cannot be read: {first_line(error)}.") from error
    except ValueError as error:
        raise UsageError(f"{place} is not JSON: {first_line(error)}. Example: '{_FILTER}'.") from error
    if query is None:  # in Python None is no filter
        raise UsageError(f"{place} is null; expected one query, such as '{_FILTER}'.")
    return cast(dict[str, Any], query)  # SearchOptions refuses what is not one query


# Type of a setting to the converter of its option.
_TYPES: dict[Any, Any] = {
    int: click.IntRange(min=1),
    Path: RUN,
    tuple: lambda text: tuple(text.split(",")),
    Mapping: _query_of,
}


@dataclass(frozen=True)
class _PipelineFlags:
    """Options that name and change a pipeline. `argument` is the model of a command that takes it without --model."""

    argument: str | None = None
    model: str | None = option(None, "Model: hub id, folder, or package:NAME/PATH", metavar="M")
    trust_remote_code: bool = option(False, "Run the Python code of a checkpoint with a custom architecture")
    file: str | None = option(None, "Pipeline file, or name of a packaged pipeline", metavar="P", flags="--pipeline")
    assignments: tuple[str, ...] = option(
        (), "Override a setting; repeatable", metavar="TABLE.KEY=VALUE", flags="--set"
    )
    engine: EngineName | None = option(None, "Search method  [default: exact, or seismic for sparse_vector]")

    @classmethod
    def pipeline(cls, tables: Sequence[str], **given: Any) -> Pipeline:
        """Return the pipeline; `tables` are those that --set may change."""
        flags = cls(**given)
        if flags.model and flags.argument:
            raise UsageError(f"The model is {flags.argument!r} and --model {flags.model!r}. Give it once.")
        pipeline = pipeline_of(flags.model or flags.argument or None, flags.file or None)
        if flags.trust_remote_code:
            pipeline = replace(pipeline, model=replace(pipeline.model, trust_remote_code=True))
        pipeline = override(pipeline, flags.assignments, tables)
        return replace(pipeline, query=replace(pipeline.query, engine=flags.engine)) if flags.engine else pipeline


def pipeline_options(tables: str, *omitted: str, **instead: Option) -> Callable[[F], F]:
    """Add the options that name and change a pipeline; the command receives the keyword `pipeline`.

    Its model is None unless named. `tables`, separated by spaces, are the tables that --set may change. `omitted`
    settings get no option; `instead` has options that replace the settings' own.
    """
    build = functools.partial(_PipelineFlags.pipeline, tables.split())
    return joined_options("pipeline", build, {**_options_of(_PipelineFlags, *omitted, file=PipelineName()), **instead})


NO_MODEL = ("model", "trust_remote_code", "engine")  # omitted by commands that neither encode nor search
# The command receives the keyword `connection`, a `Connection`.
_FILES = dict.fromkeys(("ca", "client_cert", "client_key"), click.Path(exists=True, dir_okay=False))
_CONNECTION = _options_of(Connection, **_FILES)
CONNECTION_FLAGS = frozenset(_CONNECTION)
connection_options = joined_options("connection", Connection, _CONNECTION)
