"""Check the config and tokenizer files of a checkpoint before a library reads them: they are untrusted.

Not covered: remote code (layouts.py), and whether sizes fit the weights (models/masked_lms.py).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from tokenizers import Tokenizer

from sparse_ingest.checkpoints.modules import MAX_CONFIG_BYTES, TRANSFORMER_CONFIGS, damaged, read_json
from sparse_ingest.errors import CheckpointError, SparseIngestError, first_line, short_repr
from sparse_ingest.storage.foreign_json import json_parts, parse_json, read_bytes

# transformers fetches or imports the repositories, packages and classes under these keys.
CODE_KEYS = {
    "quantization_config", "compression_config", "kernel_config", "use_kernels", "fusion_config", "custom_generate",
    "custom_pipelines", "peft_config", "base_model_name_or_path",
}  # fmt: skip
IMPLEMENTATION = re.compile(r"_?(attn|attention|experts)_implementation(_internal)?")
BUILT_IN = (None, "eager", "sdpa")  # others are packages, or kernels from the hub
CONFIGS = ("config.json", "tokenizer_config.json", "generation_config.json", *TRANSFORMER_CONFIGS)
LAYERS = (
    "num_hidden_layers", "n_layers", "num_layers", "n_layer", "encoder_layers", "decoder_layers", "num_hidden_groups",
)  # fmt: skip
WIDTHS = (
    "vocab_size", "hidden_size", "dim", "d_model", "embedding_size", "intermediate_size", "hidden_dim", "ffn_dim",
    "num_attention_heads", "n_heads",
)  # fmt: skip
# Smallest and largest value: four times the largest vocabulary, which `inspect` lists in a second. XLNet writes -1 for
# positions without a limit; gte has no token types.
SIZES = dict.fromkeys(LAYERS, (1, 512)) | dict.fromkeys(WIDTHS, (1, 1 << 20))
SIZES |= {"type_vocab_size": (0, 1 << 20), "n_positions": (1, 1 << 22), "max_position_embeddings": (-1, 1 << 22)}
TOKENIZER_CLASS = re.compile(r"[A-Za-z0-9_]+Tokenizer(Fast)?|(Tokenizers|Python|SentencePiece)Backend")
# Keys of tokenizer_config.json that name other files, or are arguments of transformers for other purposes.
DROPPED = re.compile(
    r".*_files?|chat_template|init_inputs|tokenizer_object|vocab|merges|name_or_path|subfolder|token|revision|"
    r"cache_dir|local_files_only|trust_remote_code|processor_class|_commit_hash"
)
# A group repeated without limit: Oniguruma may take time exponential in the length of a text.
REPEATED_GROUP = re.compile(r"(?<!\\)\)(?:[*+]|\{)")
MAX_WORD = 1000  # WordPiece takes time quadratic in the length of a word up to max_input_chars_per_word
MAX_TOKENIZER_BYTES = 64 << 20
# `tokenizers` takes about 280 bytes per entry. The largest vocabularies have 260,000 tokens and 520,000 merges.
MAX_COMMAS = {"vocab": 3 << 18, "merges": 1 << 21, "added_tokens": 1 << 20}
MAX_REPLACEMENT = 1000  # characters


def read_config(folder: Path) -> dict[str, Any]:
    """Read the config.json of a masked LM.

    Raise `CheckpointError` if it cannot be read, a size in it is wrong, or a config file of the folder names code that
    a library would fetch or import.
    """
    if (adapter := folder / "adapter_config.json").exists():
        refuse_adapter(adapter)
    for name in CONFIGS:
        _refuse_code(folder / name)
    path = folder / "config.json"
    config = read_json(path)
    for key, (least, most) in SIZES.items():
        if (value := config.get(key)) is not None and (type(value) is not int or not least <= value <= most):
            raise damaged(f"{path} has {key} = {short_repr(value)}; expected an integer from {least} to {most:,}")
    return config


def refuse_adapter(path: Path) -> NoReturn:
    """Raise CheckpointError for the config of an adapter, such as LoRA's."""
    raise CheckpointError(
        f"{path} describes an adapter; adapters are not supported. Merge it into its base model, for example with "
        "merge_and_unload() of peft, and save that."
    )


