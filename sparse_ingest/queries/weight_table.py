"""Query text to query weights with a tokenizer and a table of weights, without a model or torch.

In: tokenizer.json and idf.json, query_token_weights.txt, or a safetensors file with the tensor `weight`. Out: each
distinct token of a text with its weight. As in sentence-transformers and OpenSearch's analyzers, no special tokens are
added. Weights are keyed by token string: a query side may have other ids than the document side.
"""

from __future__ import annotations

import logging
import struct
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, normalizers

from sparse_ingest.checkpoints.checks import read_config, read_tokenizer, tokenizer_config, tokenizer_errors
from sparse_ingest.checkpoints.modules import damaged, read_as
from sparse_ingest.checkpoints.sides import AutoencoderSide, ModelSide, WeightTableSide
from sparse_ingest.checkpoints.tensors import read_header
from sparse_ingest.errors import CheckpointError, short_repr
from sparse_ingest.pipeline import ModelSettings, QuerySettings
from sparse_ingest.storage.foreign_json import read_bytes

BERT_CLASSES = ("BertTokenizer", "DistilBertTokenizer", "ElectraTokenizer")
MAX_FLOAT32 = 3.4028234663852886e38
MAX_TABLE_BYTES = 12 << 20  # a table of 250,000 tokens takes 7 MB
logger = logging.getLogger(__name__)

# Token string to weight above zero, a float32 value; heaviest first, equal weights by token string.
QueryWeights = dict[str, float]

_FLOAT32 = struct.Struct("<f")
# Codes of the module `struct`; bfloat16 is the upper half of a float32.
_TENSOR_FORMATS = {"F64": "d", "F32": "f", "F16": "e", "BF16": "H"}


def as_query_weights(weights: Iterable[tuple[str, float]]) -> QueryWeights:
    """Return weights in the form of `QueryWeights`: float32 values above zero, heaviest first."""
    rounded = ((token, to_float32(weight)) for token, weight in weights)
    return dict(sorted((pair for pair in rounded if pair[1] > 0), key=lambda pair: (-pair[1], pair[0])))


def prune_query(weights: QueryWeights, settings: QuerySettings) -> QueryWeights:
    """Keep the `top_k` heaviest tokens whose weight is at least `max_ratio` times the largest one.

    Ties are broken by token string, because a query has no token ids as documents do.
    """
    ordered = sorted(weights.items(), key=lambda pair: (-pair[1], pair[0]))[: settings.top_k]
    if not ordered or settings.max_ratio is None:
        return dict(ordered)
    # In float32, as pruning.py does it for documents.
    least = to_float32(to_float32(settings.max_ratio) * ordered[0][1])
    return {token: weight for token, weight in ordered if weight >= least}


def to_float32(value: float) -> float:
    """Return the nearest float32, to which the server rounds numbers in JSON."""
    return float(_FLOAT32.unpack(_FLOAT32.pack(value))[0])


class WeightTable:
    """Looks up the weight of every token of a query in the table of a checkpoint.

    `settings` must be resolved (checkpoints/settings.py). `max_active_dims` is the number of tokens of a query that the
    checkpoint's library keeps. `by_id` are weights from a pickle.

    Raises:
        CheckpointError: a file cannot be read, or a weight is not a float32 number.
    """

    def __init__(
        self,
        side: WeightTableSide,
        settings: ModelSettings,
        *,
        max_active_dims: int | None = None,
        by_id: list[float] | None = None,
    ) -> None:
        tokenizer = plain_tokenizer(side.folder, lower_case=bool(settings.lower_case))
        if by_id is None and side.weights.suffix == ".safetensors":
            by_id = read_vector(side.weights, "weight")
        weights = _read_weights(side.weights) if by_id is None else _by_token(by_id, tokenizer, side.weights)
        if settings.max_length is not None:
            tokenizer.enable_truncation(settings.max_length)
        if settings.query_special_tokens == "zero":
            special = (token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special)
            weights = weights | dict.fromkeys(special, 0.0)
        self._folder = side.folder
        self._tokenizer = tokenizer
        self._weights = weights
        self._missing_weight = to_float32(settings.missing_idf_weight or 0.0)
        self._prompt = settings.query_prompt or ""
        self._lower_case = bool(settings.lower_case)
        self._max_active_dims = max_active_dims

    def encode(self, texts: Sequence[str]) -> list[QueryWeights]:
        """Return the weights of the distinct tokens of each text; a text without any gives an empty dict."""
        return [self._encode(text) for text in texts]

    def table(self) -> dict[str, float]:
        """Return the weight of every token that `encode` can give, as float32, in the order of token ids."""
        by_id = sorted(self._tokenizer.get_vocab().items(), key=lambda pair: pair[1])
        weights = ((token, to_float32(self._weights.get(token, self._missing_weight))) for token, _ in by_id)
        return {token: weight for token, weight in weights if weight > 0}

    @property
    def vocabulary(self) -> list[str | None]:
        """The token string of each id of its tokenizer; None for an id without a token."""
        return [self._tokenizer.id_to_token(token_id) for token_id in range(self._tokenizer.get_vocab_size())]

    def reading(self) -> str:
        """Return how a text is prepared before the lookup, for implementations in another language."""
        limit = self._tokenizer.truncation
        rules = [
            f"the prompt {self._prompt!r} before it" if self._prompt else "",
            "lower-cased" if self._lower_case else "",
            f"cut after {limit['max_length']} tokens" if limit else "nothing cut",
            "no special tokens added",
            f"only the {self._max_active_dims} heaviest tokens kept" if self._max_active_dims else "",
        ]
        return ", ".join(rule for rule in rules if rule)

    def _encode(self, text: str) -> QueryWeights:
        with tokenizer_errors(self._folder):
            tokens = dict.fromkeys(self._tokenizer.encode(self._prompt + text, add_special_tokens=False).tokens)
        weights = as_query_weights((token, self._weights.get(token, self._missing_weight)) for token in tokens)
        return dict(list(weights.items())[: self._max_active_dims])


