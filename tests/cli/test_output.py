"""Output that the terminal cannot encode, names that are not UTF-8, and closed streams."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from support.runs import make_run
from support.tables import write_table

from sparse_ingest.cli.main import main

FIELDS = {"first": {"title": "Br\u00f6tchen \u65e5\u672c \U0001f600 \u2014", "text": "how to catch it"}}
NOT_UTF8 = os.fsdecode(b"r\xff")


@pytest.fixture
def run_path(tmp_path: Path) -> Path:
    model = write_table(tmp_path / "model")
    return make_run(tmp_path / NOT_UTF8, {"first": {"catch": 1.5}}, fields=FIELDS, model=str(model)).path


def run_command(encoding: str, monkeypatch: pytest.MonkeyPatch, *arguments: object) -> tuple[object, str, str]:
    """Run a command on a terminal with this encoding. Return exit code, stdout and stderr."""
    monkeypatch.setattr(sys, "argv", ["sparse-ingest", *map(str, arguments)])
    streams = [io.TextIOWrapper(io.BytesIO(), encoding) for _ in range(2)]
    with contextlib.redirect_stdout(streams[0]), contextlib.redirect_stderr(streams[1]):
        with pytest.raises(SystemExit) as end:
            main()
        sys.stdout.flush()
        sys.stderr.flush()
    out, err = (stream.buffer.getvalue().decode(encoding) for stream in streams)
    return end.value.code, out, err


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "utf-8"])
def test_characters_that_a_terminal_cannot_encode_are_escaped(
    encoding: str, run_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    title = FIELDS["first"]["title"].encode(encoding, "backslashreplace").decode(encoding)
    code, out, err = run_command(encoding, monkeypatch, "search", "--run", run_path, "catch")
    assert code == 0, err
    assert title in out


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_json_is_valid_in_every_encoding(encoding: str, run_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code, out, err = run_command(encoding, monkeypatch, "search", "--run", run_path, "--json", "catch")
    assert code == 0, err
    assert json.loads(out.encode(encoding))["hits"][0]["fields"] == FIELDS["first"]
    queries = run_path.parent / "queries.tsv"
    queries.write_text("q\u00e9\tcatch\n", encoding="utf-8")
    _, out, _ = run_command(encoding, monkeypatch, "search", "--run", run_path, "--json", "--queries", queries)
    assert json.loads(out.encode(encoding))["query_id"] == "q\u00e9"


def test_a_name_that_is_not_utf8_is_escaped(run_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code, out, err = run_command("utf-8", monkeypatch, "status", "--json", run_path)
    assert code == 0, err
    assert json.loads(out)["run"] == str(run_path)
    code, out, err = run_command("utf-8", monkeypatch, "status", f"{run_path}-lost")
    assert (code, out) == (1, "")
    assert "r\\udcff-lost is not a run" in err


def test_a_query_text_is_decoded_as_utf8(run_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # How Python decodes arguments in an ASCII locale. The model strips the accent.
    typed = "c\u00e4tch".encode().decode("ascii", "surrogateescape")
    code, out, err = run_command("utf-8", monkeypatch, "search", "--run", run_path, "--json", typed)
    assert code == 0, err
    assert list(json.loads(out)["query"]) == ["catch"]
    code, _, err = run_command("utf-8", monkeypatch, "search", "--run", run_path, "c\udce4tch")
    assert (code, err) == (2, "Error: 'c\\udce4tch' is not valid UTF-8. Pass it in UTF-8.\n")


def test_any_other_argument_that_is_not_utf8_is_one_message(run_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code, _, err = run_command(
        "utf-8", monkeypatch, "search", "--index", NOT_UTF8, "--url", "http://127.0.0.1:1", "catch"
    )
    assert code == 1
    assert err.startswith("Error: ")
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("streams", "code"),
    [
        (">&- 2>&-", 0),
        (">/dev/full", 1),
        ("| true; exit ${PIPESTATUS[0]}", 1),
        *(pytest.param(one, 0, marks=pytest.mark.slow) for one in (">&-", "2>&-")),
    ],
)
def test_closed_and_full_streams_give_no_traceback(streams: str, code: int, run_path: Path) -> None:
    program = f"{sys.executable} -c 'from sparse_ingest.cli.main import main; main()'"
    shell = f'{program} search --run "$1" --json catch {streams}'
    done = subprocess.run(["bash", "-c", shell, "-", run_path], capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stderr
    expected = r"Error: The system: No space left on device\..*\n" if "full" in streams else ""
    assert re.fullmatch(expected, done.stderr)
