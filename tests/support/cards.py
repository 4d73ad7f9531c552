"""A tiny copy of each model card: the files, types and names of the real repository, with seeded random weights.

Old layouts are written by hand as their library wrote them, because no current release writes them.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from support import checkpoints as made_checkpoints
from support.checkpoints import WORDPIECE, make_masked_lm, make_splade_card, make_tokenizer

OLD = "sentence_transformers.sparse_encoder.models"
# Query weights of a copy's table: one token of each relevant kind.
TABLE = {"the": 0.5, "river": 3.25, "stone": 2.0, "##ing": 1.5, "water": 0.0}


class Twin(NamedTuple):
    """Folders of the document model and, if the card has two models, of the query model."""

    document: Path
    query: Path | None = None

    def assignments(self) -> list[str]:
        """Return the `--set` options that replace the card's model names."""
        given = {"model.document": self.document, "model.query": self.query}
        return [f"{key}={folder}" for key, folder in given.items() if folder]


def build_gte() -> Any:
    """Build the model that `make_gte` writes."""
    import torch
    import transformers

    sizes = made_checkpoints.sizes(len(WORDPIECE))
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = transformers.GteForMaskedLM(transformers.GteConfig(**sizes, pad_token_id=0, rope_parameters=rope))
        model.get_output_embeddings().bias.data.normal_(-1.5, 0.7)
    return model.eval()


def make_gte(folder: Path) -> Path:
    """Write a masked LM in the layout of Alibaba's gte models: `NewForMaskedLM`, its weight names and remote code."""
    from safetensors.torch import load_file, save_file

    folder.mkdir(parents=True)
    build_gte().save_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    renamed = {
        f"new.{name.removeprefix('gte.')}" if name.startswith("gte.") else name: weights[name] for name in weights
    }
    save_file(renamed, folder / "model.safetensors", metadata={"format": "pt"})
    code = "Alibaba-NLP/new-impl--modeling"
    config = {
        **made_checkpoints.sizes(len(WORDPIECE)),
        "architectures": ["NewForMaskedLM"], "model_type": "new", "rope_theta": 10000.0, "pad_token_id": 0,
        "type_vocab_size": 1, "layer_norm_type": "layer_norm", "hidden_act": "gelu", "pack_qkv": True,
        "position_embedding_type": "rope", "logn_attention_scale": False, "layer_norm_eps": 1e-12,
        "auto_map": {"AutoConfig": "Alibaba-NLP/new-impl--configuration.NewConfig",
                     "AutoModelForMaskedLM": f"{code}.NewForMaskedLM"},
    }  # fmt: skip
    _write(folder / "config.json", config)
    make_tokenizer("bert").save_pretrained(folder)
    return folder


def make_router(
    folder: Path, masked_lm: Callable[[Path], object], *, query: str, activation: str, config_name: str
) -> Path:
    """Write a router: documents use a masked LM and SpladePooling, queries a static table of class `query`."""
    import torch
    from safetensors.torch import save_file

    names = [f"query_0_{query}", "document_0_MLMTransformer", "document_1_SpladePooling"]
    table, transformer, pooling = (folder / name for name in names)
    masked_lm(transformer)
    _write(transformer / "sentence_bert_config.json", {"max_seq_length": made_checkpoints.POSITIONS})
    splade = {"pooling_strategy": "max", "activation_function": activation, "word_embedding_dimension": len(WORDPIECE)}
    _write(pooling / "config.json", splade)
    weights = torch.tensor([TABLE.get(token, 1.0) for token in WORDPIECE])
    _write(table / "config.json", {"frozen": False})
    save_file({"weight": weights}, table / "model.safetensors")
    make_tokenizer("bert", model_max_length=made_checkpoints.POSITIONS).save_pretrained(table)
    router = {
        "types": {name: f"{OLD}.{name.rpartition('_')[2]}" for name in names},
        "structure": {"query": names[:1], "document": names[1:]},
        "parameters": {"default_route": "query", "allow_empty_key": True},
    }
    _write(folder / config_name, router)
    module = {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Router"}
    _write(folder / "modules.json", [module])
    prompts = {"prompts": {"query": "", "document": ""}, "default_prompt_name": None, "similarity_fn_name": "dot"}
    _write(folder / "config_sentence_transformers.json", {"model_type": "SparseEncoder", **prompts})
    return folder


def _splade_distilbert_mrl(root: Path) -> Twin:
    return Twin(make_splade_card(root / "card", "distilbert"))


def _splade_mini(root: Path) -> Twin:
    folder = make_splade_card(root / "card", "bert")
    path = folder / "sentence_bert_config.json"
    _write(path, {**json.loads(path.read_text()), "architecture": "BertForMaskedLM"})
    return Twin(folder)


def _inference_free_distilbert_nq(root: Path) -> Twin:
    def masked_lm(folder: Path) -> object:
        return make_masked_lm(folder, "distilbert")

    return Twin(make_router(root / "card", masked_lm, query="IDF", activation="relu", config_name="config.json"))


def _opensearch_doc_v3_gte_limit(root: Path) -> Twin:
    static = "SparseStaticEmbedding"
    folder = make_router(
        root / "card", make_gte, query=static, activation="log1p_relu", config_name="router_config.json"
    )
    return Twin(folder)


def _opensearch_doc_v3_gte(root: Path) -> Twin:
    folder = make_gte(root / "card")
    _write(folder / "idf.json", TABLE)
    return Twin(folder)


def _efficient_splade_large(root: Path) -> Twin:
    return Twin(_pickled(root / "doc", "distilbert", 4), _pickled(root / "query", "bert", 5))


def _pickled(folder: Path, architecture: str, seed: int) -> Path:
    """Write weights as pytorch_model.bin, the format of naver's pair."""
    import torch
    from safetensors.torch import load_file

    make_masked_lm(folder, architecture, seed=seed)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    return folder


# Packaged pipeline -> function that writes its copy.
CARD_TWINS: dict[str, Callable[[Path], Twin]] = {
    "splade-distilbert-mrl": _splade_distilbert_mrl,
    "inference-free-distilbert-nq": _inference_free_distilbert_nq,
    "splade-mini": _splade_mini,
    "opensearch-doc-v3-gte": _opensearch_doc_v3_gte,
    "opensearch-doc-v3-gte-limit": _opensearch_doc_v3_gte_limit,
    "efficient-splade-large": _efficient_splade_large,
}


def _write(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
