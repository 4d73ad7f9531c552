"""The model card, the tokenizer and the number of parameters of a model folder, read without loading the model.

In: a folder. Out: license, languages, number of parameters, vocabulary. Not covered: settings (settings.py), pickles
(models/masked_lms.py).
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from sparse_ingest.checkpoints.checks import read_tokenizer
from sparse_ingest.checkpoints.hub import CARD, PICKLES
from sparse_ingest.checkpoints.modules import read_json
from sparse_ingest.checkpoints.tensors import read_shapes
from sparse_ingest.storage.foreign_json import read_bytes

SPECIAL_TOKENS = ("cls_token", "sep_token", "bos_token", "eos_token", "unk_token", "pad_token", "mask_token")
SHOWN_RANGES = 8
MAX_CARD_BYTES = 1 << 18


class Card(NamedTuple):
    """What the front matter of README.md says; None where it is silent."""

    license: str | None
    languages: list[str]

    @property
    def is_non_commercial(self) -> bool:
        """Whether the license forbids commercial use, as far as its name tells (cc-by-nc-sa-4.0)."""
        return bool(re.search(r"(^|[-_ ])nc($|[-_ ])|non-?commercial|research-only", (self.license or "").lower()))


class Vocabulary(NamedTuple):
    """A tokenizer's tokens: `model` is WordPiece, BPE or Unigram; `shared` are strings that several ids have."""

    model: str
    tokens: list[str | None]
    shared: list[str]
    special: dict[str, str]

    @property
    def is_bert_uncased(self) -> bool:
        """Whether these are the ids of bert-base-uncased, which OpenSearch's own analyzer knows; judged by a few."""
        known = {0: "[PAD]", 101: "[CLS]", 1996: "the", 7592: "hello"}
        return len(self.tokens) == 30522 and all(self.tokens[token_id] == token for token_id, token in known.items())


def read_card(folder: Path) -> Card:
    """License and languages; a card that is absent or cannot be read says nothing."""
    from huggingface_hub import metadata_load

    path = folder / CARD
    try:
        # Some front matter has a hundred kilobytes of test results; a reader of YAML takes a second for it.
        said = (metadata_load(path) if path.is_file() and path.stat().st_size <= MAX_CARD_BYTES else None) or {}
        license, language = said.get("license"), said.get("language")
        license = said.get("license_name") or license if license == "other" else license
    except Exception:  # errors of YAML, of the encoding, of what people write between the dashes
        license = language = None
    # Only strings: of other values YAML can make any number by naming one many times.
    languages = [one for one in (language if isinstance(language, list) else [language]) if isinstance(one, str)]
    return Card(license if isinstance(license, str) else None, languages)


def count_parameters(folder: Path) -> int | None:
    """The numbers in a folder's safetensors, from their headers; None where there are none.

    Raises:
        CheckpointError: a file is no safetensors, or shorter than its header says.
    """
    shapes = read_shapes(folder)
    return sum(map(math.prod, shapes.values())) if shapes else None


def has_pickle(folder: Path) -> bool:
    """Whether a folder's weights are a pickle."""
    return not list(folder.glob("*.safetensors")) and bool(list(folder.glob(PICKLES)))


def read_vocabulary(folder: Path, size: int | None = None) -> Vocabulary | None:
    """The tokens of tokenizer.json, or of vocab.txt for the ids that it numbers; None where neither is there.

    `size` is how many ids the model has, which may be more than the tokenizer knows.

    Raises:
        CheckpointError: tokenizer.json cannot be read.
    """
    path = folder / "tokenizer.json"
    if path.is_file():
        tokenizer = read_tokenizer(path)
        count = size or tokenizer.get_vocab_size(with_added_tokens=True)
        tokens = [tokenizer.id_to_token(token_id) for token_id in range(count)]
        model = type(tokenizer.model).__name__
    elif (folder / "vocab.txt").is_file():
        tokens = list(read_bytes(folder / "vocab.txt").decode(errors="replace").splitlines())
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
        f"{count:,} weights were omitted: they are on ids that the tokenizer has no token for ({ids}), and an index "
        "keys weights by token. Scores are lower than the model's by what these weights would add."
    )


def _special_tokens(folder: Path) -> dict[str, str]:
    """Special tokens by what they are for; older files keep them apart, with details."""
    said: dict[str, Any] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        said |= {key: value for key, value in read_json(folder / name).items() if value is not None}
    named = {key: said[key] for key in SPECIAL_TOKENS if key in said}
    tokens = {key: value.get("content") if isinstance(value, dict) else value for key, value in named.items()}
    return {key: token for key, token in tokens.items() if isinstance(token, str)}
