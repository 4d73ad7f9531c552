"""The `sparse-ingest` command: its groups, where errors become messages and exit codes, and the standard streams.

Characters that a stream cannot encode are escaped, as `\\u2014`. Output to a closed stream is discarded.
A terminal shows control characters (terminal.py).
"""

from __future__ import annotations

import codecs
import errno
import io
import logging
import os
import sys
from importlib.metadata import version
from pathlib import Path
from typing import TextIO

import click

from sparse_ingest.cli import demo, encoding, evaluating, indexing, inspecting, loading, planning, searching, server
from sparse_ingest.cli.terminal import guarded
from sparse_ingest.errors import SparseIngestError
from sparse_ingest.storage.waiting import left_behind

_AGAIN = "then start the same command again: what is finished is kept."
_ADVICE = {
    errno.ENOSPC: f" Free space there (or, for temporary files, set TMPDIR to another folder), {_AGAIN}",
    errno.EDQUOT: f" Free space there, or raise the quota, {_AGAIN}",
    errno.EROFS: " Give a path that can be written.",
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
    sys.stdout, sys.stderr = guarded(_escaping(sys.stdout)), guarded(_escaping(sys.stderr), is_log=True)
    # The library is silent without a handler.
    logger, handler = logging.getLogger("sparse_ingest"), logging.StreamHandler()
    handler.setLevel(logging.WARNING)
    logger.addHandler(handler)
    try:
        code = _run()
    finally:
        logger.removeHandler(handler)
        _drop_unwritable()
    code = code if isinstance(code, int) else 0
    if left_behind.is_set():
        os._exit(code)
    sys.exit(code)


def _run() -> object:
    """Run the command, and return its exit code."""
    try:
        code = cli.main(standalone_mode=False)
        sys.stdout.flush()
        return code
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
    except UnicodeEncodeError as error:
        part = ascii(error.object[max(0, error.start - 40) : error.end + 40])
        click.echo(
            f"Error: {part} cannot be written in {error.encoding}. Give names and arguments in UTF-8, and set a UTF-8 "
            "locale (LC_ALL=C.UTF-8).",
            err=True,
        )
        return 1
    except OSError as error:
        # Arrow puts more than the system's message into strerror.
        reason = os.strerror(error.errno) if error.errno else str(error)
        click.echo(f"Error: {error.filename or 'The system'}: {reason}.{_ADVICE.get(error.errno or 0, '')}", err=True)
        return 1


class _Ascii(io.TextIOWrapper):
    """An ASCII stream that reports Latin-1 as its encoding, because click writes UTF-8 to streams that report ASCII."""

    encoding = "latin-1"


def _escaping(stream: TextIO | None) -> TextIO:
    """Return a standard stream that escapes what it cannot encode."""
    if stream is None:  # closed, as by `2>&-`
        return Path(os.devnull).open("w", encoding="utf-8")
    if isinstance(stream, io.TextIOWrapper):
        stream.reconfigure(errors="backslashreplace")
        if codecs.lookup(stream.encoding).name == "ascii":
            return _Ascii(stream.buffer, "ascii", stream.errors, line_buffering=stream.line_buffering)
    return stream


def _drop_unwritable() -> None:
    """Drop output that a closed pipe or a full disk did not take: Python would try to write it again at exit."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
