"""Speed of reading, parsing and hashing a corpus in MB/s, compared with `datasets` and pandas; memory over 10 GB.

    python benchmarks/corpora.py [--megabytes 100] [--rounds 3]
    python benchmarks/corpora.py --memory 10       peak memory while reading 10 GB of jsonl from stdin

The documents are passages of about 1,000 characters of Python's documentation (pydoc_data.topics), repeated under new
ids. Each contender runs in its own process, one after another, and reads each document once; a row is the best of the
rounds. Megabytes are counted as plain jsonl, so rows are comparable. sparse-ingest checks ids and texts, joins the
title, detects duplicate ids, and hashes each row as `encode` does; "sparse-ingest, rows" only reads rows with their
lines and offsets, and the others only rows. The baseline is `json.loads`.
CPU time is given besides wall time, because it is more accurate on a busy machine. Not covered: the encoder, which is
slower than all of this.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

_PASSAGE = 1000
_OURS = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".csv", ".csv.gz", ".tsv", ".parquet", ".feather", ".arrows")
_CONTENDERS = (
    ("sparse-ingest", _OURS),
    ("sparse-ingest, rows", _OURS),
    ("json.loads", (".jsonl",)),
    ("datasets", (".jsonl", ".jsonl.gz", ".csv", ".parquet", ".arrows")),
    ("pandas", (".jsonl", ".jsonl.gz", ".csv", ".parquet", ".feather")),
)


def passages() -> list[str]:
    """Return the documentation in pieces of about 1,000 characters."""
    text = "\n".join(topics.values())
    return [text[start : start + _PASSAGE] for start in range(0, len(text), _PASSAGE)]


def documents(megabytes: int) -> Iterator[dict[str, str]]:
    """Yield documents as jsonl, up to a number of megabytes."""
    pieces = passages()
    size, number = 0, 0
    while size < megabytes * 1e6:
        text = pieces[number % len(pieces)]
        row = {"_id": f"d{number}", "title": text[:30].strip(), "text": text}
        size += len(json.dumps(row)) + 1
        number += 1
        yield row


# Contenders: each reads all documents of a file


def read_json(path: Path) -> None:
    """Read lines with json.loads, the baseline."""
    with path.open("rb") as lines:
        deque(map(json.loads, lines), maxlen=0)


def read_ours(path: Path) -> None:
    """Read and hash rows as `encode` does."""
    from sparse_ingest.corpora.documents import FieldNames
    from sparse_ingest.corpora.files import open_corpus
    from sparse_ingest.corpora.sources import Cursor
    from sparse_ingest.encoding.counts import RowHash

    cursor = Cursor(open_corpus([str(path)], fields=FieldNames()), None)
    while cursor.peek(1):
        digest = RowHash()
        for row in cursor.take(65536):
            assert row.document is not None
            digest.add(row)
        digest.hexdigest()


def read_our_rows(path: Path) -> None:
    """Read rows with their lines and offsets, without making documents of them."""
    from sparse_ingest.corpora.documents import FieldNames
    from sparse_ingest.corpora.files import open_corpus

    (source,) = open_corpus([str(path)], fields=FieldNames()).sources
    deque(source.records(0, 1), maxlen=0)


def read_datasets(path: Path) -> None:
    """Read rows with the library datasets, streaming."""
    from datasets import load_dataset

    builder = {"jsonl": "json", "arrows": "arrow"}.get(path.name.split(".")[1], path.name.split(".")[1])
    rows = load_dataset(builder, data_files=str(path), split="train", streaming=True)
    deque(iter(rows), maxlen=0)


def read_pandas(path: Path) -> None:
    """Read rows with pandas, in chunks if the format allows it."""
    import pandas

    frames: Any
    if ".jsonl" in path.name:
        frames = pandas.read_json(path, lines=True, chunksize=10_000)
    elif ".csv" in path.name:
        frames = pandas.read_csv(path, chunksize=10_000, keep_default_na=False)
    else:
        frames = [pandas.read_parquet(path) if path.suffix == ".parquet" else pandas.read_feather(path)]
    for frame in frames:
        deque(frame.itertuples(index=False), maxlen=0)


_READERS: dict[str, Callable[[Path], None]] = {
    "json.loads": read_json, "sparse-ingest": read_ours, "sparse-ingest, rows": read_our_rows,
    "datasets": read_datasets, "pandas": read_pandas,
}  # fmt: skip


def peak_megabytes() -> float:
    """Peak memory of this process. Not ru_maxrss, which starts with the parent's."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) / 1024


