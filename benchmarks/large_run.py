"""Write a run folder of random vectors of any size, as input for the load benchmarks.

    python benchmarks/large_run.py RUN [--documents 1000000] [--terms 120]

Tokens are drawn without repetition within a document, with Zipf frequencies; weights are distributed as in a
SPLADE model and stored as float16; each document has a title of eight words. The same arguments give the same run.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path

import numpy as np
import numpy.typing as npt

from sparse_ingest.records import SparseRows
from sparse_ingest.runs.manifest import FORMAT, Manifest, identity_of
from sparse_ingest.runs.run import Run, create_or_open_run
from sparse_ingest.runs.shards import PART_ROWS, ShardPart, shard_schema, store_weights, text_hash, write_parts

TOKENS = 30522
SHARD_ROWS = 65536
_SYLLABLES = (
    "a ba ber co con de di en er es fi ga ha i in ing ka la le li lo ma men mi mo na ne ni no o pa per po pre ra re ri "
    "ro sa se si so sta ta te ter ti tion to tra tu u un ver vi".split()
)


def main() -> None:
    """Write one run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--documents", type=int, default=1_000_000)
    parser.add_argument("--terms", type=int, default=120)
    given = parser.parse_args()
    run = make_large_run(given.run, given.documents, given.terms)
    print(f"{run.path}: {given.documents} documents of {given.terms} terms")


def make_large_run(folder: Path, documents: int, terms: int) -> Run:
    """Write a complete run, unless it exists."""
    run_id, identity = identity_of({"made_up": True, "documents": documents, "terms": terms, "shard_rows": SHARD_ROWS})
    model = {"document": "made-up", "sha256": sha256(b"made-up").hexdigest()}
    vocabulary = random_vocabulary()
    run = create_or_open_run(folder, Manifest(FORMAT, run_id, identity, SHARD_ROWS, model, {}), vocabulary)
    if run.complete():
        return run
    schema = shard_schema(len(vocabulary), "float16")
    shards = range(0, documents, SHARD_ROWS)
    for shard, first in enumerate(shards):
        rows = min(SHARD_ROWS, documents - first)
        parts = _parts(np.random.default_rng(first), vocabulary, first, rows, terms)
        scratch = run.scratch_path(f"{shard}.parquet")
        digest = write_parts(parts, scratch=scratch, schema=schema)
        run.add_shard(shard, scratch, digest)
        run.mark_done(shard, {"first_row": first, "rows": rows, "nnz": rows * terms, "empty": 0, "sha256": digest})
    run.mark_complete(
        {"shards": len(shards), "rows": documents, "terms": documents * terms, "duplicates_checked": True}
    )
    return run


def random_vocabulary() -> list[str]:
    """Return 30,522 unique strings that look like word pieces, a fifth of them continuations (##ing)."""
    rng = np.random.default_rng(0)
    words: dict[str, None] = {}
    while len(words) < TOKENS:
        chosen = rng.choice(_SYLLABLES, size=int(rng.integers(2, 5)))
        words.setdefault(("##" if rng.random() < 0.2 else "") + "".join(chosen))
    return list(words)


def _parts(rng: np.random.Generator, vocabulary: list[str], first: int, rows: int, terms: int) -> Iterator[ShardPart]:
    frequencies = 1 / (np.arange(len(vocabulary)) + 50) ** 0.9
    borders = np.cumsum(frequencies / frequencies.sum())
    for start in range(first, first + rows, PART_ROWS):
        count = min(PART_ROWS, first + rows - start)
        ids = [f"document-{row}" for row in range(start, start + count)]
        token_ids = _different(rng, borders, count, terms)
        weights = np.exp(rng.normal(-1.2, 0.9, size=count * terms)).clip(0.001, 3.5).astype(np.float32)
        indptr = np.arange(count + 1, dtype=np.int64) * terms
        vectors = store_weights(SparseRows(ids, indptr, token_ids.ravel(), weights), "float16")
        words = rng.integers(0, len(vocabulary), size=(count, 8)).tolist()
        fields = [json.dumps({"title": " ".join(vocabulary[word] for word in title)}) for title in words]
        yield ShardPart(np.arange(start, start + count, dtype=np.uint64), list(map(text_hash, ids)), vectors, fields)


def _different(
    rng: np.random.Generator, borders: npt.NDArray[np.float64], rows: int, terms: int
) -> npt.NDArray[np.uint16]:
    """Return ascending token ids, `terms` different ones in each row."""
    drawn = np.sort(np.searchsorted(borders, rng.random((rows, 3 * terms)) * borders[-1]), axis=1)
    lots = rng.random(drawn.shape)
    lots[:, 1:][drawn[:, 1:] == drawn[:, :-1]] = 2  # a token is never chosen twice
    if (np.partition(lots, terms - 1, axis=1)[:, terms - 1] == 2).any():
        raise SystemExit(f"{terms} different tokens per document are too many to sample: pass a smaller --terms.")
    chosen = np.argpartition(lots, terms - 1, axis=1)[:, :terms]
    return np.sort(np.take_along_axis(drawn, chosen, axis=1), axis=1).astype(np.uint16)


if __name__ == "__main__":
    main()
