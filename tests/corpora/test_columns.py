"""Parquet and Arrow: types, nulls, row groups and damage."""

import io
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet as pq
import pytest
from support.forms import packed

from sparse_ingest.corpora.documents import FieldNames
from sparse_ingest.corpora.files import open_corpus
from sparse_ingest.errors import CorpusError

FORMS = [".parquet", ".feather", ".arrows"]


def write(path: Path, columns: dict[str, pa.Array], **options) -> Path:
    table, stream = pa.table(columns), io.BytesIO()
    if path.suffix == ".parquet":
        pq.write_table(table, stream, **options)
    else:
        new = pa.ipc.new_file if path.suffix == ".feather" else pa.ipc.new_stream
        with new(stream, table.schema) as writer:
            writer.write_table(table, **options)
    path.write_bytes(packed(path.name, stream.getvalue()))
    return path


def read(path: Path, **fields) -> list:
    return [row for row, _ in open_corpus([str(path)], fields=FieldNames(**fields)).rows()]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("type_", [pa.int64(), pa.uint8(), pa.string(), pa.large_string(), pa.string_view()])
def test_ids_are_strings_or_whole_numbers_in_decimal(tmp_path, form, type_):
    ids = pa.array([7, 0], pa.int64()).cast(pa.string()).cast(type_)
    path = write(tmp_path / f"c{form}", {"_id": ids, "text": pa.array(["a", "b"])})
    assert [row.document.id for row in read(path)] == ["7", "0"]


@pytest.mark.parametrize("form", FORMS)
def test_texts_may_be_a_dictionary(tmp_path, form):
    texts = pa.array(["a", "b", "a"]).dictionary_encode()
    path = write(tmp_path / f"c{form}", {"_id": pa.array([1, 2, 3]), "text": texts})
    assert [row.document.text for row in read(path)] == ["a", "b", "a"]


@pytest.mark.parametrize("form", FORMS)
def test_a_null_is_a_bad_row_and_other_rows_are_read(tmp_path, form):
    columns = {"_id": pa.array(["1", "2", None, "4"]), "text": pa.array(["a", None, "c", "d"])}
    rows = read(write(tmp_path / f"c{form}", columns))
    assert [row.line for row in rows] == [1, 2, 3, 4]
    assert [row.reason for row in rows] == [
        None,
        'the text in "text" is null; a string was expected',
        'the id in "_id" is null; expected a non-empty string or an integer',
        None,
    ]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("column", "values", "reason"),
    [
        ("text", pa.array([["a"]]), r'the text in "text" is of type list<\w+: string>; expected strings'),
        ("text", pa.array([{"a": 1}]), r'the text in "text" is of type struct<a: int64>; expected strings'),
        ("text", pa.array([b"a"]), 'the text in "text" is of type binary; expected strings'),
        ("title", pa.array([1]), 'the title in "title" is of type int64; expected strings'),
        ("_id", pa.array([1.0]), 'the id in "_id" is of type double; expected strings, integers or UUIDs'),
    ],
)
def test_a_column_of_the_wrong_type_is_an_error(tmp_path, form, column, values, reason):
    columns = {"_id": pa.array(["1"]), "text": pa.array(["a"]), "kept": pa.array([1]), column: values}
    with pytest.raises(CorpusError, match=f"^c{form}: {reason}"):
        read(write(tmp_path / f"c{form}", columns), keep=("kept",))


@pytest.mark.parametrize("form", FORMS)
def test_a_missing_column_is_an_error_that_lists_the_others(tmp_path, form):
    path = write(tmp_path / f"c{form}", {"_id": pa.array(["1"]), "body": pa.array(["a"])})
    with pytest.raises(CorpusError, match=f'^c{form}: no column "text" for the text; the columns are "_id", "body"'):
        read(path)
    with pytest.raises(CorpusError, match='no column "year" to keep; the columns are "_id", "body"'):
        read(path, text="body", keep=("year",))


