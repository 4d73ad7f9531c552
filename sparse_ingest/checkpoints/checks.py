"""Files of a checkpoint, checked before a library reads them: a model folder is untrusted data.

In: a folder. Out: its config.json as a dictionary that names no code and no size beyond its weights, its tokenizer.json
and tokenizer_config.json. Not covered: the code of a checkpoint's own that is run when it is trusted (layouts.py), and
the weights themselves (models/masked_lms.py).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from sparse_ingest.checkpoints.modules import MAX_BYTES, TRANSFORMER_CONFIGS, read_json
from sparse_ingest.checkpoints.tensors import read_shapes
from sparse_ingest.errors import CheckpointError, SparseIngestError, first_line
from sparse_ingest.storage.foreign_json import json_parts, parse_json, read_bytes, shown

# Values under these keys are repositories, packages or classes, which transformers fetches or imports.
CODE_KEYS = {
    "quantization_config", "compression_config", "kernel_config", "use_kernels", "fusion_config", "custom_generate",
    "custom_pipelines", "peft_config", "base_model_name_or_path",
}  # fmt: skip
IMPLEMENTATION = re.compile(r"_?(attn|attention|experts)_implementation(_internal)?")
BUILT_IN = (None, "eager", "sdpa")  # other implementations are packages or kernels of the hub
CONFIGS = ("config.json", "tokenizer_config.json", "generation_config.json", *TRANSFORMER_CONFIGS)
LAYERS = (
    "num_hidden_layers", "n_layers", "num_layers", "n_layer", "encoder_layers", "decoder_layers", "num_hidden_groups",
)  # fmt: skip
WIDTHS = (
    "vocab_size", "hidden_size", "dim", "d_model", "embedding_size", "intermediate_size", "hidden_dim", "ffn_dim",
    "num_attention_heads", "n_heads", "type_vocab_size",
)  # fmt: skip
USUAL_LAYERS = 128  # allowed whatever the weights are: some models use one layer several times
USUAL_SIZE = 1 << 17  # allowed as well: whether it fits the weights is found when the model is built
LARGEST_SIZE = 1 << 22  # more than any vocabulary has, and than any position table
TOKENIZER_CLASS = re.compile(r"[A-Za-z0-9_]+Tokenizer(Fast)?|(Tokenizers|Python|SentencePiece)Backend")
# Of tokenizer_config.json: other files, and arguments of transformers that are none of the tokenizer's.
DROPPED = re.compile(
    r".*_files?|chat_template|init_inputs|tokenizer_object|vocab|merges|name_or_path|subfolder|token|revision|"
    r"cache_dir|local_files_only|trust_remote_code|processor_class|_commit_hash"
)
# A group that is repeated without a limit: Oniguruma may take time exponential in the length of a text.
REPEATED_GROUP = re.compile(r"(?<!\\)\)(?:[*+]|\{)")
MAX_WORD = 1000  # WordPiece takes time quadratic in the length of a word up to max_input_chars_per_word
MAX_TOKENIZER_BYTES = 64 << 20
# `tokenizers` takes some 280 bytes of memory a part. The largest vocabularies have 260,000 tokens and 520,000 merges.
MAX_COMMAS = {"vocab": 3 << 18, "merges": 1 << 21, "added_tokens": 1 << 20}
MAX_REPLACEMENT = 1000  # characters that stand for each match in a text


def read_config(folder: Path) -> dict[str, Any]:
    """Read the config.json of a masked LM.

    Raises:
        CheckpointError: it cannot be read, it or a file beside it names code that a library would fetch or import, or
            a size in it is no whole number or beyond the weights.
    """
    if (adapter := folder / "adapter_config.json").exists():
        raise CheckpointError(
            f"{adapter} describes an adapter, which is not applied here: merge it into its base model, and save that."
        )
    for name in CONFIGS:
        _refuse_code(folder / name)
    config = read_json(folder / "config.json")
    _refuse_sizes(folder, config)
    return config


def _refuse_code(path: Path) -> None:
    for key, value in _entries(read_json(path)):
        named = value.values() if isinstance(value, dict) else [value]
        kernel = IMPLEMENTATION.fullmatch(key) and any(one not in BUILT_IN for one in named)
        own_tokenizer = key == "auto_map" and path.name == "tokenizer_config.json"
        if value and (kernel or own_tokenizer or key in CODE_KEYS):
            raise CheckpointError(
                f"{path} has {key} = {shown(value)}, by which a library would fetch or import code. That is never "
                "done here, with or without --trust-remote-code: remove the key in a copy of the folder, or name "
                "another model."
            )


def _entries(value: object) -> Iterator[tuple[str, Any]]:
    """Yield every key and value of parsed JSON, at any depth."""
    if isinstance(value, dict):
        yield from value.items()
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    for one in inner:
        if isinstance(one, dict | list):
            yield from _entries(one)


def _refuse_sizes(folder: Path, config: dict[str, Any]) -> None:
    shapes: dict[str, list[int]] = {}
    with suppress(CheckpointError):  # damaged weights are reported where they are read
        shapes = {name: shape for name, shape in read_shapes(folder).items() if shape and all(shape)}
    largest = max(shapes, key=lambda name: max(shapes[name]), default="")
    widest = min(max(*shapes[largest], USUAL_SIZE) if largest else LARGEST_SIZE, LARGEST_SIZE)
    blocks = len({number for name in shapes for number in re.findall(r"(?<=\.)\d+(?=\.)", name)})
    heads = next((key for key in ("num_attention_heads", "n_heads") if config.get(key) is not None), "")
    width = config.get("hidden_size", config.get("dim"))
    limits = dict.fromkeys(LAYERS, max(blocks, USUAL_LAYERS)) | dict.fromkeys(WIDTHS, widest)
    limits |= {"max_position_embeddings": LARGEST_SIZE, "n_positions": LARGEST_SIZE}
    for key, limit in limits.items():
        # XLNet writes -1 for positions without a limit; gte has no token types.
        least = {"max_position_embeddings": -1, "type_vocab_size": 0}.get(key, 1)
        if (value := config.get(key)) is not None and (type(value) is not int or not least <= value <= limit):
            found = f"the largest tensor of its weights, {shown(largest)}, has the shape {shapes[largest]}"
            found = found if largest else "no header of its weights can be read"
            raise CheckpointError(
                f"{folder / 'config.json'} has {key} = {shown(value)}; expected a whole number from {least} to "
                f"{limit:,} ({found}). Fetch the model again."
            )
    if heads and isinstance(width, int) and width % config[heads] and not config.get("head_dim"):
        raise CheckpointError(
            f"{folder / 'config.json'} has {heads} = {config[heads]}, which does not divide the width of its hidden "
            f"states, {width}. Fetch the model again."
        )


def read_tokenizer(path: Path) -> Tokenizer:
    """Read a tokenizer.json.

    Raises:
        CheckpointError: it is absent or malformed, or could take any time or memory on a text.
    """
    with tokenizer_errors(path):
        return Tokenizer.from_str(tokenizer_text(path))


@contextmanager
def tokenizer_errors(path: Path) -> Iterator[None]:
    """Turn every error of `tokenizers`, which raises bare Exception or PanicException, into a CheckpointError."""
    try:
        yield
    except (SparseIngestError, MemoryError):
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise CheckpointError(
            f"{path} cannot be read as a tokenizer, or fails on a text: {first_line(error)}. Fetch the model again."
        ) from error


def tokenizer_text(path: Path) -> str:
    """Return a tokenizer.json whose rules are bounded in time and memory. Raise ValueError if they are not."""
    content = read_bytes(path, MAX_TOKENIZER_BYTES)
    if len(content) > MAX_TOKENIZER_BYTES:
        raise ValueError(f"it has too many bytes; at most {MAX_TOKENIZER_BYTES:,} are read")
    parts = json_parts(content)
    parts |= json_parts(parts.get("model", b"{}"))
    for key, most in MAX_COMMAS.items():
        if parts.get(key, b"").count(b",") > most:
            raise ValueError(f"its {key} has more than {most:,} parts, which is the most that is read")
    rules = {key: parse_json(part, MAX_BYTES) for key, part in parts.items() if key not in (*MAX_COMMAS, "model")}
    for key, value in _entries(rules):
        length = len(value) if isinstance(value, str) else 0
        if key == "Regex" and length and REPEATED_GROUP.search(value):
            raise ValueError(f"its pattern {shown(value)} repeats a group, which may take any time on a text")
        if key in ("content", "prepend", "Regex", "String") and length > MAX_REPLACEMENT:
            raise ValueError(f"its {key} has {length:,} characters; expected at most {MAX_REPLACEMENT:,}")
        if key == "max_input_chars_per_word" and not (type(value) is int and 0 <= value <= MAX_WORD):
            raise ValueError(f"its {key} is {shown(value)}; expected a whole number from 0 to {MAX_WORD:,}")
    return content.decode()


def tokenizer_config(folder: Path) -> dict[str, Any]:
    """Return what tokenizer_config.json says of the tokenizer: without names of other files, templates and code.

    Raises:
        CheckpointError: it names code, or its class is none of a tokenizer of transformers.
    """
    path = folder / "tokenizer_config.json"
    _refuse_code(path)
    config = {key: value for key, value in read_json(path).items() if not DROPPED.fullmatch(key)}
    name = config.get("tokenizer_class")
    if name is not None and not (isinstance(name, str) and TOKENIZER_CLASS.fullmatch(name)):
        raise CheckpointError(
            f"{path} has tokenizer_class = {shown(name)}; expected a tokenizer of transformers, such as BertTokenizer. "
            "Fetch the model again."
        )
    return config
