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
    path = folder / "tokenizer.json"
    if not path.is_file() or not _declares_bert(folder):
        return None
    tokenizer = read_tokenizer(path)
    ids = _bert_ids(tokenizer, tokenizer_config(folder))
    if ids is None:
        return None
    special = {role: ids[token] for role, token in BERT_TOKENS.items()}
    return Loaded(tokenizer, special["pad_token"], sorted(special.values()), special)


def _declares_bert(folder: Path) -> bool:
    """Return whether the files beside tokenizer.json have BERT's class and tokens, and no option besides BERT's."""
    config = tokenizer_config(folder)
    *_, added = files = [config, *(read_json(folder / name) for name in OTHER_FILES)]
    if str(config.get("tokenizer_class")).removesuffix("Fast") not in BERT_CLASSES:
        return False
    if any(file.get(option) for file in files for option in TOKENIZER_OPTIONS):
        return False
    roles = {(key, _content(value)) for file in files for key, value in file.items() if key.endswith("_token")}
    decoder = config.get("added_tokens_decoder") or {}
    tokens = {*added, *map(_content, decoder.values() if isinstance(decoder, dict) else [decoder])}
    return roles <= {*BERT_TOKENS.items()} and tokens <= {*BERT_TOKENS.values()}


def _bert_ids(tokenizer: Any, config: dict[str, Any]) -> dict[str, int] | None:
    """Return the ids of BERT's tokens if a tokenizer has its parts, and the options in tokenizer_config.json."""
    model, normalizer, added = tokenizer.model, tokenizer.normalizer, tokenizer.get_added_tokens_decoder()
    ids = {token.content: token_id for token_id, token in added.items()}
    parts = tuple(map(type, (model, normalizer, tokenizer.pre_tokenizer)))
    if parts != BERT_PARTS or ids.keys() != {*BERT_TOKENS.values()}:
        return None
    # `repr` has all options of a token.
    if any(repr(one) != repr(AddedToken(one.content, special=one.special, normalized=False)) for one in added.values()):
        return None
    options = normalizer.lowercase, normalizer.strip_accents, normalizer.handle_chinese_chars
    is_usual = (
        (model.unk_token, model.continuing_subword_prefix, model.max_input_chars_per_word) == ("[UNK]", "##", 100)
        and normalizer.clean_text
        and options == tuple(config.get(key, usual) for key, usual in BERT_OPTIONS.items())
        and tokenizer.encode("[MASK]").ids == [ids[token] for token in ("[CLS]", "[MASK]", "[SEP]")]
    )
    return ids if is_usual else None


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
