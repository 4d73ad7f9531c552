"""Query text to query weights without torch: a tokenizer and a table of weights, no model.

In: tokenizer.json, and a table: idf.json (token string to weight), query_token_weights.txt (the same as lines), or
the tensor `weight` by token id of a safetensors file. Out: each distinct token of the text once, with its weight from
the table. As in sentence-transformers and in OpenSearch's own analyzers no special token is added. Special tokens that
are typed in the text ("[CLS]") and the unknown token have the table's weight or zero, as the settings of the
checkpoint say (checkpoints/layouts.py).

Weights are keyed by token string and not by id, because a request to OpenSearch names features by string, and because
a query side may number its tokens differently from the document side. `read_vocabulary` gives the ids, by which a
sparse_vector field keys its weights.

Not covered: which checkpoints bring such a table, and pickled tables (models/masked_lms.py).
"""

from __future__ import annotations

import logging
import struct
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, normalizers

from sparse_ingest.checkpoints.checks import read_config, read_tokenizer, tokenizer_config, tokenizer_errors
from sparse_ingest.checkpoints.layouts import WeightTableSide
from sparse_ingest.checkpoints.modules import read_as
from sparse_ingest.checkpoints.tensors import read_header
from sparse_ingest.errors import CheckpointError
from sparse_ingest.pipeline import ModelSettings, QuerySettings
from sparse_ingest.storage.foreign_json import read_bytes, shown

BERT_CLASSES = ("BertTokenizer", "DistilBertTokenizer", "ElectraTokenizer")
MAX_FLOAT32 = 3.4028234663852886e38
MAX_TABLE_BYTES = 12 << 20  # a table of 250,000 tokens takes 7 MB
logger = logging.getLogger(__name__)

# Token string to weight above zero, each a float32 value; heaviest first, equal weights by token string.
QueryWeights = dict[str, float]

_FLOAT32 = struct.Struct("<f")
# Type of a tensor to its name in `struct`; bfloat16 is the upper half of a float32.
_TENSOR_FORMATS = {"F64": "d", "F32": "f", "F16": "e", "BF16": "H"}


def as_query_weights(weights: Iterable[tuple[str, float]]) -> QueryWeights:
    """Return weights in the form of `QueryWeights`: float32 values above zero, heaviest first."""
    rounded = ((token, to_float32(weight)) for token, weight in weights)
    return dict(sorted((pair for pair in rounded if pair[1] > 0), key=lambda pair: (-pair[1], pair[0])))


def prune_query(weights: QueryWeights, settings: QuerySettings) -> QueryWeights:
    """Keep the `top_k` heaviest tokens whose weight is at least `max_ratio` times the largest one.

    Of equal weights the first token string stays: a query has no token ids, by which documents break ties.
    """
    ordered = sorted(weights.items(), key=lambda pair: (-pair[1], pair[0]))[: settings.top_k]
    if not ordered or settings.max_ratio is None:
        return dict(ordered)
    # In float32, as pruning.py does it for documents.
    least = to_float32(to_float32(settings.max_ratio) * ordered[0][1])
    return {token: weight for token, weight in ordered if weight >= least}


def to_float32(value: float) -> float:
    """The float32 nearest to a value: what the server makes of a number in JSON."""
    return float(_FLOAT32.unpack(_FLOAT32.pack(value))[0])


class WeightTable:
    """Turns query texts into weights by looking every token up in the table of a checkpoint.

    `settings` must be resolved (checkpoints/settings.py): prompt, special tokens, lower-casing, the weight of a token
    that the table lacks and, unless None, the number of tokens that a text is cut at. `max_active_dims` is how many
    tokens of a query the checkpoint's library keeps. `by_id` are weights that were read already, from a pickle.

    Raises:
        CheckpointError: a file cannot be read, or a weight is no float32 number.
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
        """The weights of each text's distinct tokens; a text without a weighted token gives an empty dict."""
        return [self._encode(text) for text in texts]

    def table(self) -> dict[str, float]:
        """The weight of every token that has one, as float32, in the order of token ids.

        A text's weights are those of its distinct tokens here; special tokens and the weight of missing ones are done.
        """
        by_id = sorted(self._tokenizer.get_vocab().items(), key=lambda pair: pair[1])
        weights = ((token, to_float32(self._weights.get(token, self._missing_weight))) for token, _ in by_id)
        return {token: weight for token, weight in weights if weight > 0}

    @property
    def vocabulary(self) -> list[str | None]:
        """The token string of each id of its tokenizer, None where an id has no token."""
        return [self._tokenizer.id_to_token(token_id) for token_id in range(self._tokenizer.get_vocab_size())]

    def reading(self) -> str:
        """How a text is read before its tokens are looked up, for who does so in another language."""
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
    """The tokenizer of a folder as queries of a table are read: nothing is cut and nothing padded.

    Raises:
        CheckpointError: tokenizer.json cannot be read.
    """
    path = folder / "tokenizer.json"
    tokenizer = read_tokenizer(path)
    with tokenizer_errors(path):
        _normalise_as_configured(tokenizer, tokenizer_config(folder))
        make_plain(tokenizer, lower_case=lower_case)
    return tokenizer


