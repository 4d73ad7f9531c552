"""The commands `inspect`, with the properties of a model before encoding with it, and `pipelines list`."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator
from dataclasses import asdict, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from sparse_ingest.cli.help import Group, command
from sparse_ingest.cli.options import json_option, pipeline_options, print_report, print_table
from sparse_ingest.errors import SparseIngestError
from sparse_ingest.pipeline import Pipeline, packaged_folder, packaged_names

if TYPE_CHECKING:
    from sparse_ingest.checkpoints.inspect import Inspection, Side

ACTIVATIONS = {"relu": "log1p(relu)", "log1p_relu": "log1p(log1p(relu))", "none": "relu", "": "not stated"}
TEXTS = ["Yeast makes dough rise.", "The river carries sand to the sea.", "How to catch an exception in Python"]


@command()
@json_option
@pipeline_options(
    "model", "trust_remote_code", "engine", argument=click.argument("argument", metavar="[MODEL]", required=False)
)
def inspect(as_json: bool, pipeline: Pipeline) -> None:
    """Show the family, activation, limits, vocabulary and license of MODEL, with warnings.

    MODEL is a hub id, a folder, or package:NAME/PATH; --model MODEL is the same. Code of the model is not run. Weights
    are loaded only for a plain masked LM: a few texts are encoded to find out whether it was trained for sparse
    vectors. Pin a revision with --set model.revision=REVISION.
    """
    from sparse_ingest.checkpoints.inspect import inspect_model

    found = inspect_model(pipeline.model)
    if warning := _tried(found, pipeline):
        found.warnings.append(warning)
    print_report(as_json, asdict(found), _lines(found))


def _tried(found: Inspection, pipeline: Pipeline) -> str | None:
    """Encode a few texts with a plain masked LM, if torch is installed. Return a warning if the vectors are dense."""
    from sparse_ingest.checkpoints.families import PLAIN
    from sparse_ingest.checkpoints.inspect import dense_warning

    side = found.document
    if side is None or side.family != PLAIN or side.remote_code or not find_spec("torch"):
        return None
    from sparse_ingest.models.encoder import SparseEncoder

    try:
        vectors = SparseEncoder(pipeline.model, device="cpu").encode_document(TEXTS)
        return dense_warning(len(vectors.weights), len(TEXTS))
    except SparseIngestError as error:
        return f"{side.model} could not encode a few texts: {error}"


def _lines(found: Inspection) -> Iterator[str]:
    """Yield aligned lines; the query side is shortened if it is the same model as the document side."""
    first = found.document or found.query
    yield from _origin("model", first)
    if found.document is not None:
        yield from ("", *_side("documents", found.document))
    yield ""
    if found.query.model != first.model:
        yield from (*_origin("query model", found.query), "")
    if found.document is not None and found.query == replace(found.document, prompt=found.query.prompt):
        yield _line("queries", "same as documents")
        if found.query.prompt:
            yield _line("prompt", repr(found.query.prompt))
    else:
        yield from _side("queries", found.query)
    yield from (line for warning in found.warnings for line in ("", f"Warning: {warning}"))


def _origin(title: str, side: Side) -> Iterator[str]:
    yield _line(title, side.model)
    yield _line("family", side.family)
    yield _line("revision", side.revision) if side.revision else _line("sha256", side.sha256)
    yield _line("license", side.license or "unknown: not in a model card")
    yield _line("language", ", ".join(side.languages) or "unknown")


def _side(title: str, side: Side) -> Iterator[str]:
    from sparse_ingest.checkpoints.sides import AutoencoderSide, WeightTableSide

    if side.kind != WeightTableSide.kind:
        sizes = f"{_number(side.layers)} layers of {_number(side.hidden_size)}"
        yield _line(title, f"{side.kind}, {side.architecture}, {sizes}, {_number(side.parameters)} parameters")
        yield _line("activation", f"{ACTIVATIONS.get(side.activation or '', side.activation)}, pooling {side.pooling}")
        if side.attention:
            yield _line("attention", side.attention)
    else:
        yield _line(title, "weight table: no model runs for a query")
        yield _line("missing", f"tokens that are not in the table have the weight {side.missing_idf_weight}")
    positions = f" (position table: {side.positions:,})" if side.positions else ""
    yield _line("limit", f"{_number(side.max_length)} tokens{positions}" if side.max_length else "none")
    columns = "features" if side.kind == AutoencoderSide.kind else "tokens"
    yield _line("vocabulary", f"{_number(side.vocabulary_size)} {columns}, {side.tokenizer or 'tokenizer unknown'}")
    if side.ids_without_token:
        from sparse_ingest.checkpoints.card import named_ranges

        yield _line("", f"ids without a token: {named_ranges(side.ids_without_token)}; their weights are omitted")
    special = " ".join(f"{name.removesuffix('_token')} {token}" for name, token in side.special_tokens.items())
    kept = {"keep": "kept", "zero": "zero", None: "none, vectors have features"}
    weights = kept.get(side.special_token_weights, f"zero for {side.special_token_weights}")
    yield _line("special", f"{special or 'none'}; weights in vectors: {weights}")
    if side.max_active_dims:
        yield _line("terms", f"at most {side.max_active_dims:,} per text")
    if side.prompt:
        yield _line("prompt", repr(side.prompt))


def _number(value: int | None) -> str:
    return "unknown" if value is None else f"{value:,}"


def _line(name: str, value: str | None) -> str:
    return f"{name:<12}{value}"


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
    found = [_described(packaged_folder() / f"{name}.toml") for name in packaged_names()]
    rows = [["the same" if value is None else value for value in one.values()] for one in found]
    print_table(as_json, found, ["pipeline", "model", "query model", "description"], rows)


def _described(path: Path) -> dict[str, Any]:
    """Return name, models and description of a packaged pipeline: the first sentence of the comment in its file."""
    text = path.read_text(encoding="utf-8")
    comment = " ".join(line.lstrip("# ") for line in text.partition("\n\n")[0].splitlines())
    model = tomllib.loads(text)["model"]
    first = re.sub(r"^\S+/\S+: ", "", re.split(r"\. ", comment)[0]).rstrip(".")
    return {
        "name": path.stem, "model": model["document"], "query_model": model.get("query"), "description": first,
    }  # fmt: skip
