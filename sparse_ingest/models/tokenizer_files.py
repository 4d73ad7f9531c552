"""Read the tokenizer of a checkpoint from its files."""

from __future__ import annotations

import json
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

from tokenizers import AddedToken, models, normalizers, pre_tokenizers

from sparse_ingest.checkpoints.checks import (
    read_config,
    read_tokenizer,
    tokenizer_config,
    tokenizer_errors,
    tokenizer_text,
)
from sparse_ingest.checkpoints.layouts import transformers_has
from sparse_ingest.checkpoints.modules import damaged, read_json
from sparse_ingest.errors import CheckpointError
from sparse_ingest.queries.weight_table import BERT_CLASSES

OTHER_FILES = ("special_tokens_map.json", "added_tokens.json")
# One of these rows is needed: without, transformers would create an empty tokenizer.
TOKENIZER_FILES = (("tokenizer.json",), ("vocab.txt",), ("vocab.json", "merges.txt"), ("*.model",))

# The tokens of BERT's tokenizer by their keys in tokenizer_config.json, and its options with transformers' defaults.
BERT_TOKENS = {f"{name}_token": f"[{name.upper()}]" for name in ("unk", "sep", "pad", "cls", "mask")}
BERT_OPTIONS = {"do_lower_case": True, "strip_accents": None, "tokenize_chinese_chars": True}
BERT_PARTS = (models.WordPiece, normalizers.BertNormalizer, pre_tokenizers.BertPreTokenizer)
TOKENIZER_OPTIONS = ("additional_special_tokens", "extra_special_tokens", "split_special_tokens")


class Loaded(NamedTuple):
    """A tokenizer of the library tokenizers, its special tokens, and the ids of those that have a role."""

    tokenizer: Any
    padding_id: int
    special_ids: list[int]
    special: dict[str, int]


def load_tokenizer(folder: Path) -> Loaded:
    """Read the tokenizer in a folder. Raise `CheckpointError`."""
    return _bert_tokenizer(folder) or _any_tokenizer(folder)


def _bert_tokenizer(folder: Path) -> Loaded | None:
    """Read BERT's usual tokenizer, without the import of transformers, which takes a second.

    Return None if a file has a class, option or token that only transformers can interpret.
    """
    config, path = tokenizer_config(folder), folder / "tokenizer.json"
    settings = [config, *(read_json(folder / name) for name in OTHER_FILES)]
    named = {key: _content(value) for one in settings for key, value in one.items() if key.endswith("_token")}
    more = any(one.get(key) for one in settings for key in TOKENIZER_OPTIONS)
    decoder = config.get("added_tokens_decoder") or {}
    listed = {*settings[-1], *map(_content, decoder.values() if isinstance(decoder, dict) else [decoder])}
    is_bert = str(config.get("tokenizer_class")).removesuffix("Fast") in BERT_CLASSES
    others = named.items() - BERT_TOKENS.items() or listed - {*BERT_TOKENS.values()}
    if not is_bert or more or others or not path.is_file():
        return None
    tokenizer = read_tokenizer(path)
    model, normalizer = tokenizer.model, tokenizer.normalizer
    added = tokenizer.get_added_tokens_decoder().items()
    ids = {token.content: token_id for token_id, token in added}
    plain = {repr(AddedToken(one.content, special=one.special, normalized=False)) == repr(one) for _, one in added}
    parts = tuple(map(type, (model, normalizer, tokenizer.pre_tokenizer)))
    if parts != BERT_PARTS or ids.keys() != {*BERT_TOKENS.values()} or plain != {True}:
        return None
    found = [
        (model.unk_token, model.continuing_subword_prefix, model.max_input_chars_per_word),
        (normalizer.clean_text, normalizer.lowercase, normalizer.strip_accents, normalizer.handle_chinese_chars),
        tokenizer.encode("[MASK]").ids,
    ]
    expected = [
        ("[UNK]", "##", 100),
        (True, *(config.get(key, usual) for key, usual in BERT_OPTIONS.items())),
        [ids[token] for token in ("[CLS]", "[MASK]", "[SEP]")],
    ]
    if found != expected:
        return None
    special = {role: ids[token] for role, token in BERT_TOKENS.items()}
    return Loaded(tokenizer, special["pad_token"], sorted(ids.values()), special)


def _content(token: object) -> str:
    """Return the text of a token in tokenizer_config.json."""
    return str(token.get("content") if isinstance(token, dict) else token)


def _any_tokenizer(folder: Path) -> Loaded:
    """Read a tokenizer with transformers, in a folder with only the files that were checked."""
    from transformers import AutoConfig, AutoTokenizer, PretrainedConfig

    found = [sorted(path for name in row for path in folder.glob(name)) for row in TOKENIZER_FILES]
    if not any(len(paths) >= len(row) for paths, row in zip(found, TOKENIZER_FILES, strict=True)):
        looked = ", ".join(" with ".join(row) for row in TOKENIZER_FILES)
        raise damaged(f"{folder} has no tokenizer: looked for {looked}")
    if (path := folder / "tokenizer.json").exists():
        with tokenizer_errors(path):
            tokenizer_text(path)
    kind = str((config := read_config(folder)).get("model_type") or "")
    # Without a config it reads the model's.
    like = AutoConfig.for_model(kind) if transformers_has(kind) else PretrainedConfig()
    like.tokenizer_class = config.get("tokenizer_class")
    with tokenizer_errors(folder), TemporaryDirectory() as temporary:
        for path in chain.from_iterable(found):
            (Path(temporary) / path.name).symlink_to(path.resolve())
        for name, content in {
            "tokenizer_config.json": tokenizer_config(folder),
            **{name: read_json(folder / name) for name in OTHER_FILES if (folder / name).exists()},
        }.items():
            (Path(temporary) / name).write_text(json.dumps(content))
        loaded = AutoTokenizer.from_pretrained(temporary, config=like, local_files_only=True, trust_remote_code=False)
        if not loaded.is_fast:
            raise CheckpointError(f"{folder}: {type(loaded).__name__} is not a fast tokenizer. Use another model.")
    special = {name: loaded.convert_tokens_to_ids(token) for name, token in loaded.special_tokens_map.items()}
    padding_id, special_ids = int(loaded.pad_token_id or 0), sorted(set(loaded.all_special_ids))
    return Loaded(loaded.backend_tokenizer, padding_id, special_ids, special)
