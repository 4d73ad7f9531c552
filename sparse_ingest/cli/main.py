"""The `sparse-ingest` command: its groups, and the one place where errors become messages and exit codes."""

from __future__ import annotations

import errno
import logging
import os
import sys
from importlib.metadata import version

import click

from sparse_ingest.cli import demo, encoding, evaluating, indexing, inspecting, loading, planning, searching, server
from sparse_ingest.errors import SparseIngestError

_AGAIN = "then start the same command again: what is finished is kept."
_ADVICE = {
    errno.ENOSPC: f" Free space there (for temporary files, or set TMPDIR to another folder), {_AGAIN}",
    errno.EDQUOT: f" Free space there, or raise the quota, {_AGAIN}",
    errno.EROFS: " Name a place that can be written.",
}


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(version("sparse-ingest"), prog_name="sparse-ingest")
def cli() -> None:
    """Text corpora to learned-sparse vectors to OpenSearch.

    \b
    sparse-ingest encode --model MODEL --corpus corpus.jsonl --out RUN
    sparse-ingest load   RUN --index NAME
    sparse-ingest search --index NAME "your question"
    """


for group in (inspecting, encoding, indexing, loading, planning, searching, evaluating, server, demo):
    for command in group.COMMANDS:
        cli.add_command(command)


def main() -> None:
    """Run the command line; a `SparseIngestError` becomes one message and its exit code."""
    # The library is silent without a handler.
    logger, handler = logging.getLogger("sparse_ingest"), logging.StreamHandler()
    handler.setLevel(logging.WARNING)
    logger.addHandler(handler)
    try:
        code = _run()
    finally:
        logger.removeHandler(handler)
    sys.exit(code if isinstance(code, int) else 0)


def _run() -> object:
    """Run the command, and return its exit code."""
    try:
        return cli.main(standalone_mode=False)
    except click.exceptions.Abort:
        click.echo("Interrupted; what was finished is kept.", err=True)
        return 130
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except SparseIngestError as error:
        click.echo(f"Error: {error}", err=True)
        return error.exit_code
    except BrokenPipeError:
        return 1  # the reader of a pipe has enough
    except OSError as error:
        # Arrow puts more into strerror than the system says.
        reason = os.strerror(error.errno) if error.errno else str(error)
        click.echo(f"Error: {error.filename or 'The system'}: {reason}.{_ADVICE.get(error.errno or 0, '')}", err=True)
        return 1
