"""Shards: which bits of a weight are kept, and a round trip of every column."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.runs import make_run, write_shard

from sparse_ingest.errors import RunError
from sparse_ingest.records import SparseRows
from sparse_ingest.runs import shards
from sparse_ingest.runs.shards import (
    PART_ROWS,
    ShardPart,
    drop_bits,
    parse_fields,
    read_doc_ids,
    read_shard,
    shard_schema,
    shard_schema_of,
    store_weights,
    take_rows,
    text_hash,
)

SMALLEST_NORMAL = np.float32(2.0**-14)
SMALLEST = np.float32(2.0**-24)
characters = st.characters(exclude_categories=["Cs"])
words = st.text(characters, max_size=12)


def index_bits(weights: np.ndarray) -> np.ndarray:
    """Return the bits that a rank_features field keeps of a float32 weight."""
    return weights.astype(np.float32).view(np.uint32) >> 15 << 15


def check_dropped(weights: np.ndarray) -> None:
    halves = drop_bits(weights)
    kept = halves.astype(np.float32)
    assert halves.dtype == np.float16
    assert np.all(kept <= weights)
    # The next float16 is above the weight, so none is closer from below.
    above = (halves.view(np.uint16) + 1).view(np.float16).astype(np.float32)
    assert np.all((above > weights) | (weights == 65504))
    normal = weights >= SMALLEST_NORMAL
    assert np.array_equal(index_bits(kept[normal]), index_bits(weights[normal]))


def test_every_float16_and_its_float32_neighbors_are_truncated() -> None:
    halves = np.arange(0x7C00, dtype=np.uint16).view(np.float16)
    exact = halves.astype(np.float32)
    assert np.array_equal(drop_bits(exact).view(np.uint16), halves.view(np.uint16))
    bits = exact.view(np.uint32)
    for step in (1, 2, 0xFFF, 0x1000, 0x1001, 0x1FFF):
        check_dropped((bits[:-1] + np.uint32(step)).view(np.float32))
        check_dropped((bits[1:] - np.uint32(step)).view(np.float32))


@given(st.lists(st.floats(0, 65504, width=32), max_size=50))
def test_any_weight_is_truncated_toward_zero(weights: list[float]) -> None:
    check_dropped(np.array(weights, dtype=np.float32))


def test_rounding_would_change_the_bits_in_an_index() -> None:
    """Why bits are dropped: the weight just below a step of the index would round up to it."""
    weight = np.nextafter(np.float32(1.5), np.float32(0))
    assert index_bits(np.array([np.float16(weight)])) != index_bits(np.array([weight]))
    assert index_bits(drop_bits(np.array([weight]))) == index_bits(np.array([weight]))


@pytest.mark.parametrize("weight", [-1.0, float("nan"), float("inf"), 65504.01, 1e9, -0.5])
def test_a_weight_that_float16_cannot_hold_is_refused(weight: float) -> None:
    with pytest.raises(ValueError, match="do not fit into float16"):
        drop_bits(np.array([1.0, weight], dtype=np.float32))


def rows_of(*rows: dict[int, float], ids: list[str] | None = None, id_type: type = np.int32) -> SparseRows:
    return SparseRows(
        ids or [f"d{place}" for place in range(len(rows))],
        np.cumsum([0, *map(len, rows)], dtype=np.int64),
        np.array([token for row in rows for token in row], dtype=id_type),
        np.array([weight for row in rows for weight in row.values()], dtype=np.float32),
    )


def test_a_weight_that_becomes_zero_is_dropped() -> None:
    below = float(np.nextafter(SMALLEST, np.float32(0)))
    vectors = rows_of({1: 1.0, 2: below, 3: 2.0}, {}, {4: below}, {5: float(SMALLEST), 9: 1e-30})
    stored = store_weights(vectors, "float16")
    assert len(vectors.weights) - len(stored.weights) == 3
    assert stored.indptr.tolist() == [0, 2, 2, 2, 3]
    assert stored.token_ids.tolist() == [1, 3, 5]
    assert stored.weights.tolist() == [1.0, 2.0, float(SMALLEST)] and stored.weights.dtype == np.float16
    assert store_weights(vectors, "float32") is vectors


def test_vectors_are_not_copied_if_no_weight_is_dropped() -> None:
    vectors = rows_of({1: 1.0, 70000: 0.1})
    assert store_weights(vectors, "float16").token_ids is vectors.token_ids
    assert store_weights(rows_of({}, {}), "float16").indptr.tolist() == [0, 0, 0]


@st.composite
def parts_of(draw, top: int) -> list[ShardPart]:
    parts, row = [], 0
    for size in draw(st.lists(st.integers(1, 5), max_size=3)):
        steps = draw(st.lists(st.integers(1, 4), min_size=size, max_size=size))
        places = np.cumsum(steps, dtype=np.uint64) + np.uint64(row)
        row = int(places[-1])
        pairs = [sorted(draw(st.sets(st.integers(0, top), max_size=6))) for _ in range(size)]
        vectors = rows_of(
            *({token: draw(st.floats(2.0**-14, 60000, width=16)) for token in row} for row in pairs),
            ids=[draw(words.filter(bool)) for _ in range(size)], id_type=np.uint32,
        )  # fmt: skip
        texts = [draw(words) for _ in range(size)]
        parts.append(ShardPart(places, [text_hash(text) for text in texts], vectors, texts))
    return parts


def assert_same(found: ShardPart, expected: ShardPart) -> None:
    assert found.rows.tolist() == expected.rows.tolist() and found.rows.dtype == np.uint64
    assert found.text_hashes == expected.text_hashes
    assert found.fields == expected.fields
    assert list(found.vectors.doc_ids) == list(expected.vectors.doc_ids)
    for name in ("indptr", "token_ids", "weights"):
        assert getattr(found.vectors, name).tolist() == getattr(expected.vectors, name).tolist()


def write(folder: Path, parts: list[ShardPart], schema: pa.Schema, name: str = "part.parquet") -> tuple[Path, str]:
    return folder / name, write_shard(parts, scratch=folder / "scratch", target=folder / name, schema=schema)


@pytest.mark.parametrize("kind", ["float16", "float32"])
@pytest.mark.parametrize(("vocabulary", "bits"), [(65536, 16), (65537, 32)])
@settings(max_examples=25)
@given(content=st.data())
def test_shards_are_read_as_they_were_written(
    tmp_path: Path, vocabulary: int, bits: int, kind: str, content: st.DataObject
) -> None:
    schema = shard_schema(vocabulary, kind)  # type: ignore[arg-type]
    parts = content.draw(parts_of(vocabulary - 1))
    stored = [part._replace(vectors=store_weights(part.vectors, kind)) for part in parts]  # type: ignore[arg-type]
    path, digest = write(tmp_path, stored, schema)
    assert digest == hashlib.sha256(path.read_bytes()).hexdigest()
    assert not (tmp_path / "scratch").exists()
    found = list(read_shard(path))
    assert len(found) == len(parts)
    for one, expected in zip(found, stored, strict=True):
        assert_same(one, expected)
        assert one.vectors.token_ids.dtype == np.dtype(f"uint{bits}") and one.vectors.weights.dtype == np.dtype(kind)
    assert list(read_doc_ids(path)) == [
        pair for part in parts for pair in zip(part.rows.tolist(), part.vectors.doc_ids, strict=True)
    ]
    assert write(tmp_path, stored, schema, "again.parquet")[1] == digest


def test_the_columns_are_those_of_format_1(tmp_path: Path) -> None:
    path, _ = write(tmp_path, [], shard_schema(30522, "float16"))
    assert [str(field) for field in pq.read_schema(path)] == [
        "pyarrow.Field<row: uint64 not null>",
        "pyarrow.Field<doc_id: string not null>",
        "pyarrow.Field<text_hash: fixed_size_binary[16] not null>",
        "pyarrow.Field<token_ids: list<element: uint16> not null>",
        "pyarrow.Field<weights: list<element: halffloat> not null>",
        "pyarrow.Field<fields: string not null>",
    ]
    assert shard_schema_of(path).equals(pq.read_schema(path))
    assert list(read_shard(path)) == [] and list(read_doc_ids(path)) == []


def test_a_row_group_with_long_fields_is_read_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    documents = {f"d{number}": {"river": 1 + number / 4, "stone": 0.5} for number in range(10)}
    fields = {doc_id: {"text": doc_id * 500} for doc_id in documents}
    path = make_run(tmp_path / "run", documents, shard_rows=10, fields=fields).shard_path(0)
    [whole] = read_shard(path)
    monkeypatch.setattr(shards, "_PART_BYTES", 4000)
    pieces = list(read_shard(path))
    assert [len(piece.rows) for piece in pieces] == [2, 2, 2, 2, 2]
    for start, piece in zip(range(0, 10, 2), pieces, strict=True):
        assert_same(piece, take_rows(whole, np.arange(start, start + len(piece.rows))))
    assert [row for piece in pieces for row in piece.fields] == whole.fields
    assert [doc_id for piece in pieces for doc_id in piece.vectors.doc_ids] == list(documents)


def test_a_row_group_holds_one_part(tmp_path: Path) -> None:
    size = PART_ROWS
    nothing = (np.zeros(size + 1, np.int64), np.empty(0, np.int32), np.empty(0, np.float16))
    vectors = SparseRows([str(place) for place in range(size)], *nothing)
    part = ShardPart(np.arange(size, dtype=np.uint64), [b"0" * 16] * size, vectors, ["{}"] * size)
    path, _ = write(tmp_path, [part, part._replace(rows=part.rows + np.uint64(size))], shard_schema(10, "float16"))
    with pq.ParquetFile(path) as file:
        assert [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)] == [size, size]


@pytest.mark.parametrize("content", [None, b"", b"PAR1 no Parquet", b"other columns"])
def test_a_file_that_is_not_a_shard_is_refused(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "part.parquet"
    if content == b"other columns":
        pq.write_table(pa.table({"row": [1]}), path)
    elif content is not None:
        path.write_bytes(content)
    for read in (read_shard, read_doc_ids):
        with pytest.raises(RunError, match="cannot be read as a shard"):
            list(read(path))


def test_rows_of_a_part_can_be_selected() -> None:
    vectors = rows_of({1: 1.0, 2: 2.0}, {}, {3: 3.0}, {4: 4.0, 5: 5.0})
    part = ShardPart(
        np.array([10, 12, 13, 17], np.uint64), [bytes([place] * 16) for place in range(4)], vectors, list("abcd")
    )
    left = take_rows(part, np.array([1, 3]))
    assert left.rows.tolist() == [12, 17] and left.fields == ["b", "d"] and left.text_hashes[1] == b"\x03" * 16
    assert list(left.vectors.doc_ids) == ["d1", "d3"]
    assert (left.vectors.indptr.tolist(), left.vectors.token_ids.tolist()) == ([0, 0, 2], [4, 5])
    assert not len(take_rows(part, np.array([], dtype=np.int64)).rows)


FIELDS = (
    '{"a": 0, "b": -0, "c": 1.0, "d": 5e-324, "e": [true, null, {"": "\\u00e9\\ud83d\\ude00"}]}',
    '{"a": 12345678901234567890123, "b": 0.1000000000000000055511151231257827, "a": 18446744073709551616}',
    '{"a": NaN, "b": -Infinity, "c": 1e400, "d": "\\ud800"}',
)


@pytest.mark.parametrize("text", FIELDS)
def test_fields_are_read_as_json_reads_them(text: str) -> None:
    assert repr(parse_fields(text, "id")) == repr(json.loads(text))


@pytest.mark.parametrize("text", ["", "[]", '{"a": 1} x', '{"a": 01}', '{"a": "\t"}', '{"a":' * 100_000])
def test_fields_that_are_not_an_object_are_refused(text: str) -> None:
    with pytest.raises(RunError, match="fields of document 'id' are not a JSON object"):
        parse_fields(text, "id")
