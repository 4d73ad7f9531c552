"""Help pages with headings, and the command `help`.

COMMANDS_BY_HEADING and OPTIONS_BY_HEADING have the heading of every command and option; a test fails if one has none.
Lines are as wide as the terminal, at most WIDTH.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click
from click.shell_completion import CompletionItem

WIDTH = 120

COMMANDS_BY_HEADING = {
    "First steps": "demo doctor help",
    "Models": "pipelines inspect idf",
    "Run folders": "encode status report",
    "Indexes": "index load verify",
    "Search": "search query show evaluate plan serve",
    "Local OpenSearch": "server",
}
OPTIONS_BY_HEADING = {
    "Input": "corpus format columns quoting id-field text-field title-field keep no-text limit on-bad-document "
    "allow-empty dry-run queries qrels nano-beir nano-beir-data sample text as query doc",
    "Index or run": "index alias to run field kind map body force yes",
    "Model": "model pipeline set trust-remote-code",
    "Encoding": "max-length device dtype batch-tokens weights shard-rows reuse dedup-text trust-corpus",
    "Several machines": "executor address workers worker-cpus worker-gpus accelerator plan-only part finish",
    "Pruning": "top-k max-ratio min-weight alpha-mass loss",
    "Loading": "replace from-scratch partial update since delete-missing retry-dead merge max-rate tune "
    "async-translog drop-old allow-fewer restore",
    "Search": "size filter collapse engine hybrid hybrid-weights hybrid-normalization hybrid-combination concurrency "
    "allow-partial stored bm25 compare ignore-identical-ids measure cost analyzer without-plugin product",
    "Pipelines on the server": "search-pipeline ingest-pipeline model-id default",
    "Cluster": "url user password api-key ca client-cert client-key aws-region aws-service timeout",
    "Server": "host port token-file time-limit max-requests heap data with-ml keep-server folder",
    "Output": "out plan verify all explain trec trec-run per-query table json verbose quiet help",
}


class Command(click.Command):
    """A command whose help lists its options under headings."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the options."""
        options = [one for one in self.get_params(ctx) if isinstance(one, click.Option)]
        rows = {long_name(one): record for one in options if (record := one.get_help_record(ctx)) is not None}
        _write(rows, OPTIONS_BY_HEADING, "Options", formatter)


class Group(click.Group):
    """A group of commands; the help of the main one lists them under headings."""

    command_class = Command

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the commands, each with the complete first sentence of its help, then the options."""
        rows = {name: (name, entry.get_short_help_str(1000)) for name, entry in self.commands.items()}
        _write(rows, {} if ctx.parent else COMMANDS_BY_HEADING, "Commands", formatter)
        click.Command.format_options(self, ctx, formatter)


def command(name: str | None = None) -> Callable[[Callable[..., Any]], Command]:
    """Make a function a command with this help; used as `click.command`."""
    return click.command(name, cls=Command)


def long_name(option: click.Parameter) -> str:
    """Return the name of an option in OPTIONS_BY_HEADING, without dashes."""
    return max(option.opts, key=len).lstrip("-")


def _write(
    rows: dict[str, tuple[str, str]], headings: dict[str, str], rest: str, formatter: click.HelpFormatter
) -> None:
    """Write the rows under their headings, and those without one under `rest`."""
    under = {heading: [name for name in names.split() if name in rows] for heading, names in headings.items()}
    under[rest] = [name for name in rows if not any(name in names for names in under.values())]
    for heading, names in under.items():
        if names:
            with formatter.section(heading):
                formatter.write_dl([rows[name] for name in names])


def _complete(ctx: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Complete the name of a command, or of a subcommand of the names before it."""
    found: click.Command = ctx.find_root().command
    for name in ctx.params.get("names") or ():
        found = found.commands.get(name, found) if isinstance(found, click.Group) else found
    return [
        CompletionItem(name, help=entry.get_short_help_str(1000))
        for name, entry in getattr(found, "commands", {}).items()
        if name.startswith(incomplete)
    ]


@command("help")
@click.argument("names", nargs=-1, metavar="[COMMAND]...", shell_complete=_complete)
@click.pass_context
def help_command(ctx: click.Context, names: tuple[str, ...]) -> None:
    """Show the help of a command.

    \b
    sparse-ingest help load
    sparse-ingest help index create
    """
    shown = ctx.find_root()
    for name in names:
        if not isinstance(shown.command, click.Group):
            raise click.UsageError(f"{shown.command_path!r} has no subcommand {name!r}.", shown)
        found = shown.command.resolve_command(shown, [name])[1]
        if found is not None:
            shown = click.Context(found, shown, name)
    click.echo(shown.get_help())
