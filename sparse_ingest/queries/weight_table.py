"""Inference-free query weights: a tokenizer and a table of weights, no model.

In: tokenizer.json, and idf.json, a JSON object from token string to weight. Out: each distinct token of the text
once, with its weight from the table. As in sentence-transformers and in OpenSearch's own analyzers, no special token
is added and nothing is truncated; a special token that is typed in the text ("[CLS]"), and the unknown token, weigh
nothing. Lower-casing is what tokenizer.json says. Not covered: which checkpoints bring such a table
(checkpoints/layouts.py), and pruning.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer

from sparse_ingest.errors import CheckpointError
from sparse_ingest.queries.protocol import QueryWeights, query_weights, to_float32

MAX_FLOAT32 = 3.4028234663852886e38


class WeightTable:
    """A `QueryEncoder` that looks every token up."""

    def __init__(
        self, tokenizer: Tokenizer, weights: dict[str, float], *, missing_weight: float, prompt: str = ""
    ) -> None:
        # A truncation or padding that is stored in tokenizer.json is meant for the model, which is not here.
        tokenizer.no_truncation()
        tokenizer.no_padding()
        special = (token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special)
        self._tokenizer = tokenizer
        self._weights = weights | dict.fromkeys(special, 0.0)
        self._missing_weight = to_float32(missing_weight)
        self._prompt = prompt

    @classmethod
    def from_files(cls, tokenizer: Path, idf: Path, *, missing_weight: float, prompt: str = "") -> WeightTable:
        """Read a table; a token that `idf` lacks weighs `missing_weight` (0.0 leaves it out of the query).

        `prompt` stands before every text.

        Raises:
            CheckpointError: a file cannot be read, or a weight is no float32 number of at least zero.
        """
        try:
            # `tokenizers` raises bare Exception for an absent or malformed file.
            built = Tokenizer.from_file(str(tokenizer))
        except Exception as error:
            raise CheckpointError(
                f"{tokenizer} cannot be read as a tokenizer: {error}. Fetch the model again."
            ) from error
        return cls(built, _read_weights(idf), missing_weight=missing_weight, prompt=prompt)

    def encode(self, texts: Sequence[str]) -> list[QueryWeights]:
        """The weights of each text's distinct tokens."""
        return [self._encode(text) for text in texts]

    def _encode(self, text: str) -> QueryWeights:
        tokens = dict.fromkeys(self._tokenizer.encode(self._prompt + text, add_special_tokens=False).tokens)
        return query_weights((token, self._weights.get(token, self._missing_weight)) for token in tokens)


def _read_weights(path: Path) -> dict[str, float]:
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read as a weight table: {error}. Fetch the model again.") from error
    if not isinstance(content, dict) or not content:
        raise CheckpointError(f"{path} must hold a JSON object from token to weight. Fetch the model again.")
    for token, weight in content.items():
        if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 <= weight <= MAX_FLOAT32:
            raise CheckpointError(
                f"{path}: the weight of {token!r} is {weight!r}; expected a float32 number of at least zero."
            )
    return content
