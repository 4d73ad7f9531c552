"""The files of a plan: plan.json, plan.png, plan.html and pipeline.toml in one folder.

In: a `PlanReport`, a folder. Out: the files, each complete or absent. Existing files are never replaced.
Not covered: pictures and tables (drawing.py).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from sparse_ingest.errors import UsageError
from sparse_ingest.pipeline import Pipeline, changed
from sparse_ingest.planning.drawing import as_html, as_png, figure_class, sentences
from sparse_ingest.planning.report import PlanReport
from sparse_ingest.storage.durable import write_atomic

_PATHS = ("document", "query", "body")  # settings that may name a file or a folder
_ESCAPED = "backslashreplace"  # for bytes of a run's path that are not UTF-8
NAMES = ("plan.json", "plan.png", "plan.html", "pipeline.toml")


def refuse_outputs(folder: Path) -> None:
    """Refuse what could not be written, before anything is computed.

    Raises:
        UsageError: one of the files exists, or the path is not a folder.
        MissingExtraError: matplotlib is not installed.
    """
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"{folder} is a file; --out names a folder.")
    for name in NAMES:
        if (folder / name).exists():
            raise UsageError(f"{folder / name} is there already. Name another --out folder, or remove it.")
    figure_class()


def write_outputs(report: PlanReport, folder: Path) -> list[Path]:
    """Write what a plan found; the paths.

    Raises:
        UsageError, MissingExtraError: see `refuse_outputs`.
    """
    refuse_outputs(folder)
    contents = {
        "plan.json": json.dumps(report.to_dict(), ensure_ascii=False, indent=1).encode(errors=_ESCAPED) + b"\n",
        "plan.png": as_png(report),
        "plan.html": as_html(report).encode(errors=_ESCAPED),
    }
    if report.choice:
        contents["pipeline.toml"] = pipeline_text(report.pipeline, _comments(report)).encode()
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in contents.items():
        write_atomic(folder / name, content, exclusive=True)
    return [folder / name for name in contents]


def _comments(report: PlanReport) -> Iterator[str]:
    yield "Chosen by `sparse-ingest plan`:"
    yield from sentences(report)
    yield "`sparse-ingest load RUN --index NAME --pipeline FILE` applies [load]; the index remembers [query]."


def pipeline_text(pipeline: Pipeline, comments: Iterable[str]) -> str:
    """Return a pipeline file that `read_pipeline` takes: comments, and every setting that is not the default."""
    lines = [f"# {line}".rstrip() for line in comments]
    for table, settings in vars(pipeline).items():
        if given := changed(settings):
            lines += ["", f"[{table}]"]
            lines += [f"{name} = {_toml(_whole(value) if name in _PATHS else value)}" for name, value in given.items()]
    return "\n".join(lines) + "\n"


def _toml(value: Any) -> str:
    if isinstance(value, Mapping):
        names = {name: name if name.isidentifier() and name.isascii() else _toml(name) for name in value}
        return "{" + ", ".join(f"{names[name]} = {_toml(inner)}" for name, inner in value.items()) + "}"
    return json.dumps(value).replace("\x7f", "\\u007f")


def _whole(name: str) -> str:
    """A path as it is from anywhere: in a file, paths are relative to it."""
    return str(Path(name).resolve()) if Path(name).exists() else name
