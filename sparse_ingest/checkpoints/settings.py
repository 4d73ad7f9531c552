"""What a model is run with: the pipeline file over the checkpoint's own files over the defaults of its library.

Out: a `ModelSettings` without gaps, for the document side or for the query side. Defaults are those of
sentence-transformers, or of OpenSearch's own cards for its plain layouts (layouts.py declares what differs there).
What the pipeline file says of activation, pooling, max_length and lower_case holds for the masked LM of either side; a
weight table has no use for the first two, and is cut where its own tokenizer says.
"""

from __future__ import annotations

import hashlib
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from sparse_ingest.checkpoints.layouts import (
    TABLE_ALONE,
    Checkpoint,
    MaskedLMSide,
    WeightTableSide,
    read_checkpoint,
    trusted_code,
)
from sparse_ingest.checkpoints.modules import read_json
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
DOCUMENT_SETTINGS = ("activation", "pooling", "max_length", "document_prompt", "lower_case", "document_special_tokens")
QUERY_SETTINGS = ("query_prompt", "query_special_tokens", "missing_idf_weight")
# What decides a query: these and, for a masked LM, its activation, pooling, max_length and lower_case.
RECORDED_OF_QUERIES = ("activation", "pooling", "max_length", "lower_case", *QUERY_SETTINGS)
PICKLE = "pytorch_model.bin"


def resolve_settings(asked: ModelSettings, checkpoint: Checkpoint) -> ModelSettings:
    """Fill every setting of the document side that the pipeline leaves open, and those of the checkpoint's queries.

    With a `query` checkpoint of its own the settings of queries stay as asked: its files decide them.

    Raises:
        PipelineError: max_length is beyond what the model can take.
        CheckpointError: there is nothing to encode documents with, its code is not trusted, or an activation or pooling
            is not computed here.
    """
    if checkpoint.family == TABLE_ALONE:
        raise CheckpointError(
            f"{checkpoint.name} holds a weight table for queries and no model for documents (no config.json of a "
            "masked LM). Name the model that belongs to it."
        )
    _require_weights(checkpoint.name, checkpoint.transformer)
    values = _masked_lm_values(asked, checkpoint, MaskedLMSide(checkpoint.transformer, checkpoint.declared))
    if asked.query is None:
        declared = {**DEFAULTS, **checkpoint.query.declared}
        values |= {key: _first(getattr(asked, key), declared.get(key)) for key in QUERY_SETTINGS}
    else:
        values |= {key: getattr(asked, key) for key in QUERY_SETTINGS}
    return replace(asked, **values, revision=checkpoint.revision or asked.revision)


def resolve_query_settings(asked: ModelSettings, checkpoint: Checkpoint) -> ModelSettings:
    """Fill every setting of the checkpoint's query side that the pipeline leaves open.

    Raises:
        PipelineError, CheckpointError: as resolve_settings, where the query side is a masked LM.
    """
    side = checkpoint.query
    declared = {**DEFAULTS, **side.declared}
    of_queries = {key: _first(getattr(asked, key), declared.get(key)) for key in QUERY_SETTINGS}
    if isinstance(side, WeightTableSide):
        length = side.declared.get("max_length")
        limit = length if isinstance(length, int) and 0 < length < 1 << 30 else None
        table: dict[str, Any] = {
            "activation": None,
            "pooling": None,
            "max_length": limit,
            "lower_case": bool(asked.lower_case),
        }
        return replace(asked, **table, **of_queries)
    _require_weights(checkpoint.name, side.folder)
    values = _masked_lm_values(asked, checkpoint, side)
    return replace(asked, **{**values, **of_queries})


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
    if settings.trust_remote_code and checkpoint.remote_code and not checkpoint.revision:
        source |= {"code_sha256": _sha256_of_code(checkpoint.folder)}
    return {**source, **{name: getattr(settings, name) for name in DOCUMENT_SETTINGS}}


