"""The command `doctor`: check an installation and its cluster, and report what is missing."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from functools import partial
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from urllib.parse import quote

import click
from click.core import ParameterSource

from sparse_ingest.cli import installation
from sparse_ingest.cli.help import command
from sparse_ingest.cli.options import connection_options, json_option, print_report, terminal_width, wrapped
from sparse_ingest.cli.terminal import bold
from sparse_ingest.cluster.connection import Connection, parse_url
from sparse_ingest.errors import UsageError
from sparse_ingest.reporting import Check, checks_of
from sparse_ingest.storage.addresses import without_secrets
from sparse_ingest.storage.waiting import in_thread, left_behind

_WAIT_S = installation.TRIAL_S + 10  # for all findings together
_WIDTH = 120


@command()
@click.option("--index", metavar="NAME", help="Also check the rights of a load into this index, which need not exist")
@connection_options
@json_option
def doctor(index: str | None, connection: Connection, as_json: bool) -> int:
    """Check this installation and the cluster, and show what is missing.

    Checks Python and packages, CPU kernels and GPUs, folders, the model hub, and the cluster that --url or the
    SPARSE_INGEST_* variables name (it gets 10 s to answer). Changes nothing, and prints no user names, passwords or
    tokens: you can paste the output into a bug report.

    Exit code 1: something is broken, or the named cluster cannot be reached. A missing package is not an error.
    """
    source = click.get_current_context().get_parameter_source("url")
    hidden = _hidden(connection)
    found = [
        (section, one._replace(found=hidden(section, one.found), advice=hidden(section, one.advice)))
        for section, one in _findings(connection, index, is_given=source is not ParameterSource.DEFAULT)
    ]
    problems = [one.name for _, one in found if one.state == "problem"]
    content = {"ok": not problems, "checks": [{"section": section, **one._asdict()} for section, one in found]}
    print_report(as_json, content, _lines(found, problems))
    return 1 if problems else 0


def _findings(connection: Connection, index: str | None, *, is_given: bool) -> Iterator[tuple[str, Check]]:
    """Yield the findings, each with its section. They are collected at the same time, and each may fail."""
    asked: dict[str, Callable[[], Iterable[Check]]] = {
        "Installation": installation.python,
        "Packages": installation.packages,
        "Machine": installation.machine,
        "Computation": installation.trial,
        "Folders": installation.folders,
        "Model hub": installation.hub,
        "Local OpenSearch": installation.local_server,
        "Cluster": lambda: _cluster(connection, index, is_given=is_given),
    }
    replies = {name: in_thread(partial(checks_of, name, ask), name) for name, ask in asked.items()}
    for name, reply in replies.items():
        try:
            yield from ((name, one) for one in reply.result(_WAIT_S))
        except TimeoutError:
            left_behind.set()
            yield name, Check(name, "unknown", f"no answer within {_WAIT_S:g} s")


def _cluster(connection: Connection, index: str | None, *, is_given: bool) -> list[Check]:
    from sparse_ingest.cluster.diagnosis import check_cluster

    found = check_cluster(connection, index)
    lenient = (one._replace(state="missing") if one.state == "problem" else one for one in found)
    return found if is_given else list(lenient)


def _hidden(connection: Connection) -> Callable[[str, str], str]:
    """Return a function of a section and its text that removes users, passwords, and the user's name in paths."""
    user = password = None
    with suppress(UsageError):
        _, user, password = parse_url(connection.url)
    names = {user, password, connection.user, connection.password} - {None, ""}
    forms = sorted({form for name in names for form in (str(name), quote(str(name), ""))}, key=len, reverse=True)
    secrets = re.compile("|".join(rf"(?<!\w){re.escape(one)}(?!\w)" for one in forms) or "(?!)")
    home = Path.home()
    owner = re.compile(rf"(?<=/){re.escape(home.name or '/')}(?=[/\s]|$)")

    def hidden(section: str, text: str) -> str:
        text = without_secrets(text)
        if section == "Cluster":  # elsewhere a name such as `opensearch` is not a secret
            text = secrets.sub("***", text)
        return owner.sub("***", text.replace(f"{home}/", "~/"))

    return hidden


def _lines(found: list[tuple[str, Check]], problems: list[str]) -> Iterator[str]:
    width, margin = min(terminal_width(), _WIDTH), max(len(one.name) for _, one in found)
    for section, checks in groupby(found, key=itemgetter(0)):
        yield bold(section)
        for _, one in checks:
            first = f"  {one.state:<7}  {one.name:<{margin}}  "
            yield from wrapped(first, one.found, width)
            if one.advice:
                yield from wrapped(" " * len(first), one.advice, width)
        yield ""
    yield f"Broken: {', '.join(problems)}." if problems else "No problems found."
