"""Rate of the planner of shard starts compared with a walk over all rows, and how much one shard's reader reads.

    python benchmarks/planner.py [--megabytes 1000] [--rounds 3] [--threads 1]

One corpus of jsonl and the same rows as Parquet are written to a temporary folder; the rows are those of corpora.py, a
block of them repeated, so ids are too. Prints MB of the file per second and per CPU second: of the planner the best of
the rounds, of the walk one round. The files are in the page cache. The last column is the bytes that a process reads
for the group of shards in the middle, as a ratio to the bytes of its rows.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections import deque
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from corpora import documents

from sparse_ingest.corpora.documents import FieldNames
from sparse_ingest.corpora.files import open_corpus
from sparse_ingest.corpora.sources import Corpus, Cursor, Position
from sparse_ingest.corpora.starts import Starts, find_starts

SHARD_ROWS = 65536
_BLOCK_MEGABYTES = 20


def write_corpora(folder: Path, megabytes: int) -> list[Path]:
    """Write the rows in both formats; return the paths."""
    rows = list(documents(min(megabytes, _BLOCK_MEGABYTES)))
    block = "".join(json.dumps(row) + "\n" for row in rows).encode()
    table = pa.Table.from_pylist(rows)
    paths = [folder / "corpus.jsonl", folder / "corpus.parquet"]
    plain = {"compression": "none", "use_dictionary": False}
    with paths[0].open("wb") as lines, pq.ParquetWriter(paths[1], table.schema, **plain) as groups:
        for _ in range(max(1, megabytes // _BLOCK_MEGABYTES)):
            lines.write(block)
            groups.write_table(table)
    return paths


def walk(corpus: Corpus) -> list[Position]:
    """Return the starts of the shards by reading all rows."""
    cursor, positions = Cursor(corpus, None), []
    while cursor.peek(1):
        positions.append(cursor.position)
        deque(cursor.take(SHARD_ROWS), maxlen=0)
    return positions


def timed(find: Callable[[], object]) -> tuple[float, float]:
    """Return wall and CPU seconds."""
    began, cpu = time.perf_counter(), time.process_time()
    find()
    return time.perf_counter() - began, time.process_time() - cpu


def read_ratio(corpus: Corpus, starts: Starts, size: int) -> float:
    """Return the bytes read for the group in the middle by the bytes of its rows."""
    group = starts.groups[len(starts.groups) // 2]
    cursor = Cursor(corpus, None)
    began = _bytes_read()
    cursor.jump(starts.begins[group.start])
    rows = sum(1 for _ in group for _ in cursor.take(SHARD_ROWS))
    return (_bytes_read() - began) / (size * rows / starts.rows)


def _bytes_read() -> int:
    return int(Path("/proc/self/io").read_text().split()[1])


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    print("| corpus | MB | rows | planner MB/s | planner MB/CPU s | walk MB/s | walk MB/CPU s | read by a group |")
    print("|---|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for path in write_corpora(Path(folder), options.megabytes):
            corpus, size = open_corpus([str(path)], fields=FieldNames()), path.stat().st_size
            find = partial(find_starts, corpus, SHARD_ROWS, threads=options.threads)
            starts = find()
            rounds = [timed(find) for _ in range(options.rounds)]
            assert walk(corpus) == starts.positions
            seconds = [*map(min, zip(*rounds, strict=True)), *timed(partial(walk, corpus))]
            rates = " | ".join(f"{size / 1e6 / max(each, 1e-9):,.0f}" for each in seconds)
            ratio = read_ratio(corpus, starts, size)
            print(f"| {path.name} | {size / 1e6:,.0f} | {starts.rows:,} | {rates} | {ratio:.3f} |", flush=True)


if __name__ == "__main__":
    main()
