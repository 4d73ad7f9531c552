"""The command `pipelines list`."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import NamedTuple

import click

from sparse_ingest.cli.help import Group
from sparse_ingest.cli.options import json_option, print_table
from sparse_ingest.pipeline import packaged_folder, packaged_names


class Packaged(NamedTuple):
    """A packaged pipeline. The first sentence of the comment in its file describes it."""

    name: str
    model: str
    query_model: str | None
    description: str


@click.group(cls=Group)
def pipelines() -> None:
    """List the packaged pipelines, for --pipeline."""


@pipelines.command("list")
@json_option
def list_pipelines(as_json: bool) -> None:
    """List the packaged pipelines with their models.

    \b
    sparse-ingest encode --pipeline splade-mini --corpus corpus.jsonl --out RUN
    """
    found = packaged()
    rows = [[one.name, one.model, one.query_model or "the same", one.description] for one in found]
    print_table(as_json, [one._asdict() for one in found], ["pipeline", "model", "query model", "description"], rows)


def packaged() -> list[Packaged]:
    """Return the packaged pipelines by name."""
    return [_described(packaged_folder() / f"{name}.toml") for name in packaged_names()]


def _described(path: Path) -> Packaged:
    text = path.read_text(encoding="utf-8")
    comment = " ".join(line.lstrip("# ") for line in text.partition("\n\n")[0].splitlines())
    model = tomllib.loads(text)["model"]
    first = re.sub(r"^\S+/\S+: ", "", re.split(r"\. ", comment)[0]).rstrip(".")
    return Packaged(path.stem, model["document"], model.get("query"), first)


COMMANDS = [pipelines]