def write_forms(folder: Path, megabytes: int) -> float:
    """Write a file in every format; return the megabytes of the jsonl file."""
    import pyarrow as pa
    import pyarrow.feather as feather
    import pyarrow.parquet as pq

    rows = list(documents(megabytes))
    plain = folder / "corpus.jsonl"
    with plain.open("w") as lines:
        lines.writelines(json.dumps(row) + "\n" for row in rows)
    for suffix, separator in ((".csv", ","), (".tsv", "\t")):
        with (folder / f"corpus{suffix}").open("w", newline="") as stream:
            writer = csv.DictWriter(stream, ["_id", "title", "text"], delimiter=separator)
            writer.writeheader()
            writer.writerows(rows)
    for name in ("corpus.jsonl", "corpus.csv"):
        (folder / f"{name}.gz").write_bytes(gzip.compress((folder / name).read_bytes(), 6))
    (folder / "corpus.jsonl.zst").write_bytes(pa.compress(plain.read_bytes(), codec="zstd", asbytes=True))
    table = pa.Table.from_pylist(rows)
    pq.write_table(table, folder / "corpus.parquet", row_group_size=10_000)
    feather.write_feather(table, str(folder / "corpus.feather"), chunksize=10_000)
    with pa.ipc.new_stream(str(folder / "corpus.arrows"), table.schema) as ipc:
        ipc.write_table(table, max_chunksize=10_000)
    return plain.stat().st_size / 1e6


def measure(contender: str, path: Path) -> tuple[float, float, float]:
    """Return wall seconds, CPU seconds and peak memory in MB, without imports."""
    result = subprocess.run(
        [sys.executable, __file__, "--run", contender, str(path)], check=True, capture_output=True, text=True,
        env={**os.environ, "HF_DATASETS_OFFLINE": "1"},
    )  # fmt: skip
    seconds, cpu_s, peak = json.loads(result.stdout.splitlines()[-1])
    return seconds, cpu_s, peak


def run(contender: str, path: Path) -> None:
    """Run one contender in this process; first on a few documents, so that imports are not measured."""
    with tempfile.TemporaryDirectory() as folder:
        write_forms(Path(folder), 0 if contender == "json.loads" else 1)
        _READERS[contender](Path(folder) / path.name)
    began, cpu_before = time.perf_counter(), time.process_time()
    _READERS[contender](path)
    seconds, cpu_s = time.perf_counter() - began, time.process_time() - cpu_before
    print(json.dumps([seconds, cpu_s, peak_megabytes()]))


def compare(megabytes: int, rounds: int) -> None:
    """Print the table."""
    with tempfile.TemporaryDirectory() as folder:
        size = write_forms(Path(folder), megabytes)
        pairs = [(contender, form) for contender, forms in _CONTENDERS for form in forms]
        found: dict[tuple[str, str], list[tuple[float, float, float]]] = {pair: [] for pair in pairs}
        for _ in range(rounds):
            for contender, form in pairs:
                found[contender, form].append(measure(contender, Path(folder) / f"corpus{form}"))
    print(f"{size:,.0f} MB of jsonl, best of {rounds}\n\n| form | contender | MB/s | MB per CPU second | peak MB |")
    print("|---|---|---|---|---|")
    for contender, form in sorted(pairs, key=lambda pair: _OURS.index(pair[1])):
        seconds, cpu_s, peak = (min(values) for values in zip(*found[contender, form], strict=True))
        print(f"| {form} | {contender} | {size / seconds:,.0f} | {size / cpu_s:,.0f} | {peak:,.0f} |")


def show_memory(gigabytes: float) -> None:
    """Print peak memory after each gigabyte of jsonl read from a pipe."""
    reader = subprocess.Popen([sys.executable, __file__, "--read"], stdin=subprocess.PIPE)
    assert reader.stdin is not None
    lines = [json.dumps({"_id": "ID", "title": text[:30].strip(), "text": text}) + "\n" for text in passages()]
    pieces = [line.encode().partition(b"ID") for line in lines]
    size, number = 0, 0
    while size < gigabytes * 1e9:
        block = b"".join(before + b"d%d" % (number + place) + after for place, (before, _, after) in enumerate(pieces))
        reader.stdin.write(block)
        number += len(pieces)
        size += len(block)
    reader.stdin.close()
    sys.exit(reader.wait())


def read_standard_input() -> None:
    """Read stdin as `encode` does, and print peak memory at each gigabyte."""
    from sparse_ingest.corpora.documents import FieldNames
    from sparse_ingest.corpora.files import open_corpus
    from sparse_ingest.corpora.sources import Cursor
    from sparse_ingest.encoding.counts import RowHash

    cursor = Cursor(open_corpus(["-"], fields=FieldNames()), None)
    began, shown = time.perf_counter(), 0
    print("| GB | documents | MB/s | peak MB |\n|---|---|---|---|", flush=True)
    while cursor.peek(1):
        digest = RowHash()
        for row in cursor.take(65536):
            digest.add(row)
        digest.hexdigest()
        gigabytes = cursor.position.offset / 1e9
        if gigabytes >= shown + 1:
            shown = int(gigabytes)
            speed = gigabytes * 1e3 / (time.perf_counter() - began)
            print(f"| {gigabytes:.1f} | {cursor.position.row:,} | {speed:,.0f} | {peak_megabytes():,.0f} |", flush=True)


def main() -> None:
    """Read the options and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--memory", type=float, metavar="GIGABYTES")
    parser.add_argument("--run", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--read", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.run:
        run(given.run[0], Path(given.run[1]))
    elif given.read:
        read_standard_input()
    elif given.memory:
        show_memory(given.memory)
    else:
        compare(given.megabytes, given.rounds)


if __name__ == "__main__":
    main()
