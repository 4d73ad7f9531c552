"""Tiny checkpoints without a vocabulary projection: the files of BGE-M3, and of sparse autoencoders."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from support.checkpoints import CHARACTERS, HEADS, LAYERS, POSITIONS, PUNCTUATION, WIDTH, WORDS, make_masked_lm

UNIGRAM = (
    *(("<s>", 0.0), ("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)),
    *((f"▁{word}", -2.0 - place / 10) for place, word in enumerate(WORDS)),
    *(("▁", -4.0), ("ing", -5.0), ("ed", -5.5)),
    *((letter, -8.0 - place / 100) for place, letter in enumerate((*CHARACTERS, *PUNCTUATION))),
    ("<mask>", 0.0),
)


def make_bge_m3(
    folder: Path, *, positions: int = POSITIONS, weights: str = "sparse_linear.pt", seed: int = 3, **options: Any
) -> Path:
    """Write the files of BGE-M3: an XLM-RoBERTa without head in a pickle, two linear outputs, modules of dense vectors.

    `positions` is the number of tokens of a text, `options` are of the tokenizer.
    """
    import torch
    from transformers import XLMRobertaConfig, XLMRobertaModel, XLMRobertaTokenizer

    config = XLMRobertaConfig(
        vocab_size=len(UNIGRAM), hidden_size=WIDTH, intermediate_size=2 * WIDTH, num_hidden_layers=LAYERS,
        num_attention_heads=HEADS, max_position_embeddings=positions + 2, type_vocab_size=1, pad_token_id=1,
        bos_token_id=0, eos_token_id=2, initializer_range=0.3,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = XLMRobertaModel(config)
        linear = {"weight": torch.randn(1, WIDTH).half(), "bias": torch.tensor([0.25]).half()}
        colbert = {"weight": torch.randn(WIDTH, WIDTH).half(), "bias": torch.randn(WIDTH).half()}
    folder.mkdir(parents=True)
    model.config.architectures = ["XLMRobertaModel"]
    model.config.save_pretrained(folder)
    # A model that was trained without its pooler.
    tensors = {name: one for name, one in model.state_dict().items() if not name.startswith("pooler.")}
    torch.save(tensors, folder / "pytorch_model.bin")
    torch.save(colbert, folder / "colbert_linear.pt")
    write_linear(folder / weights, linear)
    XLMRobertaTokenizer(vocab=list(UNIGRAM), model_max_length=positions, **options).save_pretrained(folder)
    pooling = {"word_embedding_dimension": WIDTH, "pooling_mode_cls_token": True}
    _write(folder, "sentence_transformers.models", {"Transformer": None, "Pooling": pooling, "Normalize": {}})
    (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": positions, "do_lower_case": False}))
    return folder


def write_linear(path: Path, tensors: Mapping[str, Any]) -> None:
    """Write the weights of BGE-M3's output, as a pickle or as safetensors."""
    import torch
    from safetensors.torch import save_file

    if path.suffix == ".pt":
        torch.save(dict(tensors), path)
    else:
        save_file(dict(tensors), path)


def bge_m3_weights(folder: Path, texts: Sequence[str], max_length: int) -> Any:
    """Return `[texts, token ids]` by FlagEmbedding's formula for the lexical weights of BGE-M3, a text at a time."""
    import numpy as np
    import torch
    from transformers import AutoModel, AutoTokenizer

    model, tokenizer = AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    linear = torch.nn.Linear(model.config.hidden_size, 1)
    linear.load_state_dict(torch.load(folder / "sparse_linear.pt", weights_only=True))
    roles = ("cls_token", "eos_token", "pad_token", "unk_token")
    unused = [tokenizer.convert_tokens_to_ids(tokenizer.special_tokens_map[role]) for role in roles]
    found = np.zeros((len(texts), model.config.vocab_size), dtype=np.float32)
    for row, text in enumerate(texts):
        inputs = tokenizer(text, truncation=True, max_length=max_length, return_tensors="pt")
        with torch.no_grad():
            weights = torch.relu(linear(model(**inputs).last_hidden_state))[0, :, 0].tolist()
        for token_id, weight in zip(inputs["input_ids"][0].tolist(), weights, strict=True):
            if token_id not in unused:
                found[row, token_id] = max(found[row, token_id], weight)
    return found


