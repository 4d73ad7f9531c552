"""Resolve the settings of a model: the pipeline file over the checkpoint's files over the defaults of its library.

Defaults are as in sentence-transformers, or for plain layouts as in OpenSearch's model cards (families.py). Activation,
pooling, max_length and lower_case apply to the model of both sides; a weight table has only the last two, and its
max_length comes from its tokenizer.
"""

from __future__ import annotations

import hashlib
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from sparse_ingest.checkpoints.checks import read_config, refuse_adapter
from sparse_ingest.checkpoints.layouts import Checkpoint, read_checkpoint, remote_code, trusted_code
from sparse_ingest.checkpoints.modules import damaged, read_json
from sparse_ingest.checkpoints.sides import ModelSide, WeightTableSide
from sparse_ingest.checkpoints.tensors import weight_files
from sparse_ingest.errors import CheckpointError, PipelineError, short_repr
from sparse_ingest.pipeline import EncodeSettings, ModelSettings, Pipeline

# Defaults of settings. Those of documents change the weights of a run.
DOCUMENT_SETTINGS: dict[str, Any] = {
    "activation": "relu",
    "pooling": "max",
    "max_length": None,
    "document_prompt": "",
    "lower_case": False,
    "document_special_tokens": "keep",
    "attention": None,
}
QUERY_SETTINGS: dict[str, Any] = {"query_prompt": "", "query_special_tokens": "keep", "missing_idf_weight": None}
# Families whose position table starts after the padding token's id: 514 rows of RoBERTa are 512 tokens.
POSITIONS_BEHIND_PADDING = (
    "camembert", "data2vec-text", "ibert", "longformer", "luke", "mpnet", "roberta", "roberta-prelayernorm",
    "xlm-roberta", "xlm-roberta-xl", "xmod",
)  # fmt: skip
RECORDED_OF_QUERIES = ("activation", "pooling", "max_length", "lower_case", "attention", *QUERY_SETTINGS)


def resolve_settings(asked: ModelSettings, checkpoint: Checkpoint) -> ModelSettings:
    """Fill in the settings of documents, and of queries unless they have a checkpoint of their own.

    Raises:
        PipelineError: max_length is larger than the position table of the model.
        CheckpointError: the checkpoint has no model for documents, its code is not trusted, or its activation or
            pooling is not supported.
    """
    if not checkpoint.encodes_documents:
        raise CheckpointError(
            f"{checkpoint.name} has a weight table for queries and no model for documents (no config.json of a masked "
            "LM). Name the model that encodes documents."
        )
    values = _model_values(asked, checkpoint, checkpoint.document)
    if asked.query is None:
        values |= _filled(asked, checkpoint.query.declared, QUERY_SETTINGS)
    return replace(asked, **values, revision=checkpoint.revision or asked.revision)


def resolve_query_settings(asked: ModelSettings, checkpoint: Checkpoint) -> ModelSettings:
    """Fill in the settings of the checkpoint's query side. Raises like `resolve_settings`."""
    side = checkpoint.query
    values: dict[str, Any]
    if isinstance(side, WeightTableSide):
        limit = _shortest(side.declared.get("max_length"))
        values = {"max_length": limit, "lower_case": bool(asked.lower_case)}
        values |= dict.fromkeys(("activation", "pooling", "attention"))
    else:
        values = _model_values(asked, checkpoint, side)
    return replace(asked, **values, **_filled(asked, side.declared, QUERY_SETTINGS))


def resolve_pipeline(asked: Pipeline, checkpoint: Checkpoint) -> Pipeline:
    """Return the pipeline with its model settings filled in, and `top_k` as the checkpoint declares it."""
    encode = asked.encode
    if encode.top_k is None:
        encode = replace(encode, top_k=checkpoint.max_active_dims)
    return replace(asked, model=resolve_settings(asked.model, checkpoint), encode=encode)


def document_identity(checkpoint: Checkpoint, settings: ModelSettings) -> dict[str, Any]:
    """Return the model's part of a run's identity: the weights, and every setting that changes a result."""
    if checkpoint.revision:
        source = {"hub": checkpoint.name, "revision": checkpoint.revision}
    else:
        source = {"sha256": checkpoint.sha256}
        if settings.trust_remote_code and remote_code(checkpoint.transformer, checkpoint.document.auto_class):
            digest = hashlib.sha256()
            for file in sorted(checkpoint.folder.rglob("*.py")):
                name = file.relative_to(checkpoint.folder).as_posix()
                digest.update(hashlib.sha256(file.read_bytes()).digest() + name.encode())
            source["code_sha256"] = digest.hexdigest()
    values = {name: getattr(settings, name) for name in DOCUMENT_SETTINGS}
    if settings.attention is None:
        del values["attention"]  # as in runs of older releases
    return {**source, **values}


def model_record(checkpoint: Checkpoint, settings: ModelSettings, asked: ModelSettings) -> dict[str, Any]:
    """Return the record of the model for the manifest and the index: enough to build it again for queries.

    `settings` are the resolved ones of documents, `asked` those of the user. `query_side` has the settings of queries
    that differ. Trust in remote code is never recorded: an index must not grant it to its users. Raise
    `CheckpointError` if the query checkpoint cannot be found.
    """
    record = {key: value for key, value in asdict(settings).items() if value is not None}
    record |= {"document": _name(checkpoint), "family": checkpoint.family, "sha256": checkpoint.sha256}
    record["trust_remote_code"] = False
    if not checkpoint.document.has_words:
        record["kind"] = checkpoint.document.kind
    queries, identity = checkpoint, {}
    if asked.query:
        queries = read_checkpoint(asked.query, asked.query_revision, code=asked.trust_remote_code)
        record["query"] = _name(queries)
        if queries.revision:
            record["query_revision"] = queries.revision
        identity = {"family": queries.family, "sha256": queries.sha256}
    is_table = isinstance(queries.query, WeightTableSide)
    resolved = resolve_query_settings(asked, queries)
    used = {key: value for key in RECORDED_OF_QUERIES if (value := getattr(resolved, key)) is not None}
    if not asked.query and not is_table and all(record.get(key) == value for key, value in used.items()):
        return record
    return {**record, "query_side": {**identity, "kind": queries.query.kind, **used}}