def plain_tokenizer(folder: Path, *, lower_case: bool) -> Tokenizer:
    """Return the tokenizer of a folder for queries of a table, without truncation and padding."""
    path = folder / "tokenizer.json"
    tokenizer = read_tokenizer(path)
    with tokenizer_errors(path):
        _apply_config(tokenizer, tokenizer_config(folder))
        make_plain(tokenizer, lower_case=lower_case)
    return tokenizer


def make_plain(tokenizer: Tokenizer, *, lower_case: bool) -> None:
    """Disable truncation and padding of a tokenizer. `lower_case`: lower-case first, as `do_lower_case` means."""
    tokenizer.no_truncation()
    tokenizer.no_padding()
    if lower_case:
        steps = [normalizers.Lowercase(), *([tokenizer.normalizer] if tokenizer.normalizer else [])]
        tokenizer.normalizer = normalizers.Sequence(steps)


def _apply_config(tokenizer: Tokenizer, config: dict[str, Any]) -> None:
    """Override the normalizer of tokenizer.json by tokenizer_config.json for BERT's classes, as transformers does."""
    normalizer = tokenizer.normalizer
    kind = str(config.get("tokenizer_class")).removesuffix("Fast")
    if kind not in BERT_CLASSES or not isinstance(normalizer, normalizers.BertNormalizer):
        return
    names = {
        "do_lower_case": "lowercase",
        "strip_accents": "strip_accents",
        "tokenize_chinese_chars": "handle_chinese_chars",
    }
    changed = {ours: config[theirs] for theirs, ours in names.items() if theirs in config}
    kept = {name: getattr(normalizer, name) for name in ("clean_text", *names.values())}
    tokenizer.normalizer = normalizers.BertNormalizer(**{**kept, **changed})


def _read_weights(path: Path) -> dict[str, float]:
    try:
        if path.suffix == ".txt":
            lines = (line.rpartition("\t") for line in read_bytes(path, MAX_TABLE_BYTES).decode().split("\n") if line)
            content = {token: float(weight) for token, _, weight in lines}
        else:
            content = read_as(path, dict[str, float], MAX_TABLE_BYTES)
    except (OSError, ValueError) as error:
        raise damaged(f"{path} cannot be read as a weight table: {error}") from error
    if not content:
        raise damaged(f"{path} has no weight; expected a weight for each token")
    for token, weight in content.items():
        if not 0 <= weight <= MAX_FLOAT32:
            raise CheckpointError(
                f"{path}: the weight of {short_repr(token)} is {weight}; expected a float32 number of at least zero."
            )
    return content


def _by_token(weights: list[float], tokenizer: Tokenizer, path: Path) -> dict[str, float]:
    """Return a trained table, which has weights by token id and may have some below zero."""
    if wrong := [place for place, weight in enumerate(weights) if not abs(weight) <= MAX_FLOAT32]:
        raise damaged(
            f"{path}: {len(wrong):,} of {len(weights):,} numbers of its tensor 'weight' are not finite in float32, the "
            f"first at {wrong[0]:,}: {weights[wrong[0]]}"
        )
    if below := sum(weight < 0 for weight in weights):
        logger.warning("%s: %d tokens have a weight below zero and are omitted from queries.", path, below)
    by_id = ((tokenizer.id_to_token(token_id), weight) for token_id, weight in enumerate(weights))
    return {token: weight for token, weight in by_id if token is not None}


def read_vector(path: Path, name: str) -> list[float]:
    """Return the vector `name` of a safetensors file without numpy and torch. Raise CheckpointError."""
    numbers_begin, tensors = read_header(path)
    try:
        entry = tensors[name]
        form, (start, end) = _TENSOR_FORMATS[entry.dtype], entry.data_offsets
        [count] = entry.shape
        with path.open("rb") as file:
            file.seek(numbers_begin + start)
            numbers = struct.unpack(f"<{count}{form}", file.read(end - start))
    except (OSError, ValueError, KeyError, TypeError, struct.error) as error:
        raise damaged(f"{path} has no vector {name!r} ({type(error).__name__}: {error})") from error
    if form == "H":
        numbers = struct.unpack(f"<{count}f", b"".join(struct.pack("<HH", 0, upper) for upper in numbers))
    return [float(number) for number in numbers]


def vocabulary_of(side: ModelSide | WeightTableSide) -> list[str | None]:
    """Return the string of each column of the vectors of a side: of features their numbers, otherwise tokens."""
    return [*map(str, range(side.features))] if isinstance(side, AutoencoderSide) else read_vocabulary(side.folder)


def read_vocabulary(folder: Path) -> list[str | None]:
    """Return the token string of each id as in a run; None for an id without a token. Raise CheckpointError."""
    tokenizer = read_tokenizer(folder / "tokenizer.json")
    # A model may have more ids than its tokenizer.
    size = read_config(folder).get("vocab_size") if (folder / "config.json").exists() else tokenizer.get_vocab_size()
    if size is None:
        raise damaged(f"{folder / 'config.json'} has no vocab_size")
    return [tokenizer.id_to_token(token_id) for token_id in range(size)]
