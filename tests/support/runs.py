"""Complete run folders written from given documents, without a model.

`make_run` writes what `encode` would write, so that loading, verifying and exact search are tested without torch.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from hashlib import sha256
from pathlib import Path

import numpy as np
import pyarrow as pa

from sparse_ingest.records import SparseRows
from sparse_ingest.runs.manifest import FORMAT, Manifest, identity_of
from sparse_ingest.runs.run import Run, create_or_open_run
from sparse_ingest.runs.shards import (
    PART_ROWS,
    ShardPart,
    WeightType,
    shard_schema,
    store_weights,
    text_hash,
    write_parts,
)

# Tokens found in real vocabularies that are difficult for JSON or field names.
NASTY_TOKENS = (
    "", " ", ".", "..", "...", "a.b", ".a", "b.", "##ing", "!", '"', "\\", "\\n", "\n", "\t", "\x7f", "/", "*", "?",
    "_id", "_source", "null", "true", "1", "[CLS]", "Ġthe", "▁de", "\u00e9", "e\u0301", "日本", "😀", "\u2028",
    "<s>", "'", "$ne",
)  # fmt: skip
WORDS = tuple("sparse vector search index token weight shard run river stone cloud lamp".split())
# Ids without a token are null in vocab.json; no document has a weight there.
VOCABULARY: tuple[str | None, ...] = (*NASTY_TOKENS, None, *WORDS, None)

# One document with each nasty token, one without tokens, and weights that need more than 9 bits.
DOCUMENTS: dict[str, dict[str, float]] = {
    "nasty": {token: 0.1 + 0.37 * place for place, token in enumerate(NASTY_TOKENS)},
    "empty": {},
    "words": {token: 1 / (place + 1) for place, token in enumerate(WORDS)},
    'id "with" \\ é': {"river": 1.2345, "stone": 0.0625, "##ing": 2.7182},
    "small": {"lamp": 6.1e-05, "cloud": 0.3},
}


def write_shard(parts: Iterable[ShardPart], *, scratch: Path, target: Path, schema: pa.Schema) -> str:
    """Write a shard, replacing the one at `target`, and return its SHA-256."""
    digest = write_parts(parts, scratch=scratch, schema=schema)
    scratch.replace(target)
    return digest


def make_run(
    folder: Path,
    documents: Mapping[str, Mapping[str, float]] = DOCUMENTS,
    *,
    shard_rows: int = 3,
    weights: WeightType = "float16",
    fields: Mapping[str, Mapping[str, object]] | None = None,
    vocabulary: Sequence[str | None] = VOCABULARY,
    model: str = "made-by-hand",
    complete: bool = True,
    **identity_too: str,
) -> Run:
    """Write a run of `documents` (id to token to weight).

    Tokens missing from `vocabulary` are added. `fields` are the fields of documents, by default a title and a text.
    `identity_too` adds keys to the identity of the run.
    """
    known = list(dict.fromkeys(token for terms in documents.values() for token in terms))
    given = set(vocabulary)
    tokens: list[str | None] = [*vocabulary, *(token for token in known if token not in given)]
    ids = list(documents)
    run_id, identity = identity_of(
        {
            "model": model,
            "weights": weights,
            "shard_rows": shard_rows,
            "documents": {doc_id: dict(terms) for doc_id, terms in documents.items()},
            **identity_too,
        }
    )
    manifest = Manifest(
        FORMAT, run_id, identity, shard_rows, {"document": model, "sha256": sha256(model.encode()).hexdigest()}, {}
    )
    run = create_or_open_run(folder, manifest, tokens)
    schema = shard_schema(len(tokens), weights)
    position = {token: number for number, token in enumerate(tokens) if token is not None}
    for shard, first in enumerate(range(0, len(ids), shard_rows)):
        chosen = ids[first : first + shard_rows]
        parts = list(_parts(chosen, first, documents, position, weights, fields))
        digest = write_shard(
            parts, scratch=run.scratch_path(f"{shard}.parquet"), target=run.shard_path(shard), schema=schema
        )
        terms = sum(len(part.vectors.weights) for part in parts)
        empty = sum(int(np.count_nonzero(np.diff(part.vectors.indptr) == 0)) for part in parts)
        run.mark_done(shard, {"first_row": first, "rows": len(chosen), "nnz": terms, "empty": empty, "sha256": digest})
    if complete:
        records = [run.done(shard) or {} for shard in run.done_shards()]
        run.mark_complete(
            {
                "shards": len(records),
                "rows": len(ids),
                "terms": sum(record["nnz"] for record in records),
                "duplicates_checked": True,
            }
        )
    return run


def without_hashes(run: Run) -> None:
    """Rewrite a run as earlier releases wrote it: without ids and without hashes of vocab.json and of all shards."""
    files = [run.path / "manifest.json", run.path / "complete.json", *(run.path / "done").glob("*")]
    for path in (path for path in files if path.exists()):
        record = json.loads(path.read_text())
        kept = {key: value for key, value in record.items() if key not in ("vocabulary_sha256", "shards_sha256")}
        if path.parent.name == "done":
            del kept["run_id"]
        path.write_text(json.dumps(kept))


def _parts(
    chosen: Sequence[str],
    first: int,
    documents: Mapping[str, Mapping[str, float]],
    position: Mapping[str, int],
    weights: WeightType,
    fields: Mapping[str, Mapping[str, object]] | None,
) -> Iterator[ShardPart]:
    for start in range(0, len(chosen), PART_ROWS):
        some = chosen[start : start + PART_ROWS]
        pairs = [sorted((position[token], weight) for token, weight in documents[doc_id].items()) for doc_id in some]
        vectors = SparseRows(
            some,
            np.cumsum([0, *map(len, pairs)], dtype=np.int64),
            np.array([token_id for row in pairs for token_id, _ in row], dtype=np.uint32),
            np.array([weight for row in pairs for _, weight in row], dtype=np.float32),
        )
        stored = store_weights(vectors, weights)
        carried = [
            dict(fields[doc_id]) if fields else {"title": f"Title of {doc_id}", "text": f"Text of {doc_id}."}
            for doc_id in some
        ]
        yield ShardPart(
            np.arange(first + start, first + start + len(some), dtype=np.uint64),
            [text_hash(doc_id) for doc_id in some],
            stored,
            [json.dumps(row, ensure_ascii=False) for row in carried],
        )
