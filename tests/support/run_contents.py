"""Helpers for tests of `encode`: write corpora and read run folders."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

from sparse_ingest.runs.run import Run
from sparse_ingest.runs.shards import read_shard

VOLATILE = {"versions", "device", "host", "seconds", "batch_tokens"}
ROWS: list[dict[str, Any]] = [
    {"_id": f"d{place}", "text": f"the river stone {place} " * (place % 5), "year": place} for place in range(20)
]


def write(path: Path, rows: list) -> Path:
    content = "".join((row if isinstance(row, str) else json.dumps(row, ensure_ascii=False)) + "\n" for row in rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(content.encode(), mtime=0) if path.suffix == ".gz" else content.encode())
    return path


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def documents(run: Run) -> dict[str, tuple[int, dict, dict[int, float]]]:
    """Return id to source row, fields and terms."""
    found = {}
    for shard in run.done_shards():
        for part in read_shard(run.shard_path(shard)):
            for place, doc_id in enumerate(part.vectors.doc_ids):
                terms = dict(zip(*(array.tolist() for array in part.vectors.row(place)), strict=True))
                found[doc_id] = (int(part.rows[place]), json.loads(part.fields[place]), terms)
    return found


def lasting(run: Run) -> list[dict]:
    """Return the records of done/ without values that differ between machines."""
    return [
        {key: value for key, value in (run.done(shard) or {}).items() if key not in VOLATILE}
        for shard in run.done_shards()
    ]
