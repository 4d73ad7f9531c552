"""The checkpoint's own tokenizer: texts to token ids, and the token string of each id.

In: texts. Out: token ids with special tokens, cut at max_length, without padding. Not covered: queries of weight
tables, which need no transformers (queries/weight_table.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from sparse_ingest.errors import CheckpointError, PipelineError, first_line
from sparse_ingest.pipeline import ModelSettings

TokenIds = npt.NDArray[np.int32]


class Tokenized(NamedTuple):
    """Token ids of each text with special tokens, cut at max_length, and which texts were cut."""

    token_ids: list[TokenIds]
    truncated: npt.NDArray[np.bool_]

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """Number of tokens of each text."""
        return np.fromiter((len(ids) for ids in self.token_ids), dtype=np.int64, count=len(self.token_ids))


class Tokenizer:
    """The checkpoint's own tokenizer, called in batches without padding."""

    # Tokenised at a time: bounds what the tokenizer returns, which includes all that it cuts off.
    CHUNK_TEXTS = 512
    CHUNK_CHARACTERS = 1 << 20

    def __init__(self, folder: Path, settings: ModelSettings) -> None:
        from transformers import AutoTokenizer

        try:
            loaded = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
            self._tokenizer: Any = loaded.backend_tokenizer
        except (OSError, ValueError, AttributeError, ImportError) as error:
            raise CheckpointError(
                f"The tokenizer in {folder} cannot be built: {first_line(error)}. Expected tokenizer.json."
            ) from error
        self.padding_id = int(loaded.pad_token_id or 0)
        self.special_ids = sorted(set(loaded.all_special_ids))
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        if settings.max_length is not None:
            special = self._tokenizer.num_special_tokens_to_add(False)
            if settings.max_length <= special:
                # Below that number the tokenizer would cut nothing at all.
                raise PipelineError(
                    f"max_length = {settings.max_length}, but every text gets {special} special tokens; "
                    f"expected at least {special + 1}."
                )
            self._tokenizer.enable_truncation(settings.max_length)
        if settings.lower_case:
            _lower_case_first(self._tokenizer)

    def __call__(self, texts: Sequence[str]) -> Tokenized:
        """Tokenise texts; the prompt is already in front of them."""
        token_ids: list[TokenIds] = []
        truncated: list[bool] = []
        for chunk in self._chunks(texts):
            for encoding in self._tokenizer.encode_batch(chunk):
                token_ids.append(np.array(encoding.ids, dtype=np.int32))
                truncated.append(bool(encoding.overflowing))
        return Tokenized(token_ids, np.array(truncated, dtype=bool))

    def _chunks(self, texts: Sequence[str]) -> Iterator[list[str]]:
        chunk: list[str] = []
        characters = 0
        for text in texts:
            if chunk and (len(chunk) == self.CHUNK_TEXTS or characters + len(text) > self.CHUNK_CHARACTERS):
                yield chunk
                chunk, characters = [], 0
            chunk.append(text)
            characters += len(text)
        if chunk:
            yield chunk

    def vocabulary(self, size: int) -> list[str | None]:
        """The token string of each id below `size`; None where an id has none.

        Raises:
            CheckpointError: two ids have the same string, so an index could not tell them apart.
        """
        tokens: list[str | None] = [self._tokenizer.id_to_token(token_id) for token_id in range(size)]
        first: dict[str, int] = {}
        for token_id, token in enumerate(tokens):
            if token is not None and first.setdefault(token, token_id) != token_id:
                raise CheckpointError(
                    f"The vocabulary gives the token {token!r} to two ids, {first[token]} and {token_id}; "
                    "an index keys weights by token, so each id needs a string of its own. Mend tokenizer.json."
                )
        return tokens


def _lower_case_first(tokenizer: Any) -> None:
    """Lower-case before everything else, as sentence-transformers does for `do_lower_case`."""
    from tokenizers import normalizers

    steps = [normalizers.Lowercase()]
    if tokenizer.normalizer is not None:
        steps.append(tokenizer.normalizer)
    tokenizer.normalizer = normalizers.Sequence(steps)
