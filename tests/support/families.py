"""One checkpoint of every family, its sentence-transformers reference, and comparison of rows.

The reference is the same folder unless sentence-transformers cannot read it: modules of the removed class `IDF` and
`NewForMaskedLM` without remote code are compared with the same weights under names it knows.
"""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from support.checkpoints import (
    TEXTS,
    build_encoder,
    make_masked_lm,
    make_new,
    make_router,
    make_splade_card,
    save_sparse_encoder,
)
from support.without_projection import as_older_release, make_autoencoder

SPECIAL = ("[CLS] the [MASK] river [SEP] [UNK] zzz", "<s> the <mask> river </s>", "[PAD] stone <pad>")
DOCUMENTS = (*TEXTS, *SPECIAL)
QUERIES = ("river stone", "", "Searching the the Bird!", "日本 überé Ωmega \U0001f600", "water " * 100, *SPECIAL[:2])


class Twin(NamedTuple):
    """A checkpoint and its reference for sentence-transformers."""

    model: str
    reference: str
    family: str


FAMILY = {
    "symmetric": "symmetric SPLADE, sentence-transformers layout",
    "router": "Router with a separate query side",
    "plain": "masked LM, plain layout",
    "autoencoder": "sparse autoencoder, sentence-transformers layout",
}
# Name -> family. The first of each family has the layout of its card.
FAMILY_OF_TWIN = {
    "card-distilbert": "symmetric", "card-bert": "symmetric", "card-roberta": "symmetric",
    "saved-modernbert": "symmetric", "card-lengths": "symmetric", "card-arguments": "symmetric",
    "router-idf": "router", "router-idf-config.json": "router", "router-static": "router", "router-root": "router",
    "router-saved": "router", "router-new": "router", "router-new-typed": "router", "router-new-unpacked": "router",
    "router-roberta": "router", "router-cased": "router",
    "plain-bert": "plain", "plain-new": "plain",
    "autoencoder-bert": "autoencoder", "autoencoder-layers": "autoencoder", "autoencoder-older": "autoencoder",
    "autoencoder-qwen3": "autoencoder",
}  # fmt: skip


def make_twins(root: Path) -> dict[str, Twin]:
    """Write the checkpoints of `FAMILY_OF_TWIN`."""
    lms = {kind: make_masked_lm(root / kind, kind) for kind in ("bert", "distilbert", "roberta", "modernbert", "gte")}
    typed = make_masked_lm(root / "gte-typed", "gte", seed=5, type_vocab_size=2)
    prompts = {"query": "find: ", "document": "text: "}
    ours = {
        "card-distilbert": make_splade_card(root / "mrl", "distilbert", max_seq_length=32),
        "card-bert": make_splade_card(root / "mini", "bert", max_seq_length=48),
        "card-roberta": make_splade_card(root / "card-roberta", "roberta", max_seq_length=48, prompts=prompts),
        "saved-modernbert": save_sparse_encoder(
            root / "saved", lms["modernbert"], prompts=prompts, max_seq_length=50, lower_case=False
        ),
        "router-idf": make_router(root / "idf", lms["distilbert"], table="IDF"),
        "router-idf-config.json": make_router(root / "old", lms["bert"], table="IDF", config_name="config.json"),
        "router-static": make_router(
            root / "static", lms["bert"], activation="log1p_relu", max_seq_length=20, prompts=prompts
        ),
        "router-root": make_router(root / "rooted", lms["bert"], transformer="", prompts={"document": "text: "}),
        "router-roberta": make_router(root / "router-roberta", lms["roberta"]),
        "card-lengths": changed(
            make_splade_card(root / "lengths"),
            "sentence_bert_config.json",
            {"transformer_task": "fill-mask", "query_length": 5, "document_length": 20},
        ),
        "card-arguments": changed(
            make_splade_card(root / "arguments"),
            "sentence_bert_config.json",
            {
                "tokenizer_args": {"model_max_length": 17},
                "model_args": {},
                "processing_kwargs": {"text": {"max_length": 9}},
            },
        ),
        # The class in tokenizer_config.json overrides the normalizer in tokenizer.json.
        "router-cased": changed(
            make_router(root / "cased", lms["bert"]),
            "query_0_SparseStaticEmbedding/tokenizer_config.json",
            {"tokenizer_class": "BertTokenizer", "do_lower_case": False, "model_max_length": 8},
        ),
        "router-saved": _save_router(root / "router-saved", lms["distilbert"]),
        "plain-bert": lms["bert"],
        "plain-new": make_new(root / "new", lms["gte"]),
        "autoencoder-bert": make_autoencoder(root / "autoencoder-bert"),
        "autoencoder-layers": make_autoencoder(
            root / "autoencoder-layers", "distilbert", pooling=("cls", "max", "mean_sqrt_len_tokens"),
            layers=(_dense, _normalized), normalize=True, prompts=prompts, max_active_dims=24,
        ),
        "autoencoder-older": as_older_release(
            make_autoencoder(root / "autoencoder-older", pooling="weightedmean", prompts=prompts)
        ),
        "autoencoder-qwen3": make_autoencoder(root / "autoencoder-qwen3", "qwen3", pooling="lasttoken"),
    }  # fmt: skip
    references = {name: folder for name, folder in ours.items()}
    references["plain-new"] = lms["gte"]
    for name, masked_lm, packed in (("", lms["gte"], True), ("-typed", typed, True), ("-unpacked", lms["gte"], False)):
        new = make_new(root / f"new{name}-lm", masked_lm, packed=packed)
        ours[f"router-new{name}"] = make_router(root / f"router-new{name}", new, activation="log1p_relu")
        references[f"router-new{name}"] = make_router(root / f"as-gte{name}", masked_lm, activation="log1p_relu")
    for name in ("router-idf", "router-idf-config.json"):
        references[name] = _renamed(ours[name], root / f"renamed-{name}")
    return {name: Twin(str(ours[name]), str(references[name]), FAMILY[FAMILY_OF_TWIN[name]]) for name in FAMILY_OF_TWIN}


