"""Run `sparse-ingest` in this process, or in a forked process that has torch loaded and can be killed.

A new interpreter takes 5 s to import torch; a fork of multiprocessing's server takes none. The server only imports, so
a fork loses no torch thread.
"""

from __future__ import annotations

import contextlib
import io
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import NamedTuple
from unittest import mock

PRELOADED = (
    "sparse_ingest.cli.main", "sparse_ingest.encoding.encode", "sparse_ingest.serving.running",
    "sparse_ingest.models.documents", "sparse_ingest.models.precision",
    "transformers.models.bert.modeling_bert", "transformers.models.auto.modeling_auto", "safetensors.torch",
    "transformers.models.auto.tokenization_auto", "transformers.tokenization_utils_tokenizers", "llvmlite.binding",
    "sparse_ingest.corpora.files", "sparse_ingest.corpora.memory", "sparse_ingest.checkpoints.inspect",
    "support.checkpoints", "pytest",
)  # fmt: skip


class Answer(NamedTuple):
    """Exit code and output of a command."""

    code: int
    out: str
    err: str


def command(*arguments: object) -> Answer:
    """Run `sparse-ingest ARGUMENTS` in this process, with the errors and exit codes of the command line."""
    with _arguments(arguments), contextlib.redirect_stdout(io.StringIO()) as out:
        with contextlib.redirect_stderr(io.StringIO()) as err:
            return Answer(_main(), out.getvalue(), err.getvalue())


def start(*arguments: object, log: Path, prepare: Callable[[], object] | None = None) -> BaseProcess:
    """Start `sparse-ingest ARGUMENTS` in its own process, after `prepare`; append its output to `log`."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(PRELOADED))
    # The server keeps the environment of its first use, so pass the current one.
    given = ([str(argument) for argument in arguments], str(log), dict(os.environ), prepare)
    process = context.Process(target=_child, args=given)
    process.start()
    return process


def set_window_rows(rows: int) -> None:
    """Set the size of a window of `encode`, otherwise 8192."""
    from sparse_ingest.encoding import shard_maker

    shard_maker.PART_ROWS = rows  # type: ignore[attr-defined]


def _child(arguments: list[str], log: str, environment: dict[str, str], prepare: Callable[[], object] | None) -> None:
    os.environ.clear()
    os.environ.update(environment)
    # A shell ignores SIGINT for background jobs, and the tests and their children inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if prepare:
        prepare()
    with Path(log).open("a", buffering=1) as stream, _arguments(arguments):
        with contextlib.redirect_stdout(stream), contextlib.redirect_stderr(stream):
            code = _main()
    sys.exit(code)


def _main() -> int:
    from sparse_ingest.cli import main

    try:
        # After an abandoned wait main() exits the process immediately, which here would end the tests.
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
