"""The `sparse-ingest` command: its subcommands, errors as messages and exit codes, and the standard streams.

Characters that a stream cannot encode are escaped, as `\\u2014`. Output to a closed stream is discarded. If standard
error fails (full disk, closed terminal), its messages are lost and the command continues.
"""

from __future__ import annotations

import codecs
import contextlib
import errno
import io
import os
import signal
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any, TextIO

import click

from sparse_ingest.cli import (
    demo,
    doctor,
    encoding,
    evaluating,
    help,
    indexing,
    inspecting,
    loading,
    querying,
    reports,
    searching,
    server,
    serving,
    showing,
)
from sparse_ingest.cli.options import drop_output
from sparse_ingest.cli.terminal import guarded
from sparse_ingest.cli.verbosity import to_stderr, with_verbosity
from sparse_ingest.errors import SparseIngestError
from sparse_ingest.storage.waiting import handling_signals, left_behind

_AGAIN = "then start the same command again: finished work is kept."
# Of the errors that a thread or a shared library without memory raises.
_MEMORY = ("start new thread", "failed to map segment", "allocate memory")
_ADVICE = {
    errno.ENOSPC: f" Free space there (or, for temporary files, set TMPDIR to another folder), {_AGAIN}",
    errno.EDQUOT: f" Free space there, or raise the quota, {_AGAIN}",
    errno.EROFS: " Give a path that can be written.",
}


@click.group(cls=help.Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": help.WIDTH})
@click.version_option(version("sparse-ingest"), "-V", "--version", prog_name="sparse-ingest")
def cli() -> None:
    """Encode text with SPLADE models, load the vectors into OpenSearch or Elasticsearch, and search them.

    \b
    sparse-ingest encode --model MODEL --corpus corpus.jsonl --out RUN
    sparse-ingest load   RUN --index NAME
    sparse-ingest search --index NAME "your question"
    """


for command in (
    demo.demo, doctor.doctor, help.help_command, inspecting.pipelines, inspecting.inspect, indexing.idf,
    encoding.encode, encoding.status, indexing.index, loading.load, loading.verify, searching.search, querying.query,
    showing.show, evaluating.evaluate, evaluating.plan, reports.report, serving.serve, server.server,
):  # fmt: skip
    cli.add_command(with_verbosity(command))


def main() -> None:
    """Run the command line and exit. A `SparseIngestError` is printed as one message."""
    _open_closed()
    sys.stdout = guarded(_escaping(sys.stdout))
    sys.stderr = guarded(_escaping(sys.stderr, lenient=True), is_log=True)
    try:
        with to_stderr(), handling_signals(signal.default_int_handler):
            code = _run()
    finally:
        for stream in (sys.stdout, sys.stderr):
            drop_output(stream)
    code = code if isinstance(code, int) else 0
    if left_behind.is_set():
        os._exit(code)
    sys.exit(code)


def _run() -> object:
    """Run the command, and return its exit code."""
    try:
        code = cli.main(prog_name="sparse-ingest", standalone_mode=False)
        sys.stdout.flush()
        return code
    except click.exceptions.Abort:
        click.echo("Interrupted; finished work is kept.", err=True)
        return 130
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except SparseIngestError as error:
        click.echo(f"Error: {error}", err=True)
        return error.exit_code
    except BrokenPipeError:
        return 1  # the reader closed the pipe
    except UnicodeEncodeError as error:
        part = ascii(error.object[max(0, error.start - 40) : error.end + 40])
        click.echo(
            f"Error: {part} cannot be encoded as {error.encoding}. Pass names and arguments in UTF-8, and set a UTF-8 "
            "locale (LC_ALL=C.UTF-8).",
            err=True,
        )
        return 1
    except (MemoryError, RuntimeError, ImportError) as error:
        if not isinstance(error, MemoryError) and not any(words in str(error) for words in _MEMORY):
            raise
        limits = "ulimit -v and -u, the limit of the container"
        click.echo(f"Error: out of memory. Give the command more ({limits}), {_AGAIN}", err=True)
        return 1
    except OSError as error:
        # Arrow puts more than the system's message into strerror.
        reason = os.strerror(error.errno) if error.errno else str(error)
        click.echo(f"Error: {error.filename or 'The system'}: {reason}.{_ADVICE.get(error.errno or 0, '')}", err=True)
        return 1


def _open_closed() -> None:
    """Open the null device for each closed standard stream: otherwise the next opened file gets its descriptor."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest free descriptor


class _Ascii(io.TextIOWrapper):
    """An ASCII stream that reports Latin-1 as its encoding, because click writes UTF-8 to streams that report ASCII."""

    encoding = "latin-1"


class _Lenient(io.FileIO):
    """A file that discards what cannot be written."""

    def write(self, content: Any) -> int:
        with contextlib.suppress(OSError):
            return super().write(content)
        return len(content)


def _escaping(stream: TextIO | None, *, lenient: bool = False) -> TextIO:
    """Return the stream so that it escapes what it cannot encode."""
    if stream is None:  # closed, as by `2>&-`
        return Path(os.devnull).open("w", encoding="utf-8")
    if isinstance(stream, io.TextIOWrapper):
        stream.reconfigure(errors="backslashreplace")
        buffer, is_ascii = stream.buffer, codecs.lookup(stream.encoding).name == "ascii"
        if lenient and isinstance(buffer, io.BufferedWriter | io.FileIO):
            buffer = io.BufferedWriter(_Lenient(buffer.fileno(), "w", closefd=False))
        if is_ascii or lenient:
            kind = _Ascii if is_ascii else io.TextIOWrapper
            # On a terminal Python passes every write on; here a bar must end its line before the report is printed.
            return kind(buffer, stream.encoding, stream.errors, line_buffering=lenient or stream.line_buffering)
    return stream
