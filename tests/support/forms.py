"""The same rows in every file format of a corpus."""

from __future__ import annotations

import csv
import gzip
import io
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.feather as feather
import pyarrow.ipc
import pyarrow.parquet as pq

from sparse_ingest.corpora.sources import START, Corpus, Position

Rows = Sequence[Mapping[str, str | None]]


def _jsonl(rows: Rows) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def _separated(separator: str) -> Callable[[Rows], bytes]:
    def write(rows: Rows) -> bytes:
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, list(rows[0]), delimiter=separator, quoting=csv.QUOTE_ALL)
        writer.writeheader()
        writer.writerows(rows)
        return text.getvalue().encode()

    return write


def _table(rows: Rows) -> pa.Table:
    return pa.table({name: pa.array([row[name] for row in rows], pa.string()) for name in rows[0]})


def _parquet(rows: Rows) -> bytes:
    stream = io.BytesIO()
    pq.write_table(_table(rows), stream, row_group_size=300, write_page_checksum=True)
    return stream.getvalue()


def _feather(rows: Rows) -> bytes:
    stream = io.BytesIO()
    feather.write_feather(_table(rows), stream, chunksize=170)
    return stream.getvalue()


def _stream(rows: Rows) -> bytes:
    stream, table = io.BytesIO(), _table(rows)
    with pa.ipc.new_stream(stream, table.schema) as writer:
        writer.write_table(table, max_chunksize=130)
    return stream.getvalue()


STREAMED = {".jsonl": _jsonl, ".csv": _separated(","), ".tsv": _separated("\t"), ".arrows": _stream}
INDEXED = {".parquet": _parquet, ".feather": _feather}
PACKED = tuple(f"{suffix}{packing}" for suffix in STREAMED for packing in (".gz", ".zst"))
FORMS = (*STREAMED, *INDEXED, *PACKED)


def content_of(form: str, rows: Rows) -> bytes:
    """Return the bytes of a file in a format such as `.csv.gz`."""
    bare = form.removesuffix(".gz").removesuffix(".zst")
    return packed(form, {**STREAMED, **INDEXED}[bare](rows))


def packed(name: str, content: bytes) -> bytes:
    """Compress the content according to the suffix of the name."""
    if name.endswith(".gz"):
        return gzip.compress(content, mtime=0)
    if name.endswith(".zst"):
        return pa.compress(content, codec="zstd", asbytes=True)
    return content


def write_form(folder: Path, form: str, rows: Rows, name: str = "corpus") -> Path:
    """Write a file of rows that all have the same columns."""
    path = folder / f"{name}{form}"
    path.write_bytes(content_of(form, rows))
    return path


def rows_of(corpus: Corpus, start: Position = START) -> list:
    """Return what does not depend on the source of the rows: number, document and reason."""
    return [(row.row, row.document, row.reason) for row, _ in corpus.rows(start)]
