"""Output on standard error: -q, -v, -vv, and one handler for the log records of all commands.

Notes of a stage are records of level NOTE, warnings of WARNING. -q leaves warnings and errors, -v adds INFO, -vv adds
DEBUG and the requests to the cluster (opensearch-py, urllib3). Credentials are removed from every record.
"""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Iterator

import click
from tqdm import tqdm

from sparse_ingest.errors import UsageError
from sparse_ingest.reporting import NOTE
from sparse_ingest.storage.addresses import without_headers, without_secrets

_OURS, _LIBRARIES = "sparse_ingest", ("opensearch", "urllib3")
_LEVELS = (NOTE, logging.INFO, logging.DEBUG)  # by the number of -v
_MAX_CHARACTERS = 2000  # of a record of DEBUG: bodies of bulk requests have megabytes


class _Handler(logging.Handler):
    """Writes records to standard error, above progress bars, without credentials. Details are cut."""

    def emit(self, record: logging.LogRecord) -> None:
        with tqdm.external_write_mode(file=sys.stderr):
            click.echo(self.format(record), err=True)

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        if record.name.startswith(_OURS) and record.levelno >= NOTE:
            return text
        if (more := len(text) - _MAX_CHARACTERS) > 0:
            text = f"{text[:_MAX_CHARACTERS]} ... ({more:,} more characters)"
        return without_secrets(without_headers(f"{record.name}: {text}"))


_HANDLER = _Handler()


@contextlib.contextmanager
def to_stderr() -> Iterator[None]:
    """Write the records of this package to standard error in the block. The library is silent without a handler."""
    logging.getLogger(_OURS).addHandler(_HANDLER)
    logging.getLogger(_OURS).setLevel(NOTE)
    try:
        yield
    finally:
        for name in (_OURS, *_LIBRARIES):
            logging.getLogger(name).removeHandler(_HANDLER)
            logging.getLogger(name).setLevel(logging.NOTSET)


def with_verbosity(command: click.Command) -> click.Command:
    """Add -v and -q to a command, or to all commands of a group."""
    for each in command.commands.values() if isinstance(command, click.Group) else ():
        with_verbosity(each)
    command.params += [
        click.Option(["-v", "--verbose"], count=True, expose_value=False, callback=_set_level,
                     help="Print more: the kernels and tokenizer in use; -vv: also requests to the cluster"),
        click.Option(["-q", "--quiet"], is_flag=True, expose_value=False, callback=_set_level,
                     help="Print warnings and errors only, no progress"),
    ]  # fmt: skip
    return command


def _set_level(context: click.Context, option: click.Parameter, count: int) -> None:
    if not count:
        return
    level = logging.WARNING if option.name == "quiet" else _LEVELS[min(count, 2)]
    if context.meta.setdefault(__name__, level) != level:
        raise UsageError("-v and -q cannot be combined. Pass one of them, once.")
    logging.getLogger(_OURS).setLevel(level)
    for name in _LIBRARIES if level == logging.DEBUG else ():
        logging.getLogger(name).addHandler(_HANDLER)
        logging.getLogger(name).setLevel(level)