def _dense(width: int) -> Any:
    from sentence_transformers.base.modules import Dense

    return Dense(width, 24)


def _normalized(width: int) -> Any:
    from sentence_transformers.base.modules import Normalize

    return Normalize()


def changed(folder: Path, name: str, values: dict[str, Any]) -> Path:
    """Change values in one file of a checkpoint; return the checkpoint."""
    path = folder / name
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))
    return folder


def _renamed(router: Path, to: Path) -> Path:
    """Rename the query module of a router as in the current release."""
    shutil.copytree(router, to)
    (to / "query_0_IDF").rename(to / "query_0_SparseStaticEmbedding")
    config = next(path for path in (to / "router_config.json", to / "config.json") if path.exists())
    text = config.read_text().replace("models.IDF", "models.SparseStaticEmbedding")
    config.write_text(text.replace("query_0_IDF", "query_0_SparseStaticEmbedding"))
    return to


def _save_router(folder: Path, masked_lm: Path) -> Path:
    """Save a router with the current release."""
    import torch
    from sentence_transformers import SparseEncoder
    from sentence_transformers.base.modules import Router, Transformer
    from sentence_transformers.sparse_encoder.modules import SparseStaticEmbedding, SpladePooling

    transformer = Transformer(str(masked_lm), transformer_task="fill-mask", max_seq_length=40)
    weights = torch.rand(transformer.model.config.vocab_size) + 0.5
    router = Router.for_query_document(
        [SparseStaticEmbedding(transformer.tokenizer, weights)], [transformer, SpladePooling("max")]
    )
    SparseEncoder(modules=[router], prompts={"query": "the ", "document": ""}, device="cpu").save_pretrained(
        str(folder)
    )
    return folder


encoder_of = functools.cache(build_encoder)


@functools.cache
def reference_of(folder: str) -> Any:
    from sentence_transformers import SparseEncoder

    return SparseEncoder(folder, device="cpu")


def dense(encoded: Any, size: int) -> np.ndarray:
    rows = np.zeros((len(encoded.vectors.doc_ids), size), dtype=np.float32)
    for row in range(len(rows)):
        token_ids, weights = encoded.vectors.row(row)
        rows[row, token_ids] = weights
    return rows


def assert_same(found: np.ndarray, expected: np.ndarray) -> None:
    """Assert equality within 1e-4, and the same terms above 1e-4; smaller ones may be missing on one side."""
    np.testing.assert_allclose(found, expected, atol=1e-4, rtol=0)
    border = np.abs(expected - 1e-4) < 2e-5
    assert np.array_equal((found > 1e-4) & ~border, (expected > 1e-4) & ~border)


def as_rows(queries: Sequence[dict[str, float]], ids: dict[str | None, int], size: int) -> np.ndarray:
    rows = np.zeros((len(queries), size), dtype=np.float32)
    for row, weights in enumerate(queries):
        for token, weight in weights.items():
            rows[row, ids[token]] = weight
    return rows
