"""The `sparse-ingest` command: in this process, or in one that is forked with torch in it already and can be killed.

A fresh interpreter takes five seconds to import torch; a fork of multiprocessing's server takes none. The server
imports and never computes, so no thread of torch is lost by forking it.
"""

from __future__ import annotations

import contextlib
import io
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import NamedTuple
from unittest import mock

PRELOADED = (
    "sparse_ingest.cli.main", "sparse_ingest.encoding.encode",
    "sparse_ingest.models.documents", "sparse_ingest.models.precision",
    "transformers.models.bert.modeling_bert", "transformers.models.auto.modeling_auto", "safetensors.torch",
)  # fmt: skip


class Answer(NamedTuple):
    """What a command gave."""

    code: int
    out: str
    err: str


def command(*arguments: object) -> Answer:
    """Run `sparse-ingest ARGUMENTS` here, errors and exit codes as on the command line."""
    with _arguments(arguments), contextlib.redirect_stdout(io.StringIO()) as out:
        with contextlib.redirect_stderr(io.StringIO()) as err:
            return Answer(_main(), out.getvalue(), err.getvalue())


def start(*arguments: object, log: Path) -> BaseProcess:
    """Begin `sparse-ingest ARGUMENTS` in a process of its own; its output is added to `log`."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(PRELOADED))
    # The server has the environment of its first use.
    given = ([str(argument) for argument in arguments], str(log), dict(os.environ))
    process = context.Process(target=_child, args=given)
    process.start()
    return process


def _child(arguments: list[str], log: str, environment: dict[str, str]) -> None:
    os.environ.clear()
    os.environ.update(environment)
    # A shell lets what it runs in the background ignore Ctrl-C, the tests and all that they start too.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with Path(log).open("a", buffering=1) as stream, _arguments(arguments):
        with contextlib.redirect_stdout(stream), contextlib.redirect_stderr(stream):
            code = _main()
    sys.exit(code)


def _main() -> int:
    from sparse_ingest.cli import main

    try:
        # After a wait that was given up main() ends the process at once, which here would be that of the tests.
        with mock.patch.object(main, "left_behind", threading.Event()):
            main.main()
    except SystemExit as end:
        return int(end.code or 0)
    raise AssertionError("main() always exits")


@contextlib.contextmanager
def _arguments(arguments: object) -> Iterator[None]:
    before = sys.argv
    sys.argv = ["sparse-ingest", *map(str, arguments)]  # type: ignore[call-overload]
    try:
        yield
    finally:
        sys.argv = before