def _refuse_code(path: Path) -> None:
    for key, value in _entries(read_json(path)):
        named = value.values() if isinstance(value, dict) else [value]
        kernel = IMPLEMENTATION.fullmatch(key) and any(one not in BUILT_IN for one in named)
        own_tokenizer = key == "auto_map" and path.name == "tokenizer_config.json"
        if value and (kernel or own_tokenizer or key in CODE_KEYS):
            is_quantized = key in ("quantization_config", "compression_config")
            advice = "Use the model that was quantized" if is_quantized else "Remove the key in a copy of the folder"
            raise CheckpointError(
                f"{path} has {key} = {short_repr(value)}, for which a library would fetch or import code. This is "
                f"refused, even with --trust-remote-code. {advice}, or use another model."
            )


def _entries(value: object) -> Iterator[tuple[str, Any]]:
    """Yield every key and value in parsed JSON, at any depth."""
    if isinstance(value, dict):
        yield from value.items()
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        if isinstance(inner, dict | list):
            yield from _entries(inner)


def read_tokenizer(path: Path) -> Tokenizer:
    """Read a tokenizer.json. Raise CheckpointError if it is malformed, or its time or memory on a text is unbounded."""
    with tokenizer_errors(path):
        return Tokenizer.from_str(tokenizer_text(path))


@contextmanager
def tokenizer_errors(path: Path) -> Iterator[None]:
    """Convert the errors of `tokenizers`, which raises bare Exception or PanicException, to CheckpointError."""
    try:
        yield
    except (SparseIngestError, MemoryError):
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise damaged(f"{path} cannot be read as a tokenizer, or fails on a text: {first_line(error)}") from error


def tokenizer_text(path: Path) -> str:
    """Return a tokenizer.json. Raise ValueError if its rules are not bounded in time and memory."""
    content = read_bytes(path, MAX_TOKENIZER_BYTES)
    parts = json_parts(content)
    parts |= json_parts(parts.get("model", b"{}"))
    for key, most in MAX_COMMAS.items():
        if parts.get(key, b"").count(b",") > most:
            raise ValueError(f"its {key} has more than {most:,} entries; at most that many are read")
    others = (key for key in parts if key not in (*MAX_COMMAS, "model"))
    rules = {key: parse_json(parts[key], MAX_CONFIG_BYTES) for key in others}
    for key, value in _entries(rules):
        length = len(value) if isinstance(value, str) else 0
        if key == "Regex" and length and REPEATED_GROUP.search(value):
            raise ValueError(f"its pattern {short_repr(value)} repeats a group, which may take unlimited time")
        if key in ("content", "prepend", "Regex", "String") and length > MAX_REPLACEMENT:
            raise ValueError(f"its {key} has {length:,} characters; expected at most {MAX_REPLACEMENT:,}")
        if key == "max_input_chars_per_word" and not (type(value) is int and 0 <= value <= MAX_WORD):
            raise ValueError(f"its {key} is {short_repr(value)}; expected an integer from 0 to {MAX_WORD:,}")
    return content.decode()


def tokenizer_config(folder: Path) -> dict[str, Any]:
    """Return the settings in tokenizer_config.json without file names and templates. Raise CheckpointError for code."""
    path = folder / "tokenizer_config.json"
    _refuse_code(path)
    config = {key: value for key, value in read_json(path).items() if not DROPPED.fullmatch(key)}
    if config.get("truncation_side") == "left":
        raise CheckpointError(
            f'{path} has truncation_side = "left"; expected "right": the beginning of a long text is read. Set it in a '
            "copy of the folder if that suits the model."
        )
    name = config.get("tokenizer_class")
    if name is not None and not (isinstance(name, str) and TOKENIZER_CLASS.fullmatch(name)):
        raise damaged(
            f"{path} has tokenizer_class = {short_repr(name)}; expected a class of transformers, such as BertTokenizer"
        )
    return config