def make_autoencoder(
    folder: Path,
    architecture: str = "bert",
    *,
    pooling: str | tuple[str, ...] = "mean",
    layers: Sequence[Callable[[int], Any]] = (),
    features: int = 96,
    k: int = 20,
    normalize: bool = False,
    **options: Any,
) -> Path:
    """Write a sparse autoencoder with SparseEncoder.save_pretrained of the installed sentence-transformers.

    `layers` create the modules after the pooling for the width of their input; `options` are of SparseEncoder.
    """
    import torch
    from sentence_transformers import SparseEncoder
    from sentence_transformers.base.modules import Transformer
    from sentence_transformers.sentence_transformer.modules import Pooling
    from sentence_transformers.sparse_encoder.modules import SparseAutoEncoder

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        modules = [Transformer(str(make_base(folder.with_name(f"{folder.name}-base"), architecture)))]
        modules.append(Pooling(modules[0].get_embedding_dimension(), pooling))
        width = modules[1].get_embedding_dimension()
        for layer in layers:
            modules.append(layer(width))
            width = getattr(modules[-1], "out_features", width)
        modules.append(SparseAutoEncoder(width, features, k=k, k_aux=8, normalize=normalize))
        modules[-1].pre_bias.data.normal_(0, 0.1)
        modules[-1].latent_bias.data.normal_(0.2, 0.3)
        SparseEncoder(modules=modules, device="cpu", **options).save_pretrained(str(folder))
    return folder


def make_base(folder: Path, architecture: str) -> Path:
    """Write a transformer without a head: one of `make_masked_lm`, or qwen3, which attends to earlier tokens only."""
    import transformers

    from support.checkpoints import WORDPIECE, make_tokenizer, sizes

    if architecture == "qwen3":
        config = transformers.Qwen3Config(**sizes(len(WORDPIECE)), num_key_value_heads=2, head_dim=8)
        model: Any = transformers.Qwen3Model(config)
        make_tokenizer(architecture).save_pretrained(folder)
    else:
        model = transformers.AutoModel.from_pretrained(make_masked_lm(folder, architecture))
        (folder / "model.safetensors").unlink()
    model.save_pretrained(folder)
    return folder


def as_older_release(folder: Path) -> Path:
    """Write the pooling and the modules of an autoencoder as sentence-transformers 5.0 did."""
    path = folder / "1_Pooling" / "config.json"
    mode = json.loads(path.read_text())["pooling_mode"]
    path.write_text(json.dumps({"word_embedding_dimension": WIDTH, f"pooling_mode_{mode}_tokens": True}))
    path = folder / "modules.json"
    modules = json.loads(path.read_text())
    for module in modules:
        package = "sparse_encoder.models" if module["type"].endswith("SparseAutoEncoder") else "models"
        module["type"] = f"sentence_transformers.{package}.{module['type'].rpartition('.')[2]}"
    path.write_text(json.dumps(modules))
    (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 12, "do_lower_case": False}))
    return folder


def _write(folder: Path, package: str, modules: Mapping[str, Mapping[str, Any] | None]) -> None:
    """Write modules.json, and the config of each module that has one."""
    rows = []
    for place, (kind, config) in enumerate(modules.items()):
        path = "" if config is None else f"{place}_{kind}"
        rows.append({"idx": place, "name": str(place), "path": path, "type": f"{package}.{kind}"})
        if config:
            (folder / path).mkdir()
            (folder / path / "config.json").write_text(json.dumps(config))
    (folder / "modules.json").write_text(json.dumps(rows))
