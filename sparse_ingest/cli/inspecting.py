"""The command `inspect`: what a model is, before anything is encoded with it."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from sparse_ingest.cli.options import json_option, pipeline_options, print_json
from sparse_ingest.pipeline import Pipeline

if TYPE_CHECKING:
    from sparse_ingest.checkpoints.inspect import Inspection, Side

ACTIVATIONS = {"relu": "log1p(relu)", "log1p_relu": "log1p(log1p(relu))"}


@click.command()
@click.argument("model", required=False)
@json_option
@pipeline_options
def inspect(as_json: bool, pipeline: Pipeline) -> None:
    """Show what MODEL is: family, parts, activation, limits, vocabulary, licence; and what will matter later.

    MODEL is a hub id, a folder, or package:NAME/PATH. No weight is loaded, and no code of the model runs. Pin a
    revision with --set model.revision=REVISION.
    """
    from sparse_ingest.checkpoints.inspect import inspect_model

    found = inspect_model(pipeline.model)
    if as_json:
        print_json(asdict(found))
        return
    for line in _lines(found):
        click.echo(line)


def _lines(found: Inspection) -> list[str]:
    """Aligned lines; the query side is shortened where it is the document side's own model."""
    first = found.document or found.query
    lines = [_line("model", first.model), *_origin(first)]
    if found.document is not None:
        lines += ["", *_side("documents", found.document)]
    lines.append("")
    if found.query.model != first.model:
        lines += [_line("query model", found.query.model), *_origin(found.query), ""]
    same = found.document is not None and found.query == _as_query(found.document, found.query)
    if same:
        lines.append(_line("queries", "as documents"))
        lines += [_line("prompt", repr(found.query.prompt))] if found.query.prompt else []
    else:
        lines += _side("queries", found.query)
    return lines + [f"\nWarning: {warning}" for warning in found.warnings]


def _as_query(document: Side, query: Side) -> Side:
    from dataclasses import replace

    return replace(document, prompt=query.prompt)


def _origin(side: Side) -> list[str]:
    return [
        _line("family", side.family),
        _line("revision", side.revision) if side.revision else _line("sha256", side.sha256),
        _line("licence", side.license or "unknown: the model has no card, or its card does not say"),
        _line("language", ", ".join(side.languages) or "unknown"),
    ]


def _side(title: str, side: Side) -> list[str]:
    special = " ".join(f"{name.removesuffix('_token')} {token}" for name, token in side.special_tokens.items())
    counted = "count like others" if side.special_token_weights == "keep" else "weigh nothing"
    if side.kind == "masked LM":
        sizes = f"{_number(side.layers)} layers of {_number(side.hidden_size)}"
        lines = [
            _line(title, f"masked LM, {side.architecture}, {sizes}, {_number(side.parameters)} parameters"),
            _line("activation", f"{ACTIVATIONS.get(side.activation or '', side.activation)}, pooling {side.pooling}"),
        ]
    else:
        lines = [
            _line(title, "weight table: no model runs for a query"),
            _line("not in it", f"a token that the table lacks weighs {side.missing_idf_weight}"),
        ]
    positions = f" (position table: {side.positions:,})" if side.positions else ""
    lines += [
        _line("limit", f"{_number(side.max_length)} tokens{positions}" if side.max_length else "none"),
        _line("vocabulary", f"{_number(side.vocabulary_size)} tokens, {side.tokenizer or 'tokenizer unknown'}"),
        _line("special", f"{special or 'none'}; in vectors they {counted}"),
    ]
    if side.max_active_dims:
        lines.append(_line("terms", f"at most {side.max_active_dims:,} a text"))
    if side.prompt:
        lines.append(_line("prompt", repr(side.prompt)))
    return lines


def _number(value: int | None) -> str:
    return "unknown" if value is None else f"{value:,}"


def _line(name: str, value: str | None) -> str:
    return f"{name:<12}{value}"


COMMANDS = [inspect]
