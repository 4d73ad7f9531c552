"""Help: a heading for every command and option, no cut sentences, no lines wider than the terminal."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.metadata import version

import click
import pytest
from support.forked import command

from sparse_ingest.cli.help import COMMANDS_BY_HEADING, OPTIONS_BY_HEADING, Command, Group, long_name
from sparse_ingest.cli.main import cli


def every(found: click.Command, *names: str) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    """Each command and group with the names that lead to it."""
    yield names, found
    for name, inner in getattr(found, "commands", {}).items():
        yield from every(inner, *names, name)


ALL = dict(every(cli))


def test_every_command_has_one_heading() -> None:
    named = " ".join(COMMANDS_BY_HEADING.values()).split()
    assert len(named) == len(set(named))
    assert cli.commands.keys() - set(named) == set()


def test_every_option_has_one_heading() -> None:
    named = " ".join(OPTIONS_BY_HEADING.values()).split()
    commands = [entry for entry in ALL.values() if not isinstance(entry, click.Group)]
    options = {long_name(one) for entry in commands for one in entry.params if isinstance(one, click.Option)}
    assert len(named) == len(set(named))
    assert {"help", *options} - set(named) == set()


def test_every_command_has_our_help() -> None:
    assert [names for names, entry in ALL.items() if not isinstance(entry, Command | Group)] == []


@pytest.mark.parametrize("columns", [80, 120])
def test_no_line_is_wider_than_the_terminal(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    for names in ALL:
        lines = command("help", *names).out.splitlines()
        assert [line for line in lines if len(line) > columns] == [], names


def test_the_first_sentence_of_each_command_is_complete(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    for names in ((), ("index",), ("server",), ("pipelines",)):
        shown = command("help", *names).out
        assert "..." not in shown.partition("\n\n")[2]
        for entry in ALL[names].commands.values():  # type: ignore[attr-defined]
            first = (entry.help or "").partition("\n\n")[0].partition(". ")[0]
            assert " ".join(first.split()).rstrip(".") in " ".join(shown.split())


def test_help_shows_a_command_as_its_option_does() -> None:
    assert command("help", "index", "create").out == command("index", "create", "--help").out
    assert command("help").out == command("-h").out


def test_help_of_an_unknown_command_is_one_message() -> None:
    for names, message in {("nonesuch",): "No such command 'nonesuch'", ("load", "x"): "'sparse-ingest load'"}.items():
        code, out, err = command("help", *names)
        assert (code, out) == (2, "")
        assert message in err


def test_defaults_and_variables_are_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    shown = " ".join(command("help", "search").out.split())
    assert "[env var: SPARSE_INGEST_URL; default: http://127.0.0.1:9200]" in shown
    assert "[default: 10; x>=1]" in shown
    assert shown.index(" Index or run: --index") < shown.index(" Cluster: --url") < shown.index(" Output: ")


def test_the_short_option_prints_the_version() -> None:
    assert command("-V").out == command("--version").out == f"sparse-ingest, version {version('sparse-ingest')}\n"
