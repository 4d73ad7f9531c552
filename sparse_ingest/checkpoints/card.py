"""The model card, the tokenizer and the safetensors headers of a model folder, read without loading the model.

In: a folder. Out: license, languages, number of parameters, vocabulary. Not covered: settings (settings.py), pickles
(models/masked_lms.py).
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

from tokenizers import Tokenizer

from sparse_ingest.checkpoints.hub import CARD, PICKLES
from sparse_ingest.checkpoints.modules import read_json
from sparse_ingest.errors import CheckpointError

SPECIAL_TOKENS = ("cls_token", "sep_token", "bos_token", "eos_token", "unk_token", "pad_token", "mask_token")
SHOWN_RANGES = 8
MAX_HEADER_BYTES = 100_000_000  # as the safetensors library has it


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
        said = (metadata_load(path) if path.is_file() else None) or {}
    except Exception:  # errors of YAML, of the encoding, of what people write between the dashes
        said = {}
    license = said.get("license")
    if license == "other":
        license = said.get("license_name") or license
    language = said.get("language") or []
    languages = [language] if isinstance(language, str) else list(language)
    return Card(None if license is None else str(license), [str(one) for one in languages])


def count_parameters(folder: Path) -> int | None:
    """The numbers in a folder's safetensors, from their headers; None where there are none.

    Raises:
        CheckpointError: a file is no safetensors, or shorter than its header says.
    """
    index = read_json(folder / "model.safetensors.index.json").get("weight_map")
    names = sorted(set(index.values())) if isinstance(index, dict) else []
    files = [folder / str(name) for name in names] or sorted(folder.glob("*.safetensors"))
    if not files or not all(file.is_file() for file in files):
        return None
    return sum(int(math.prod(tensor["shape"])) for file in files for tensor in read_header(file)[1].values())


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
        tokens = list((folder / "vocab.txt").read_text(encoding="utf-8").splitlines())
        model = "WordPiece"
    else:
        return None
    counted = Counter(token for token in tokens if token is not None)
    shared = [token for token, times in counted.items() if times > 1]
    return Vocabulary(model, tokens, shared, _special_tokens(folder))


def ranges_without_token(tokens: Sequence[str | None], size: int) -> list[tuple[int, int]]:
    """Return the first and last id of each range of ids below `size` that have no token."""
    ids = [token_id for token_id in range(size) if token_id >= len(tokens) or tokens[token_id] is None]
    ends = (list(group) for _, group in groupby(enumerate(ids), key=lambda pair: pair[1] - pair[0]))
    return [(range_[0][1], range_[-1][1]) for range_ in ends]


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


def read_tokenizer(path: Path) -> Tokenizer:
    """Read a tokenizer.json.

    Raises:
        CheckpointError: the file is absent or malformed.
    """
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # `tokenizers` raises bare Exception for either
        raise CheckpointError(f"{path} cannot be read as a tokenizer: {error}. Fetch the model again.") from error


def read_header(path: Path) -> tuple[int, dict[str, dict[str, Any]]]:
    """Return the byte at which the numbers of a safetensors file begin, and its entry for each tensor.

    The file begins with eight bytes of length; the header, which is JSON, follows.

    Raises:
        CheckpointError: the file has no such header, or is shorter than its header says.
    """
    try:
        with path.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(length) if length <= MAX_HEADER_BYTES else b"")
        tensors = {name: tensor for name, tensor in header.items() if name != "__metadata__"}
        end = 8 + length + max((tensor["data_offsets"][1] for tensor in tensors.values()), default=0)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise CheckpointError(
            f"{path} is no safetensors file: its header cannot be read. Fetch the model again."
        ) from error
    if (size := path.stat().st_size) < end:
        raise CheckpointError(
            f"{path} has {size:,} bytes; a safetensors file with its header takes {end:,}. Fetch the model again."
        )
    return 8 + length, tensors


def _special_tokens(folder: Path) -> dict[str, str]:
    """Special tokens by what they are for; older files keep them apart, with details."""
    said: dict[str, Any] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        said |= {key: value for key, value in read_json(folder / name).items() if value is not None}
    named = {key: said[key] for key in SPECIAL_TOKENS if key in said}
    tokens = {key: value.get("content") if isinstance(value, dict) else value for key, value in named.items()}
    return {key: token for key, token in tokens.items() if isinstance(token, str)}
