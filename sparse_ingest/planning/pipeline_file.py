"""A pipeline as the text of a file that `read_pipeline` takes, with comments above it.

In: a pipeline, lines of comment. Out: TOML with every setting that is not the default. Not covered: writing it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from sparse_ingest.pipeline import Pipeline

_PATHS = ("document", "query", "body")  # settings that may name a file or a folder


def pipeline_text(pipeline: Pipeline, comments: Sequence[str]) -> str:
    """The file."""
    lines = [f"# {line}".rstrip() for line in comments]
    for table in fields(Pipeline):
        settings = getattr(pipeline, table.name)
        default = type(settings)()
        given = {entry.name: getattr(settings, entry.name) for entry in fields(settings)}
        changed = {name: value for name, value in given.items() if value != getattr(default, name)}
        if changed:
            lines += ["", f"[{table.name}]"]
            lines += [
                f"{name} = {_toml(_whole(value) if name in _PATHS else value)}" for name, value in changed.items()
            ]
    return "\n".join(lines) + "\n"


def _toml(value: Any) -> str:
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{name} = {_toml(inner)}" for name, inner in value.items()) + "}"
    return json.dumps(value).replace("\x7f", "\\u007f")


def _whole(name: str) -> str:
    """A path as it is from anywhere: in a file, paths are relative to it."""
    return str(Path(name).resolve()) if Path(name).exists() else name
