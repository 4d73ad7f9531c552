"""Completion of values in bash, zsh and fish: run folders and packaged pipelines.

click completes commands, options and choices, and calls these types for values. Nothing is read from a store.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import click
from click.shell_completion import CompletionItem

from sparse_ingest.pipeline import packaged_names
from sparse_ingest.storage.places import Place, place_of

_DEPTH = 3  # of folders that are searched for runs
_MOST = 1000  # folders of one depth


class RunFolder(click.ParamType[Place]):
    """A run folder, or its address in a store. Completes folders with a manifest.json, or all if none has one."""

    name = "run"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Place:
        """Return the place of a run."""
        return place_of(value)

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        """Return the runs whose paths begin with the incomplete path."""
        found = [CompletionItem(path) for path in sorted(_runs(incomplete))]
        return found or [CompletionItem(incomplete, type="dir")]


class PipelineName(click.ParamType[str]):
    """A pipeline file, or the name of a packaged one."""

    name = "text"

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        """Return the names that begin with the incomplete one; if there is none, the shell completes files."""
        found = [CompletionItem(name) for name in packaged_names() if name.startswith(incomplete)]
        return found or [CompletionItem(incomplete, type="file")]


RUN = RunFolder()


def _runs(incomplete: str) -> Iterator[str]:
    """Yield the paths of runs in the folder of an incomplete path, and up to _DEPTH levels below it."""
    before, slash, begun = incomplete.rpartition("/")
    folders = [Path(before + slash)]
    for _ in range(_DEPTH):
        inner: list[Path] = []
        for folder in folders:
            with suppress(OSError):
                found = (one for one in folder.iterdir() if one.name.startswith(begun) and one.name[0] != ".")
                inner += filter(Path.is_dir, found)
        runs = [one for one in inner[:_MOST] if (one / "manifest.json").is_file()]
        yield from (before + slash + str(one.relative_to(before + slash)) for one in runs)
        folders, begun = [one for one in inner[:_MOST] if one not in runs], ""
