"""Completion in the shell, asked for as the shells ask."""

from __future__ import annotations

import contextlib
import io
import subprocess
import sys
from pathlib import Path

import pytest
from support.runs import make_run

from sparse_ingest.cli.main import main
from sparse_ingest.pipeline import packaged_names


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two runs, one of them deeper, and folders that are not runs."""
    path = tmp_path_factory.mktemp("work")
    make_run(path / "runs" / "articles")
    make_run(path / "runs" / "old" / "articles")
    (path / "rubble" / "more").mkdir(parents=True)
    return path


def completed(line: str, folder: Path, monkeypatch: pytest.MonkeyPatch, shell: str = "bash") -> list[str]:
    """The answers for the last word of a command line."""
    words = line.split(" ")
    monkeypatch.setenv("_SPARSE_INGEST_COMPLETE", f"{shell}_complete")
    monkeypatch.setenv("COMP_WORDS", line)
    monkeypatch.setenv("COMP_CWORD", words[-1] if shell == "fish" else str(len(words) - 1))
    return printed(folder, monkeypatch)


def printed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the command prints for the variables; click writes bytes."""
    monkeypatch.setattr(sys, "argv", ["sparse-ingest"])
    with contextlib.chdir(folder), contextlib.redirect_stdout(io.TextIOWrapper(io.BytesIO(), "utf-8")) as out:
        with pytest.raises(SystemExit) as end:
            main()
    assert end.value.code == 0
    return out.buffer.getvalue().decode().splitlines()


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("sparse-ingest load ru", ["plain,runs/articles", "plain,runs/old/articles"]),
        ("sparse-ingest search --run runs/o", ["plain,runs/old/articles"]),
        ("sparse-ingest encode --out ./runs/a", ["plain,./runs/articles"]),
        ("sparse-ingest encode --reuse rub", ["dir,rub"]),
        ("sparse-ingest search --run s3://bucket/", ["dir,s3://bucket/"]),
        ("sparse-ingest encode --pipeline splade-", ["plain,splade-distilbert-mrl", "plain,splade-mini"]),
        ("sparse-ingest encode --pipeline my.to", ["file,my.to"]),
        ("sparse-ingest encode --dtype int8", ["plain,int8", "plain,int8-bfloat16", "plain,int8-int8"]),
        ("sparse-ingest pipe", ["plain,pipelines"]),
        ("sparse-ingest help index cr", ["plain,create"]),
        ("sparse-ingest load --drop", ["plain,--drop-old"]),
    ],
)
def test_values_are_completed(line: str, expected: list[str], folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert completed(line, folder, monkeypatch) == expected


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_other_shells_get_the_same(shell: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown = "\n".join(completed("sparse-ingest encode --pipeline ", folder, monkeypatch, shell))
    assert [name for name in packaged_names() if name not in shown] == []
    monkeypatch.setenv("_SPARSE_INGEST_COMPLETE", f"{shell}_source")
    assert "_SPARSE_INGEST_COMPLETE" in "".join(printed(folder, monkeypatch))


def test_bash_completes_with_the_script_of_the_page(folder: Path) -> None:
    page = (Path(__file__).parents[2] / "docs" / "reference" / "shell-completion.md").read_text(encoding="utf-8")
    line = 'eval "$(_SPARSE_INGEST_COMPLETE=bash_source sparse-ingest)"'
    assert line in page
    # As bash calls it: the function gets the command, and the words are in variables.
    script = f"""
        {line}
        COMP_WORDS=(sparse-ingest load runs/a) COMP_CWORD=2
        _sparse_ingest_completion sparse-ingest
        printf '%s\\n' "${{COMPREPLY[@]}}"
    """
    program = folder / "sparse-ingest"
    program.write_text(f"#!{sys.executable}\nfrom sparse_ingest.cli.main import main\nmain()\n")
    program.chmod(0o755)
    done = subprocess.run(
        ["bash", "-c", f'PATH="{folder}:$PATH"; {script}'], cwd=folder, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["runs/articles"], done.stderr
