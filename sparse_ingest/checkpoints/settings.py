"""What a model is run with: the pipeline file over the checkpoint's own files over the defaults of its library.

Out: a `ModelSettings` without gaps. Defaults are those of sentence-transformers, which reads the same checkpoints.
"""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

from sparse_ingest.checkpoints.layouts import Checkpoint, read_json
from sparse_ingest.errors import CheckpointError, PipelineError
from sparse_ingest.pipeline import ModelSettings, Pipeline

DEFAULTS: dict[str, Any] = {
    "activation": "relu",
    "pooling": "max",
    "document_prompt": "",
    "query_prompt": "",
    "lower_case": False,
    "document_special_tokens": "keep",
    "query_special_tokens": "keep",
}
# Families whose position table begins behind the padding token's id: RoBERTa's 514 rows hold 512 tokens.
POSITIONS_BEHIND_PADDING = (
    "camembert", "data2vec-text", "ibert", "longformer", "luke", "mpnet", "roberta", "roberta-prelayernorm",
    "xlm-roberta", "xlm-roberta-xl", "xmod",
)  # fmt: skip
# Settings that change the numbers of a document; the rest belongs to the query side or only names things.
DOCUMENT_SETTINGS = (
    "activation",
    "pooling",
    "max_length",
    "document_prompt",
    "lower_case",
    "document_special_tokens",
)


def resolve_settings(asked: ModelSettings, checkpoint: Checkpoint) -> ModelSettings:
    """Fill every setting that the pipeline leaves open.

    Raises:
        PipelineError: max_length is beyond what the model can take.
        CheckpointError: the checkpoint declares an activation or pooling that is unknown.
    """
    config = read_json(checkpoint.transformer / "config.json")
    positions = _positions(config)
    given = {key: value for key, value in asdict(asked).items() if value is not None}
    values = {**DEFAULTS, "max_length": _length_limit(checkpoint, positions), **checkpoint.declared, **given}
    if values["activation"] not in ("relu", "log1p_relu") or values["pooling"] != "max":
        raise CheckpointError(
            f"{checkpoint.name} asks for activation {values['activation']!r} and pooling {values['pooling']!r}; "
            "this release computes relu or log1p_relu, and max."
        )
    if positions is not None and values["max_length"] > positions:
        raise PipelineError(
            f"max_length = {values['max_length']}, but {checkpoint.name} has positions for {positions} tokens; "
            "give it that many at most."
        )
    return replace(asked, **{**values, "revision": checkpoint.revision or asked.revision})


def resolve_pipeline(asked: Pipeline, checkpoint: Checkpoint) -> Pipeline:
    """The pipeline with its model settings filled, and with the number of terms that the checkpoint declares."""
    encode = asked.encode
    if encode.top_k is None:
        encode = replace(encode, top_k=checkpoint.max_active_dims)
    return replace(asked, model=resolve_settings(asked.model, checkpoint), encode=encode)


def document_identity(checkpoint: Checkpoint, settings: ModelSettings) -> dict[str, Any]:
    """The part of a run's identity that the model makes: which weights, and every setting that changes a number."""
    source = (
        {"hub": checkpoint.name, "revision": checkpoint.revision}
        if checkpoint.revision
        else {"sha256": checkpoint.sha256}
    )
    return {**source, **{name: getattr(settings, name) for name in DOCUMENT_SETTINGS}}


def model_record(checkpoint: Checkpoint, settings: ModelSettings) -> dict[str, Any]:
    """What the manifest and the index say about the model, enough to build it again for queries."""
    name = checkpoint.name
    if checkpoint.revision is None and not name.startswith("package:"):
        name = str(checkpoint.folder)
    record = {key: value for key, value in asdict(settings).items() if value is not None}
    return {**record, "document": name, "family": checkpoint.family, "sha256": checkpoint.sha256}


def _positions(config: dict[str, Any]) -> int | None:
    """The longest input that the position table of a masked LM has room for; None where there is no table."""
    positions = config.get("max_position_embeddings")
    if not isinstance(positions, int) or positions <= 0:  # XLNet writes -1
        return None
    behind_padding = config.get("model_type") in POSITIONS_BEHIND_PADDING
    return positions - 1 - int(config.get("pad_token_id") or 0) if behind_padding else positions


def _length_limit(checkpoint: Checkpoint, positions: int | None) -> int | None:
    """Where a text is cut when nobody says: the smaller of what the tokenizer and the position table allow."""
    tokenizer = read_json(checkpoint.transformer / "tokenizer_config.json")
    limits = [positions, tokenizer.get("model_max_length")]
    # A tokenizer without a limit writes 1e30.
    known = [limit for limit in limits if isinstance(limit, int) and 0 < limit < 1 << 30]
    return min(known) if known else None