def make_plain(tokenizer: Tokenizer, *, lower_case: bool) -> None:
    """Switch truncation and padding of a tokenizer off; `lower_case`: lower-case before everything else.

    Both may be stored in tokenizer.json. Lower-casing first is what sentence-transformers does for `do_lower_case`.
    """
    tokenizer.no_truncation()
    tokenizer.no_padding()
    if lower_case:
        steps = [normalizers.Lowercase(), *([tokenizer.normalizer] if tokenizer.normalizer else [])]
        tokenizer.normalizer = normalizers.Sequence(steps)


def _normalise_as_configured(tokenizer: Tokenizer, config: dict[str, Any]) -> None:
    """Let tokenizer_config.json go over tokenizer.json where transformers does: in the classes of BERT's kin."""
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
        raise CheckpointError(f"{path} cannot be read as a weight table: {error}. Fetch the model again.") from error
    if not content:
        raise CheckpointError(f"{path} has no weight; expected a weight for each token. Fetch the model again.")
    for token, weight in content.items():
        if not 0 <= weight <= MAX_FLOAT32:
            raise CheckpointError(
                f"{path}: the weight of {shown(token)} is {weight}; expected a float32 number of at least zero."
            )
    return content


def _by_token(weights: list[float], tokenizer: Tokenizer, path: Path) -> dict[str, float]:
    """A trained table, which is by token id and may go below zero."""
    if wrong := [place for place, weight in enumerate(weights) if not abs(weight) <= MAX_FLOAT32]:
        raise CheckpointError(
            f"{path}: {len(wrong):,} of {len(weights):,} numbers of its tensor 'weight' are not finite in float32, the "
            f"first at {wrong[0]:,}: {weights[wrong[0]]}. Fetch the model again."
        )
    if below := sum(weight < 0 for weight in weights):
        logger.warning("%s: %d tokens weigh less than zero; no index can be asked for them, so they are left out of "
                       "queries.", path, below)  # fmt: skip
    by_id = ((tokenizer.id_to_token(token_id), weight) for token_id, weight in enumerate(weights))
    return {token: weight for token, weight in by_id if token is not None}


def read_vector(path: Path, name: str) -> list[float]:
    """Return the vector `name` of a safetensors file, without numpy, torch or the safetensors library.

    Raises:
        CheckpointError: the file is damaged, or has no such vector of floating-point numbers.
    """
    numbers_begin, tensors = read_header(path)
    try:
        entry = tensors[name]
        form, (start, end) = _TENSOR_FORMATS[entry.dtype], entry.data_offsets
        [count] = entry.shape
        with path.open("rb") as file:
            file.seek(numbers_begin + start)
            numbers = struct.unpack(f"<{count}{form}", file.read(end - start))
    except (OSError, ValueError, KeyError, TypeError, struct.error) as error:
        raise CheckpointError(
            f"{path} must hold the vector {name!r} as safetensors ({type(error).__name__}: {error}). "
            "Fetch the model again."
        ) from error
    if form == "H":
        numbers = struct.unpack(f"<{count}f", b"".join(struct.pack("<HH", 0, upper) for upper in numbers))
    return [float(number) for number in numbers]


def read_vocabulary(folder: Path) -> list[str | None]:
    """Return the token string of each id, None where an id has no token, as `encode` writes them into a run.

    Raises:
        CheckpointError: tokenizer.json or config.json cannot be read.
    """
    tokenizer = read_tokenizer(folder / "tokenizer.json")
    # A model may have more rows than its tokenizer has tokens.
    size = read_config(folder).get("vocab_size") if (folder / "config.json").exists() else tokenizer.get_vocab_size()
    if size is None:
        raise CheckpointError(f"{folder / 'config.json'} does not say vocab_size. Fetch the model again.")
    return [tokenizer.id_to_token(token_id) for token_id in range(size)]
