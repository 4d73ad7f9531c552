"""Tiny checkpoints, created without network: two layers, 32 dimensions, random weights from a seed.

A strongly negative decoder bias and large weights give each text a few dozen terms. Five architectures, and gte also as
`NewForMaskedLM`. Layouts: plain masked LM, the same with idf.json, the sentence-transformers layouts of released SPLADE
cards with one encoder and with a Router, and the current format of SparseEncoder.save_pretrained.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
CHARACTERS = "abcdefghijklmnopqrstuvwxyz0123456789"
WORDS = tuple(
    "the of and river stone cloud lamp sparse vector search index token weight shard run water fire tree house "
    "bird Bird ü é 日 本".split()
)
PIECES = ("##ing", "##ed", "##er", "##ion", "##ly")
PUNCTUATION = tuple(".,!?-'\"()")
WORDPIECE = (*SPECIAL, *PUNCTUATION, *WORDS, *CHARACTERS, *(f"##{letter}" for letter in CHARACTERS), *PIECES)
MERGES = (("Ġ", "t"), ("h", "e"), ("Ġt", "he"), ("e", "r"), ("i", "n"), ("in", "g"), ("Ġ", "s"), ("o", "n"))
BPE_SPECIAL = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")
ARCHITECTURES = ("bert", "distilbert", "roberta", "modernbert", "gte")

PACKAGED = "package:cognition/model"
# The checkpoints of `make_all`, and a real one from a package.
CHECKPOINTS = (
    *(f"plain-{architecture}" for architecture in ARCHITECTURES),
    *(f"card-{architecture}" for architecture in ARCHITECTURES),
    "card-log1p_relu", "saved-bert", "saved-roberta", PACKAGED,
)  # fmt: skip

LAYERS, WIDTH, HEADS, POSITIONS = 2, 32, 4, 64

# Empty, very short, longer than 64 tokens, and letters inside and outside the vocabulary.
TEXTS = (
    "the river and the stone",
    "",
    "a",
    "Searching sparse vectors, weighted tokens; the Bird (of fire)!",
    "water " * 100,
    "日本 überé \U0001f600 e\u0301 \u2028 Ωmega",
    "   spaces\tand\nlines   ",
    "x" * 150,
    "token weight shard run",
)


def make_all(root: Path) -> dict[str, str]:
    """Write every checkpoint of `CHECKPOINTS`; return their paths by name."""
    made: dict[str, Path] = {}
    for kind in ARCHITECTURES:
        # Limit in the tokenizer, because sentence-transformers does not know that RoBERTa's positions start at 2.
        made[f"plain-{kind}"] = make_masked_lm(root / f"plain-{kind}", kind, model_max_length=POSITIONS)
        made[f"card-{kind}"] = make_splade_card(
            root / f"card-{kind}", kind, max_seq_length=40, lower_case=True, cased=True, prompts={"document": "fire: "}
        )
    made["card-log1p_relu"] = make_splade_card(root / "card-log1p_relu", activation="log1p_relu")
    for kind in ("bert", "roberta"):
        made[f"saved-{kind}"] = save_sparse_encoder(
            root / f"saved-{kind}",
            make_masked_lm(root / f"source-{kind}", kind, cased=True, seed=2),
            prompts={"query": "search ", "document": "Stone: "},
            max_seq_length=30,
            lower_case=True,
        )
    return {**{name: str(folder) for name, folder in made.items()}, PACKAGED: PACKAGED}


def build_encoder(
    model: str | Path,
    *,
    dtype: str = "float32",
    batch_tokens: int | None = None,
    window_stride: int | None = None,
    all_cores: bool = False,
    **settings: Any,
) -> Any:
    """Return a `DocumentEncoder` of a checkpoint; `settings` is `[model]`."""
    from sparse_ingest.checkpoints.layouts import read_checkpoint
    from sparse_ingest.checkpoints.settings import resolve_settings
    from sparse_ingest.models.documents import DocumentEncoder
    from sparse_ingest.pipeline import ModelSettings

    checkpoint = read_checkpoint(str(model))
    resolved = resolve_settings(ModelSettings(**settings), checkpoint)
    return DocumentEncoder(
        checkpoint,
        resolved,
        device="cpu",
        dtype=dtype,
        batch_tokens=batch_tokens,
        window_stride=window_stride,
        all_cores=all_cores,
    )


def make_masked_lm(
    folder: Path,
    architecture: str = "bert",
    *,
    seed: int = 1,
    cased: bool = False,
    model_max_length: int | None = None,
    type_vocab_size: int = 0,
) -> Path:
    """Write a checkpoint in the plain layout: config, weights, tokenizer.json and tokenizer_config.json.

    `type_vocab_size` is for gte, which exists with and without token types.
    """
    import torch
    import transformers

    config_of: dict[str, Callable[[], Any]] = {
        "bert": lambda: transformers.BertConfig(**sizes(len(WORDPIECE))),
        "distilbert": lambda: transformers.DistilBertConfig(
            vocab_size=len(WORDPIECE), dim=WIDTH, hidden_dim=2 * WIDTH, n_layers=LAYERS, n_heads=HEADS,
            max_position_embeddings=POSITIONS, initializer_range=0.3,
        ),
        "roberta": lambda: transformers.RobertaConfig(
            **{**sizes(len(_bpe_vocabulary())), "max_position_embeddings": POSITIONS + 2},
            pad_token_id=1, bos_token_id=0, eos_token_id=2, type_vocab_size=1,
        ),
        # One layer of global attention, two of local attention over 4 tokens on each side.
        "modernbert": lambda: transformers.ModernBertConfig(
            **{**sizes(len(WORDPIECE)), "num_hidden_layers": 3}, pad_token_id=0, cls_token_id=2, sep_token_id=3,
            bos_token_id=2, eos_token_id=3, local_attention=8, initializer_cutoff_factor=2.0,
        ),
        "gte": lambda: transformers.GteConfig(
            **sizes(len(WORDPIECE)), pad_token_id=0, type_vocab_size=type_vocab_size,
            rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
        ),
    }  # fmt: skip
    model_of = {
        "bert": "BertForMaskedLM", "distilbert": "DistilBertForMaskedLM", "roberta": "RobertaForMaskedLM",
        "modernbert": "ModernBertForMaskedLM", "gte": "GteForMaskedLM",
    }  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = getattr(transformers, model_of[architecture])(config_of[architecture]())
        model.get_output_embeddings().bias.data.normal_(-1.5, 0.7)
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    make_tokenizer(architecture, cased=cased, model_max_length=model_max_length).save_pretrained(folder)
    return folder


def make_tokenizer(architecture: str, *, cased: bool = False, model_max_length: int | None = None) -> Any:
    """Return the fast tokenizer of an architecture: byte-level BPE for RoBERTa, otherwise WordPiece."""
    from transformers import PreTrainedTokenizerFast

    tokenizer = byte_level_bpe() if architecture == "roberta" else wordpiece(cased=cased)
    names = ("cls", "pad", "sep", "unk", "mask") if architecture == "roberta" else ("pad", "unk", "cls", "sep", "mask")
    tokens = BPE_SPECIAL if architecture == "roberta" else SPECIAL
    special = {f"{name}_token": token for name, token in zip(names, tokens, strict=True)}
    limit = {} if model_max_length is None else {"model_max_length": model_max_length}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special, **limit)


def make_dense_lm(folder: Path, *, terms: int) -> Path:
    """Write a masked LM that gives every document more than `terms` terms, like a model without SPLADE training."""
    import torch
    import transformers

    make_masked_lm(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([f"word{number}" for number in range(terms)])
    tokenizer.save_pretrained(folder)
    model = transformers.AutoModelForMaskedLM.from_pretrained(folder)
    model.resize_token_embeddings(len(tokenizer))
    torch.nn.init.constant_(model.get_output_embeddings().bias, 9.0)
    model.save_pretrained(folder)
    return folder


def make_new(
    folder: Path, gte: Path, *, packed: bool = True, rope_scaling: Mapping[str, Any] | None = None, **changed: Any
) -> Path:
    """Write a gte checkpoint with the weight names of `NewForMaskedLM`, without its remote code."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(gte, folder)
    weights = {}
    for name, tensor in load_file(gte / "model.safetensors").items():
        name = f"new.{name.removeprefix('gte.')}" if name.startswith("gte.") else name
        if "qkv_proj" in name and not packed:
            for letter, part in zip("qkv", tensor.chunk(3), strict=True):
                weights[name.replace("qkv", letter)] = part.clone()
        else:
            weights[name] = tensor
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((gte / "config.json").read_text())
    theta = config.pop("rope_parameters")["rope_theta"]
    code = "Alibaba-NLP/new-impl--"
    config |= {
        "architectures": ["NewForMaskedLM"], "model_type": "new", "rope_theta": theta, "rope_scaling": rope_scaling,
        "auto_map": {
            "AutoConfig": f"{code}configuration.NewConfig", "AutoModelForMaskedLM": f"{code}modeling.NewForMaskedLM",
        },
        "layer_norm_type": "layer_norm", "logn_attention_clip1": False, "logn_attention_scale": False,
        "pack_qkv": packed, "position_embedding_type": "rope", "unpad_inputs": False,
        "use_memory_efficient_attention": False, **changed,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def make_router(
    folder: Path,
    masked_lm: Path,
    *,
    table: str = "SparseStaticEmbedding",
    transformer: str = "document_0_MLMTransformer",
    config_name: str = "router_config.json",
    activation: str = "relu",
    max_seq_length: int = POSITIONS,
    query_length: int = 6,
    prompts: Mapping[str, str] | None = None,
) -> Path:
    """Write a Router as on model cards.

    `table` is the class of the query module, `transformer` its folder ("" for the root).
    """
    from safetensors.numpy import save_file

    inside = folder / transformer
    shutil.copytree(masked_lm, inside, dirs_exist_ok=True)
    path = "sentence_transformers.sparse_encoder.models"
    query = f"query_0_{table}"
    size = json.loads((inside / "config.json").read_text())["vocab_size"]
    (folder / query).mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(masked_lm / name, folder / query)
    _write_json(folder / query / "tokenizer_config.json", model_max_length=query_length)
    save_file({"weight": table_weights(size)}, folder / query / "model.safetensors")
    (folder / query / "config.json").write_text(json.dumps({"frozen": False}))
    (folder / "document_1_SpladePooling").mkdir()
    pooling = {"pooling_strategy": "max", "activation_function": activation, "word_embedding_dimension": size}
    (folder / "document_1_SpladePooling" / "config.json").write_text(json.dumps(pooling))
    for name, content in {
        f"{transformer}/sentence_bert_config.json": {"max_seq_length": max_seq_length, "do_lower_case": False},
        "modules.json": [{"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Router"}],
        config_name: {
            "types": {
                query: f"{path}.{table}",
                transformer: f"{path}.MLMTransformer",
                "document_1_SpladePooling": f"{path}.SpladePooling",
            },
            "structure": {"query": [query], "document": [transformer, "document_1_SpladePooling"]},
            "parameters": {"default_route": "document", "allow_empty_key": True},
        },
        "config_sentence_transformers.json": {
            "model_type": "SparseEncoder",
            "__version__": {"sentence_transformers": "5.0.0", "transformers": "4.50.3", "pytorch": "2.6.0"},
            "prompts": dict(prompts or {}), "default_prompt_name": None, "similarity_fn_name": "dot",
        },
    }.items():  # fmt: skip
        (folder / name.lstrip("/")).write_text(json.dumps(content))
    return folder


def table_weights(size: int) -> Any:
    """Return weights by token id, all above zero, also for special tokens."""
    import numpy as np

    return np.random.default_rng(3).uniform(0.5, 9.0, size).astype(np.float32)


def write_idf(folder: Path, left_out: tuple[str, ...] = ()) -> Path:
    """Write an idf.json next to a masked LM, as in the models of OpenSearch."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    weights = table_weights(tokenizer.get_vocab_size()).tolist()
    tokens = (tokenizer.id_to_token(place) for place in range(len(weights)))
    idf = {token: weight for token, weight in zip(tokens, weights, strict=True) if token not in left_out}
    (folder / "idf.json").write_text(json.dumps(idf))
    return folder


def make_splade_card(
    folder: Path,
    architecture: str = "bert",
    *,
    activation: str = "relu",
    max_seq_length: int = POSITIONS,
    lower_case: bool = False,
    prompts: Mapping[str, str] | None = None,
    **masked_lm: Any,
) -> Path:
    """Write the symmetric layout of the splade-mini card, with its original type paths."""
    make_masked_lm(folder, architecture, **masked_lm)
    return as_splade_card(
        folder, activation=activation, max_seq_length=max_seq_length, lower_case=lower_case, prompts=prompts
    )


def as_splade_card(
    folder: Path,
    *,
    activation: str = "relu",
    max_seq_length: int = POSITIONS,
    lower_case: bool = False,
    prompts: Mapping[str, str] | None = None,
) -> Path:
    """Turn a plain folder into the layout of `make_splade_card`."""
    path = "sentence_transformers.sparse_encoder.models"
    modules = [
        {"idx": 0, "name": "0", "path": "", "type": f"{path}.MLMTransformer"},
        {"idx": 1, "name": "1", "path": "1_SpladePooling", "type": f"{path}.SpladePooling"},
    ]
    (folder / "1_SpladePooling").mkdir()
    size = json.loads((folder / "config.json").read_text())["vocab_size"]
    for name, content in {
        "modules.json": modules,
        "sentence_bert_config.json": {
            "max_seq_length": max_seq_length, "do_lower_case": lower_case,
        },
        "1_SpladePooling/config.json": {
            "pooling_strategy": "max", "activation_function": activation, "word_embedding_dimension": size,
        },
        "config_sentence_transformers.json": {
            "model_type": "SparseEncoder",
            "__version__": {"sentence_transformers": "5.1.1", "transformers": "4.56.2", "pytorch": "2.8.0"},
            "prompts": {"query": "", "document": "", **(prompts or {})},
            "default_prompt_name": None,
            "similarity_fn_name": "dot",
        },
    }.items():  # fmt: skip
        (folder / name).write_text(json.dumps(content))
    return folder


def save_sparse_encoder(
    folder: Path,
    masked_lm: Path,
    *,
    prompts: Mapping[str, str],
    max_seq_length: int,
    lower_case: bool,
    activation: str = "relu",
) -> Path:
    """Write the format of SparseEncoder.save_pretrained of the installed sentence-transformers."""
    from sentence_transformers import SparseEncoder
    from sentence_transformers.base.modules import Transformer
    from sentence_transformers.sparse_encoder.modules import SpladePooling

    transformer = Transformer(
        str(masked_lm), transformer_task="fill-mask", max_seq_length=max_seq_length, do_lower_case=lower_case
    )
    pooling = SpladePooling("max", activation_function=activation)
    SparseEncoder(modules=[transformer, pooling], prompts=dict(prompts), device="cpu").save_pretrained(str(folder))
    return folder


def _write_json(path: Path, **values: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def sizes(vocabulary: int) -> dict[str, Any]:
    return {
        "vocab_size": vocabulary,
        "hidden_size": WIDTH,
        "intermediate_size": 2 * WIDTH,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "max_position_embeddings": POSITIONS,
        "initializer_range": 0.3,
    }


def wordpiece(*, cased: bool) -> Tokenizer:
    vocabulary = {token: place for place, token in enumerate(WORDPIECE)}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]", max_input_chars_per_word=200))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=not cased)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.add_special_tokens(list(SPECIAL))
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    return tokenizer


def _bpe_vocabulary() -> dict[str, int]:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    return {token: place for place, token in enumerate([*BPE_SPECIAL, *letters, *(a + b for a, b in MERGES)])}


def byte_level_bpe() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(_bpe_vocabulary(), list(MERGES)))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(BPE_SPECIAL))
    tokenizer.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0), add_prefix_space=False)
    return tokenizer