def model_record(checkpoint: Checkpoint, settings: ModelSettings, asked: ModelSettings) -> dict[str, Any]:
    """What the manifest and the index say about the model, enough to build it again for queries.

    `settings` are the resolved ones of the documents, `asked` what the user gave. Where queries are made otherwise than
    the rest says, `query_side` holds with what; whoever reads the record puts it over the rest. Trust in remote code
    is never recorded: an index must not grant it to whoever searches it.

    Raises:
        CheckpointError: the query checkpoint cannot be found, which is better known before encoding than after.
    """
    record = {key: value for key, value in asdict(settings).items() if value is not None}
    record |= {"document": _name(checkpoint), "family": checkpoint.family, "sha256": checkpoint.sha256}
    record["trust_remote_code"] = False
    queries: dict[str, Any] = {}
    checkpoint_of_queries = checkpoint
    if asked.query:
        checkpoint_of_queries = read_checkpoint(asked.query, asked.query_revision, code=asked.trust_remote_code)
        record["query"] = _name(checkpoint_of_queries)
        if checkpoint_of_queries.revision:
            record["query_revision"] = checkpoint_of_queries.revision
        queries["family"] = checkpoint_of_queries.family
        queries["sha256"] = checkpoint_of_queries.sha256
    is_table = isinstance(checkpoint_of_queries.query, WeightTableSide)
    resolved = resolve_query_settings(asked, checkpoint_of_queries)
    used = {key: getattr(resolved, key) for key in RECORDED_OF_QUERIES}
    used = {key: value for key, value in used.items() if value is not None}
    if not asked.query and not is_table and all(record.get(key) == value for key, value in used.items()):
        return record
    return {**record, "query_side": {**queries, "kind": "weight table" if is_table else "masked LM", **used}}


def _masked_lm_values(asked: ModelSettings, checkpoint: Checkpoint, side: MaskedLMSide) -> dict[str, Any]:
    """Every setting that changes what a masked LM gives, checked against what it can take."""
    trusted_code(checkpoint, side.folder, trusted=asked.trust_remote_code)
    positions = _positions(read_json(side.folder / "config.json"))
    values = {**DEFAULTS, "max_length": _length_limit(side.folder, positions)}
    for key in values.keys() & side.declared.keys():
        values[key] = side.declared[key]
    if positions is not None and values["max_length"] is not None:
        # A checkpoint may declare 514 where 512 can be computed: its library would fail on the first long text.
        values["max_length"] = min(values["max_length"], positions)
    values |= {key: given for key in values if (given := getattr(asked, key)) is not None}
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
    return values


def _first(*values: Any) -> Any:
    return next((value for value in values if value is not None), None)


def _name(checkpoint: Checkpoint) -> str:
    """What to name the checkpoint by from any folder."""
    if checkpoint.revision is None and not checkpoint.name.startswith("package:"):
        return str(checkpoint.folder)
    return checkpoint.name


def _require_weights(name: str, folder: Path) -> None:
    if not (folder / "config.json").exists():
        raise CheckpointError(f"{name} has no config.json in {folder}. Fetch the model again.")
    if list(folder.glob("*.safetensors")) or (folder / PICKLE).exists() or list(folder.glob(f"{PICKLE}.index.json")):
        return
    pickles = sorted(path.name for pattern in ("*.bin", "*.pt") for path in folder.glob(pattern))
    found = f"found the pickle {pickles[0]}, which is never read" if pickles else "found none"
    raise CheckpointError(
        f"{name} has no weights as safetensors or {PICKLE} in {folder}: {found}. "
        "Convert it with save_pretrained(), then try again."
    )


def _sha256_of_code(folder: Path) -> str:
    digest = hashlib.sha256()
    for file in sorted(folder.rglob("*.py")):
        digest.update(hashlib.sha256(file.read_bytes()).digest() + file.relative_to(folder).as_posix().encode())
    return digest.hexdigest()


def _positions(config: dict[str, Any]) -> int | None:
    """The longest input that the position table of a masked LM has room for; None where there is no table."""
    positions = config.get("max_position_embeddings")
    if not isinstance(positions, int) or positions <= 0:  # XLNet writes -1
        return None
    behind_padding = config.get("model_type") in POSITIONS_BEHIND_PADDING
    return positions - 1 - int(config.get("pad_token_id") or 0) if behind_padding else positions


def _length_limit(transformer: Path, positions: int | None) -> int | None:
    """Where a text is cut when nobody says: the smaller of what the tokenizer and the position table allow."""
    tokenizer = read_json(transformer / "tokenizer_config.json")
    limits = [positions, tokenizer.get("model_max_length")]
    # A tokenizer without a limit writes 1e30.
    known = [limit for limit in limits if isinstance(limit, int) and 0 < limit < 1 << 30]
    return min(known) if known else None
