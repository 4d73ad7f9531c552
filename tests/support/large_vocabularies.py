"""Runs whose token ids reach 32,768 and more, with a model that has a weight table for them."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from sparse_ingest.runs.run import Run
from support.runs import make_run
from support.tables import TOKENS, write_table

SIZE = 40_000
VOCABULARY = [*TOKENS, *(f"w{number}" for number in range(len(TOKENS), SIZE))]
USED = [*range(5, 10), *range(500, SIZE, 499)]  # ids; about a fifth are above 32,767
WEIGHTS = {VOCABULARY[token_id]: 0.5 + token_id % 13 / 8 for token_id in range(5, SIZE)}


def write_large_table(folder: Path) -> str:
    return str(write_table(folder, VOCABULARY, WEIGHTS))


def random_documents(count: int, used: list[int], seed: int = 1) -> dict[str, dict[str, float]]:
    random = np.random.default_rng(seed)
    return {
        f"d{number}": {
            VOCABULARY[token_id]: float(random.gamma(2.0, 0.4) + 0.01)
            for token_id in sorted(random.choice(used, 12, replace=False).tolist())
        }
        for number in range(count)
    }


def make_large_run(folder: Path, documents: dict[str, dict[str, float]], model: str = "made-by-hand") -> Run:
    return make_run(folder, documents, shard_rows=20, vocabulary=VOCABULARY, model=model)


def ids_of(documents: dict[str, dict[str, float]]) -> list[int]:
    """Return the ids of the tokens that occur, in ascending order."""
    place = {token: token_id for token_id, token in enumerate(VOCABULARY)}
    return sorted({place[token] for terms in documents.values() for token in terms})
