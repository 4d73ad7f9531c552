"""Tiny sparse encoders made of causal language models, in the layouts of SPLADE-Code and LACONIC.

Their tokenizers are byte-level BPE as Qwen's, with padding on the left and no special token around a text, or as
Llama's, with a token before each text and no padding token.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors

from support.checkpoints import MERGES, POSITIONS, WIDTH

START, END = "<|begin_of_text|>", "<|endoftext|>"
LLAMA_PIECES = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+"
)
CARD = "---\nlicense: cc-by-nc-sa-4.0\nlanguage: [en, code]\n---\n# A sparse encoder\n"
BASE: dict[str, Any] = {
    "hidden_size": WIDTH, "intermediate_size": 2 * WIDTH, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": POSITIONS, "initializer_range": 0.3,
}  # fmt: skip
# Layers of Gemma 3 see 4 tokens on each side, or all of them. Granite scales its logits.
SETTINGS: dict[str, dict[str, Any]] = {
    "Qwen3": {},
    "Llama": {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}},
    "Gemma3": {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]},
    "Granite": {"logits_scaling": 3.0},
    "Gemma2": {"layer_types": ["full_attention", "full_attention"]},
}
# The code of a checkpoint: sentence-transformers needs it to build a masked LM from Qwen3.
CODE = """
import os
from pathlib import Path
from transformers import Qwen3ForCausalLM as Original

if "RAN" in os.environ:
    Path(os.environ["RAN"]).touch()

class Qwen3ForCausalLM(Original):
    pass

class Splade(Original):
    pass
"""


def make_language_model(
    folder: Path, kind: str = "Qwen3", *, tied: bool = True, dtype: str = "float32", seed: int = 4, **config: Any
) -> Path:
    """Write a language model in the plain layout; `config` are more keys of config.json, such as `is_causal`."""
    import torch
    import transformers

    tokenizer = llama_tokenizer() if kind == "Llama" else qwen_tokenizer()
    given = {**BASE, "vocab_size": len(tokenizer), "tie_word_embeddings": tied, **SETTINGS[kind]}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        name = f"{kind}TextConfig" if kind == "Gemma3" else f"{kind}Config"
        built = getattr(transformers, name)(**given, pad_token_id=None, bos_token_id=None, eos_token_id=None)
        model = getattr(transformers, f"{kind}ForCausalLM")(built)
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    path = folder / "config.json"
    stated = config or {"is_causal": False}
    path.write_text(json.dumps({**json.loads(path.read_text()), **stated}))
    (folder / "README.md").write_text(CARD)
    return folder


def make_splade_code(folder: Path, **settings: Any) -> Path:
    """Write the layout of SPLADE-Code: Qwen3 with `is_causal: false`, modules.json, and code that is not needed."""
    make_language_model(folder, dtype="bfloat16", **settings)
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["auto_map"] = {"AutoModelForMaskedLM": "splade.Qwen3ForCausalLM", "AutoModelForCausalLM": "splade.Splade"}
    path.write_text(json.dumps(config))
    (folder / "splade.py").write_text(CODE)
    package = "sentence_transformers"
    (folder / "modules.json").write_text(
        json.dumps(
            [
                {"idx": 0, "name": "0", "path": "", "type": f"{package}.base.modules.transformer.Transformer"},
                {
                    "idx": 1, "name": "1", "path": "1_SpladePooling",
                    "type": f"{package}.sparse_encoder.modules.splade_pooling.SpladePooling",
                },
            ]
        )
    )  # fmt: skip
    (folder / "1_SpladePooling").mkdir()
    pooling = {"pooling_strategy": "max", "activation_function": "relu"}
    (folder / "1_SpladePooling" / "config.json").write_text(json.dumps(pooling))
    # Written by hand, but the library reads it.
    (folder / "sentence_bert_config.json").write_text(json.dumps({"transformer_task": "fill-mask"}))
    saved = {"model_type": "SparseEncoder", "prompts": {"query": "", "document": ""}, "similarity_fn_name": "dot"}
    (folder / "config_sentence_transformers.json").write_text(json.dumps(saved))
    return folder


def qwen_tokenizer() -> Any:
    """Return Qwen's tokenizer: no token around a text, and padding on the left."""
    from transformers import Qwen2Tokenizer

    return Qwen2Tokenizer(_vocabulary(), list(MERGES), padding_side="left", model_max_length=POSITIONS)


def llama_tokenizer() -> Any:
    """Return a tokenizer as Llama 3's: a token before each text, and no padding token."""
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE(_vocabulary(), list(MERGES), ignore_merges=True))
    pieces = pre_tokenizers.Split(Regex(LLAMA_PIECES), "isolated")
    bytes_of = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pieces, bytes_of])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([START, END])
    start = (START, tokenizer.token_to_id(START))
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{START} $A", special_tokens=[start])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=START, eos_token=END, model_max_length=POSITIONS
    )


def _vocabulary() -> dict[str, int]:
    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *(first + second for first, second in MERGES)]
    return {token: place for place, token in enumerate(tokens)}