@pytest.mark.parametrize("form", FORMS)
def test_a_duplicate_column_is_refused_if_it_is_read(tmp_path, form):
    table = pa.Table.from_arrays([pa.array(["1"])] * 4, names=["_id", "text", "x", "x"])
    path, stream = tmp_path / f"c{form}", io.BytesIO()
    if form == ".parquet":
        pq.write_table(table, stream)
    else:
        with (pa.ipc.new_file if form == ".feather" else pa.ipc.new_stream)(stream, table.schema) as writer:
            writer.write_table(table)
    path.write_bytes(stream.getvalue())
    assert len(read(path)) == 1
    with pytest.raises(CorpusError, match='2 columns are named "x"'):
        read(path, keep=("x",))


@pytest.mark.parametrize("form", FORMS)
def test_kept_fields_are_the_same_as_from_json_lines(tmp_path, form):
    kept = {"n": None, "list": [1, None, 2], "of": {"a": ["é", "b"], "c": 1.5}, "flag": True, "number": -3}
    table = pa.Table.from_pylist([{"_id": "1", "text": "a", **kept}])
    path = write(tmp_path / f"c{form}", {name: table[name] for name in table.column_names})
    (row,) = read(path, keep=tuple(kept))
    plain = tmp_path / "c.jsonl"
    plain.write_text(json.dumps({"_id": "1", "text": "a", **kept}))
    assert row.document == read(plain, keep=tuple(kept))[0].document


@pytest.mark.parametrize("form", FORMS)
def test_a_value_that_is_not_utf8_is_one_bad_row(tmp_path, form):
    raw = pa.array([b"a", b"caf\xe9", b"c"])
    texts = pa.Array.from_buffers(pa.string(), 3, raw.buffers())
    before, bad, after = read(write(tmp_path / f"c{form}", {"_id": pa.array(["1", "2", "3"]), "text": texts}))
    assert (before.document.id, after.document.id, bad.line) == ("1", "3", 2)
    assert bad.reason == "not UTF-8: byte 0xe9 at byte 4 of a value"


def test_offsets_outside_their_buffer_are_reported_as_damage(tmp_path):
    offsets = pa.array([0, 1 << 30, 2], pa.int32()).buffers()[1]
    texts = pa.Array.from_buffers(pa.string(), 2, [None, offsets, pa.py_buffer(b"ab")])
    path = write(tmp_path / "c.arrows", {"_id": pa.array(["1", "2"]), "text": texts})
    with pytest.raises(CorpusError, match=r"c.arrows is damaged or cut off after row 0: .*Download or copy it again"):
        read(path)


@pytest.mark.parametrize("form", [".arrows", ".arrows.gz", ".arrows.zst"])
def test_data_after_the_end_of_a_stream_is_an_error(tmp_path, form):
    path = write(tmp_path / "c.arrows", {"_id": pa.array([1]), "text": pa.array(["a"])})
    doubled = tmp_path / f"d{form}"
    doubled.write_bytes(packed(form, path.read_bytes() * 2))
    with pytest.raises(CorpusError, match="after row 1: something follows the end of the stream"):
        read(doubled)


def test_a_damaged_parquet_page_with_checksum_is_an_error(tmp_path):
    columns = {"_id": pa.array(range(100)), "text": pa.array(["stone " * 5] * 100)}
    path = write(tmp_path / "c.parquet", columns, write_page_checksum=True, compression="none", use_dictionary=False)
    path.write_bytes(path.read_bytes().replace(b"stone", b"stane", 20))
    with pytest.raises(CorpusError, match="c.parquet is damaged or cut off after row 0: "):
        read(path)


@pytest.mark.parametrize("name", ["c.parquet.gz", "c.feather.gz", "c.feather.zst"])
def test_a_compressed_file_with_a_footer_is_refused(tmp_path, name):
    path = write(tmp_path / name.rpartition(".")[0], {"_id": pa.array([1]), "text": pa.array(["a"])})
    (tmp_path / name).write_bytes(packed(name, path.read_bytes()))
    with pytest.raises(CorpusError, match="cannot be read .*from a pipe or"):
        read(tmp_path / name)


def test_only_needed_columns_are_read(tmp_path):
    columns = {"_id": pa.array(["1"]), "text": pa.array(["a"]), "when": pa.array([0]).cast(pa.timestamp("ms"))}
    for form in FORMS:
        assert read(write(tmp_path / f"c{form}", columns))[0].document == ("1", "a", '{"text":"a"}')
