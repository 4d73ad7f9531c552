"""License, languages, number of parameters and vocabulary of a model folder, read without loading the model."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from sparse_ingest.checkpoints.checks import read_tokenizer
from sparse_ingest.checkpoints.hub import CARD
from sparse_ingest.checkpoints.modules import damaged, read_json
from sparse_ingest.checkpoints.tensors import read_header, weight_files
from sparse_ingest.storage.foreign_json import read_bytes

SPECIAL_TOKENS = ("cls_token", "sep_token", "bos_token", "eos_token", "unk_token", "pad_token", "mask_token")
SHOWN_RANGES = 8
MAX_CARD_BYTES = 1 << 18


class Card(NamedTuple):
    """License and languages in the front matter of README.md; None if it has no license."""

    license: str | None
    languages: list[str]

    @property
    def is_non_commercial(self) -> bool:
        """Whether the name of the license shows that it forbids commercial use, such as cc-by-nc-sa-4.0."""
        return bool(re.search(r"(^|[-_ ])nc($|[-_ ])|non-?commercial|research-only", (self.license or "").lower()))


class Vocabulary(NamedTuple):
    """The tokens of a tokenizer; `model` is WordPiece, BPE or Unigram, `shared` the strings that several ids have."""

    model: str
    tokens: list[str | None]
    shared: list[str]
    special: dict[str, str]

    @property
    def is_bert_uncased(self) -> bool:
        """Whether these are the ids of bert-base-uncased, as in OpenSearch's analyzer; only a few are compared."""
        known = {0: "[PAD]", 101: "[CLS]", 1996: "the", 7592: "hello"}
        return len(self.tokens) == 30522 and all(self.tokens[token_id] == token for token_id, token in known.items())


def read_card(folder: Path) -> Card:
    """Read license and languages from the model card; a card that is missing or malformed has neither."""
    from huggingface_hub import metadata_load

    path = folder / CARD
    try:
        # Parsing 100 KB of YAML, such as test results, takes a second.
        matter = (metadata_load(path) if path.is_file() and path.stat().st_size <= MAX_CARD_BYTES else None) or {}
        license, language = matter.get("license"), matter.get("language")
        license = matter.get("license_name") or license if license == "other" else license
    except Exception:  # YAML, encoding, unexpected types
        license = language = None
    # Only strings: other values may be huge through YAML aliases.
    languages = [one for one in (language if isinstance(language, list) else [language]) if isinstance(one, str)]
    return Card(license if isinstance(license, str) else None, languages)


def count_parameters(folder: Path) -> int | None:
    """Return the number of parameters in a folder's safetensors, None without such a file. Raise CheckpointError."""
    headers = [read_header(path)[1] for path in weight_files(folder) if path.suffix == ".safetensors"]
    return sum(math.prod(tensor.shape) for header in headers for tensor in header.values()) or None


def has_pickle(folder: Path) -> bool:
    """Return whether a folder has its weights in a pickle."""
    return any(path.suffix == ".bin" for path in weight_files(folder))


def describe_vocabulary(folder: Path, size: int | None = None) -> Vocabulary | None:
    """Read the tokens of tokenizer.json, else of vocab.txt, else None; `size` is the number of ids of the model."""
    path = folder / "tokenizer.json"
    if path.is_file():
        tokenizer = read_tokenizer(path)
        count = size or tokenizer.get_vocab_size(with_added_tokens=True)
        tokens = [tokenizer.id_to_token(token_id) for token_id in range(count)]
        model = type(tokenizer.model).__name__
    elif (folder / "vocab.txt").is_file():
        try:
            tokens = list(read_bytes(folder / "vocab.txt").decode(errors="replace").splitlines())
        except ValueError as error:
            raise damaged(f"{folder / 'vocab.txt'} cannot be read: {error}") from error
        model = "WordPiece"
    else:
        return None
    counted = Counter(token for token in tokens if token is not None)
    shared = [token for token, times in counted.items() if times > 1]
    return Vocabulary(model, tokens, shared, _special_tokens(folder))


def ranges_without_token(tokens: Sequence[str | None], size: int) -> list[tuple[int, int]]:
    """Return the first and last id of each range of ids below `size` that have no token."""
    ranges: list[tuple[int, int]] = []
    for token_id in (one for one in range(size) if one >= len(tokens) or tokens[one] is None):
        follows = bool(ranges) and ranges[-1][1] == token_id - 1
        ranges[-1 if follows else len(ranges) :] = [(ranges[-1][0] if follows else token_id, token_id)]
    return ranges


def named_ranges(ranges: Sequence[tuple[int, int]]) -> str:
    """Return ranges of ids as text, such as 5, 30522-30527."""
    names = [str(first) if first == last else f"{first}-{last}" for first, last in ranges]
    rest = [f"and {len(names) - SHOWN_RANGES} more ranges"] if len(names) > SHOWN_RANGES else []
    return ", ".join(names[:SHOWN_RANGES] + rest)


def lost_weights(count: int, vocabulary: Sequence[str | None]) -> str:
    """Return the warning that `count` weights on ids without a token were omitted."""
    ids = named_ranges(ranges_without_token(vocabulary, len(vocabulary)))
    return (
        f"{count:,} weights were omitted: the tokenizer has no token for their ids ({ids}), and an index keys weights "
        "by token. Scores are lower than the model's by the share of these weights."
    )


def _special_tokens(folder: Path) -> dict[str, str]:
    """Return the special tokens by role. Older releases write them to special_tokens_map.json, with details."""
    tokens: dict[str, str] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        for key, value in read_json(folder / name).items():
            token = value.get("content") if isinstance(value, dict) else value
            if key in SPECIAL_TOKENS and isinstance(token, str):
                tokens[key] = token
    return {key: tokens[key] for key in SPECIAL_TOKENS if key in tokens}