def _model_values(asked: ModelSettings, checkpoint: Checkpoint, side: ModelSide) -> dict[str, Any]:
    """Return the settings of a model, checked against its limits."""
    folder, declared = side.folder, side.declared
    _require_weights(checkpoint.name, folder)
    trusted_code(checkpoint, side, trusted=asked.trust_remote_code)
    positions = _positions(folder, read_config(folder))
    limit = _shortest(positions, read_json(folder / "tokenizer_config.json").get("model_max_length"))
    length = declared.get("max_length", limit)
    if positions is not None and length is not None:
        # A checkpoint may declare 514 and have 512 positions: its library fails on the first long text.
        length = min(length, positions)
    values = _filled(asked, {**declared, "max_length": length}, DOCUMENT_SETTINGS)
    if values["activation"] is None:
        raise CheckpointError(
            f"{checkpoint.name}: no file states the activation of this masked LM with idf.json. OpenSearch's doc-v1 "
            "and doc-v2 models use log1p(relu), doc-v3 models log1p(log1p(relu)); the wrong one gives wrong weights. "
            'Set [model] activation = "relu" or "log1p_relu", as in the model card (--set model.activation=relu).'
        )
    if values["attention"] is None and None not in side.attentions:
        raise CheckpointError(
            f"{checkpoint.name} is a causal language model, and no file states whether its tokens see all of the text: "
            "looked for is_causal, use_bidirectional_attention and bidirectional in config.json. Most sparse encoders "
            "do, such as SPLADE-Code and LACONIC; the wrong choice gives wrong weights. Set [model] attention = "
            '"bidirectional" or "causal", as in the model card (--set model.attention=bidirectional).'
        )
    special_tokens = (values["document_special_tokens"], asked.query_special_tokens or "keep")
    for name, given, supported in (
        ("activation", [values["activation"]], side.activations),
        ("pooling", [values["pooling"]], side.poolings),
        ("attention", [values["attention"]], side.attentions),
        ("weights of special tokens", special_tokens, side.special_tokens),
    ):
        if wrong := [value for value in given if value not in supported]:
            expected = " or ".join(value or "no value" for value in supported)
            raise CheckpointError(f"{checkpoint.name} ({side.kind}) has {name} {wrong[0]!r}; expected {expected}.")
    if positions is not None and values["max_length"] > positions:
        raise PipelineError(
            f"max_length = {values['max_length']}, but {checkpoint.name} has positions for {positions} tokens; "
            "expected at most that many."
        )
    return values


def _filled(asked: ModelSettings, declared: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of `defaults`: as requested, else as declared, else the default."""
    found = {**defaults, **declared}
    return {key: found[key] if (given := getattr(asked, key)) is None else given for key in defaults}


def _shortest(*lengths: object) -> int | None:
    """Return the smallest limit; a tokenizer without one writes 1e30."""
    known = (length for length in lengths if isinstance(length, int) and 0 < length < 1 << 30)
    return min(known, default=None)


def _name(checkpoint: Checkpoint) -> str:
    """Return the name of a checkpoint from any working directory."""
    if checkpoint.revision is None and not checkpoint.name.startswith("package:"):
        return str(checkpoint.folder)
    return checkpoint.name


def _require_weights(name: str, folder: Path) -> None:
    if not (folder / "config.json").exists():
        raise damaged(f"{name} has no config.json in {folder}")
    if weight_files(folder):
        return
    if adapters := sorted(folder.glob("*/adapter_config.json")):
        refuse_adapter(adapters[0])
    pickles = sorted(path.name for pattern in ("*.bin", "*.pt") for path in folder.glob(pattern))
    found = f"found the pickle {pickles[0]}, which is never read" if pickles else "found none"
    raise CheckpointError(
        f"{name} has no weights as safetensors or pytorch_model.bin in {folder}: {found}. Convert it with "
        "save_pretrained()."
    )


def _positions(folder: Path, config: dict[str, Any]) -> int | None:
    """Return the longest input of a masked LM by its position table; None without such a table."""
    positions: int | None = config.get("max_position_embeddings")
    if positions is None or positions <= 0:  # XLNet writes -1
        return None
    if config.get("model_type") not in POSITIONS_BEHIND_PADDING:
        return positions
    padding_id = config.get("pad_token_id") or 0
    if type(padding_id) is not int or not 0 <= padding_id < positions - 1:
        raise damaged(
            f"{folder / 'config.json'} has pad_token_id = {short_repr(padding_id)}; expected an integer from 0, below "
            f"{positions}"
        )
    return positions - 1 - padding_id


def refuse_lone_stride(settings: EncodeSettings) -> None:
    """Raise `PipelineError` if `window_stride` is set although `overflow` is "truncate"."""
    if settings.overflow == "truncate" and settings.window_stride is not None:
        raise PipelineError('window_stride is for overflow = "windows" or "passages"; overflow is "truncate". Omit it.')
