"""Write plan.json, plan.png, plan.html and pipeline.toml, atomically, and read plan.json.

Existing files are never replaced.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from sparse_ingest.errors import UsageError, first_line
from sparse_ingest.pipeline import Pipeline, changed, with_resolved_paths
from sparse_ingest.planning.drawing import as_html, as_png, figure_class, sentences
from sparse_ingest.planning.report import Choice, PlanReport, Unsettled
from sparse_ingest.storage.durable import write_atomic
from sparse_ingest.storage.foreign_json import checked, read_json

_ESCAPED = "backslashreplace"  # for bytes of a run's path that are not UTF-8
NAMES = ("plan.json", "plan.png", "plan.html", "pipeline.toml")


def refuse_outputs(folder: Path) -> None:
    """Refuse a folder that could not be written to, before computing anything.

    Raises:
        UsageError: one of the files exists, or the path is not a folder.
        MissingExtraError: matplotlib is not installed.
    """
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"{folder} is a file. Name a folder with --out.")
    for name in NAMES:
        if (folder / name).exists():
            raise UsageError(f"{folder / name} already exists. Name another --out folder, or remove it.")
    figure_class()


def write_outputs(report: PlanReport, folder: Path) -> list[Path]:
    """Write the files of a plan; return their paths.

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
        usage = "`sparse-ingest load RUN --index NAME --pipeline FILE` applies [load]; the index remembers [query]."
        comments = ["Chosen by `sparse-ingest plan`:", *sentences(report), usage]
        contents["pipeline.toml"] = pipeline_text(report.pipeline, comments).encode()
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in contents.items():
        write_atomic(folder / name, content, exclusive=True)
    return [folder / name for name in contents]


def read_plan(folder: Path) -> PlanReport:
    """Read plan.json from the folder of a plan. The quality of single queries is not in it.

    Raises:
        UsageError: there is no such file, or it is not a plan.
    """
    path = folder / "plan.json"
    try:
        content = read_json(path, dict[str, Any])
        for name, kind in (("choice", Choice), ("unsettled", Unsettled)):
            if content.get(name) is not None:
                content[name] = [checked(content[name], dict[str, Any]).get(key) for key in kind._fields]
        report = checked(content, PlanReport)
        for best, points in ((report.frontier, report.points), (report.settings_frontier, report.settings)):
            if not all(0 <= place < len(points) for place in best):
                raise ValueError("its frontier names points that it lacks")
        return report
    except FileNotFoundError:
        raise UsageError(f"{path} does not exist. Name the folder that `sparse-ingest plan --out` wrote.") from None
    except ValueError as error:
        raise UsageError(
            f"{path} is not a plan: {first_line(error)}. Name a folder of `sparse-ingest plan`."
        ) from error


def pipeline_text(pipeline: Pipeline, comments: Iterable[str]) -> str:
    """Return a pipeline file for `read_pipeline`: comments, and all settings that are not defaults."""
    lines = [f"# {line}".rstrip() for line in comments]
    for table, settings in vars(with_resolved_paths(pipeline, Path())).items():
        if given := changed(settings):
            lines += ["", f"[{table}]"]
            lines += [f"{name} = {_toml(value)}" for name, value in given.items()]
    return "\n".join(lines) + "\n"


def _toml(value: Any) -> str:
    if isinstance(value, Mapping):
        names = {name: name if name.isidentifier() and name.isascii() else _toml(name) for name in value}
        return "{" + ", ".join(f"{names[name]} = {_toml(inner)}" for name, inner in value.items()) + "}"
    return json.dumps(value).replace("\x7f", "\\u007f")
