"""The ids of tokens, by which a sparse_vector field keys its weights.

In: the folder of a tokenizer. Out: its vocabulary by id, as encode writes it into a run.
Not covered: which folder that is (checkpoints/layouts.py).
"""

from __future__ import annotations

import json
from pathlib import Path

from sparse_ingest.checkpoints.files import read_tokenizer
from sparse_ingest.errors import CheckpointError


def read_vocabulary(folder: Path) -> list[str | None]:
    """The token of each id, None where an id has no token.

    Raises:
        CheckpointError: tokenizer.json or config.json cannot be read.
    """
    tokenizer, config = read_tokenizer(folder / "tokenizer.json"), folder / "config.json"
    size = tokenizer.get_vocab_size()
    if config.exists():
        try:
            # A model may have more rows than its tokenizer has tokens.
            size = int(json.loads(config.read_bytes())["vocab_size"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{config} does not say vocab_size ({error!r}). Fetch the model again.") from error
    return [tokenizer.id_to_token(token_id) for token_id in range(size)]
