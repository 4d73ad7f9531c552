"""Values of rows in memory: JSON values are kept, others are converted or make a bad row."""

from __future__ import annotations

import datetime as dt
import enum
import json
import subprocess
import sys
import uuid
from decimal import Decimal
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.forms import rows_of

from sparse_ingest.corpora.documents import FieldNames
from sparse_ingest.corpora.files import open_corpus
from sparse_ingest.corpora.memory import memory_corpus
from sparse_ingest.corpora.sources import Corpus
from sparse_ingest.errors import UsageError

FIELDS = FieldNames(keep=("kept",))


class Color(enum.StrEnum):
    RED = "red"


class Size(enum.IntEnum):
    BIG = 3


class Unit(enum.Enum):
    LITER = ("l", 1)


def kept(rows: object) -> list:
    """Return the kept field of each row as JSON text, or the reason of a bad row."""
    return kept_of(memory_corpus(rows, fields=FIELDS))


def kept_of(corpus: Corpus) -> list:
    return [
        row.document.fields.partition('"kept":')[2].removesuffix("}") if row.document else row.reason
        for row, _ in corpus.rows()
    ]


def row(value: object) -> dict[str, Any]:
    return {"_id": "1", "text": "a", "kept": value}


JULY = dt.datetime(2026, 7, 5, 1, 2, 3)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (float("nan"), "null"),
        (np.float32("nan"), "null"),
        (pd.NA, "null"),
        (pd.NaT, "null"),
        (np.datetime64("NaT", "ns"), "null"),
        (Decimal("NaN"), "null"),
        ([1.5, float("nan"), {"a": pd.NA}], '[1.5,null,{"a":null}]'),
        (np.int8(-3), "-3"),
        (np.uint64(2**64 - 1), "18446744073709551615"),
        (np.float64(0.1), "0.1"),
        (np.float32(0.1), "0.10000000149011612"),
        (np.bool_(True), "true"),
        (np.str_("é"), '"é"'),
        (np.array([[1, 2], [3, 4]]), "[[1,2],[3,4]]"),
        (np.array([1.5, np.nan]), "[1.5,null]"),
        (np.array(["a", None, 2**70], dtype=object), '["a",null,1180591620717411303424]'),
        (np.array(["2026-07-05", "NaT"], dtype="datetime64[ns]"), '["2026-07-05T00:00:00",null]'),
        (np.array(7), "7"),
        (1.0, "1.0"),
        (2**100, str(2**100)),
        (JULY.date(), '"2026-07-05"'),
        (JULY, '"2026-07-05T01:02:03"'),
        (JULY.replace(microsecond=500, tzinfo=dt.UTC), '"2026-07-05T01:02:03.000500+00:00"'),
        (pd.Timestamp(JULY, tz="Europe/Berlin"), '"2026-07-05T01:02:03+02:00"'),
        (pd.Timestamp("2026-07-05T01:02:03.000000001"), '"2026-07-05T01:02:03.000000001"'),
        (np.datetime64("1926-07-05T01:02:03.000001", "ns"), '"1926-07-05T01:02:03.000001"'),
        (np.datetime64("2026-07-05"), '"2026-07-05"'),
        (Decimal("27.90"), "27.9"),
        (Decimal("-12345678901234567890123"), "-12345678901234567890123"),
        (Decimal("1E+3"), "1000.0"),
        ((1, "a"), '[1,"a"]'),
        (Color.RED, '"red"'),
        (Size.BIG, "3"),
        ({1: {np.int64(2): []}}, '{"1":{"2":[]}}'),
        ({True: 1, 1.5: 2, JULY.date(): 3}, '{"true":1,"1.5":2,"2026-07-05":3}'),
        (uuid.UUID(int=1), '"00000000-0000-0000-0000-000000000001"'),
        (Unit.LITER, '["l",1]'),
        (dt.time(1, 2, 3, 500), '"01:02:03.000500"'),
        (dt.timedelta(1, 3723, 500_000), '"P1DT1H2M3.5S"'),
        (pd.Timedelta("10s"), '"P0DT0H0M10S"'),
        (pd.Timedelta("-1ns"), f'"{pd.Timedelta("-1ns").isoformat()}"'),
        (np.timedelta64(90, "m"), '"P0DT1H30M0S"'),
        (np.timedelta64("NaT"), "null"),
        (np.datetime64("1926-07-05T01:02:03.000000001"), '"1926-07-05T01:02:03.000000001"'),
        (float("inf"), "null"),
        (np.array([-np.inf]), "[null]"),
    ],
)
def test_a_value_that_is_not_json_is_converted(value: object, expected: str) -> None:
    assert kept([row(value)]) == [expected]
    if not isinstance(value, (list, dict, tuple)):
        assert kept(pd.DataFrame({"_id": ["1"], "text": ["a"], "kept": pd.Series([value], dtype=object)})) == [expected]


@pytest.mark.parametrize(
    ("value", "found"),
    [
        (b"raw", "JSON has no values of type bytes; convert it to a string or a number"),
        (np.bytes_(b"raw"), "JSON has no values of type numpy.bytes_;"),
        ([{"a": [b"raw"]}], "JSON has no values of type bytes;"),
        ({1, 2}, "JSON has no values of type set;"),
        (1j, "JSON has no values of type complex;"),
        (np.array([(1, 2)], dtype="i4,i4"), "JSON has no values of type numpy.void;"),
        (np.datetime64(10**15, "D"), "JSON has no values of type numpy.datetime64;"),
        (pd.Period("2026"), "Period;"),
        (Decimal("1E+999"), "the number 1E+999 is beyond float64"),
        (np.timedelta64(1, "M"), "JSON has no values of type numpy.timedelta64;"),
        ({1: "a", "1": "b"}, 'an object has the duplicate key "1"'),
        ({(1, 2): "a"}, "an object has a key of type tuple; expected a string or a number"),
        (Decimal("7" * 5000), "a number has too many digits: Exceeds the limit"),
        ([10**5000], "a number has too many digits: Exceeds the limit"),
        (int.__lshift__, "JSON has no values of type"),
    ],
)
def test_a_value_that_cannot_be_converted_makes_a_bad_row(value: object, found: str) -> None:
    good = row("good")
    before, reason, after = kept([good, row(value), good])
    assert (before, after) == ('"good"', '"good"')
    assert reason.startswith('column "kept": ') and found in reason


def test_a_list_that_contains_itself_makes_a_bad_row() -> None:
    value: list = []
    value.append(value)
    assert kept([row(value)]) == ['column "kept": a value is nested too deeply']


def test_an_id_may_be_an_integer_of_any_type() -> None:
    rows = [{"_id": value, "text": "a"} for value in (7, np.int32(7), np.uint64(2**64 - 1), 2**70, True, 7.0, np.nan)]
    read = [
        (row.document and row.document.id, row.reason) for row, _ in memory_corpus(rows, fields=FieldNames()).rows()
    ]
    assert [doc_id for doc_id, _ in read] == ["7", "7", str(2**64 - 1), str(2**70), None, None, None]
    assert read[5][1] == 'the id in "_id" is 7.0; expected a non-empty string or an integer'


# Any JSON

finite = st.floats(allow_nan=False, allow_infinity=False)
numbers = st.integers(-(1 << 70), 1 << 70) | finite | st.sampled_from([-0.0, 1e16, 1e-7, 2**63, 2**64, -(2**63) - 1])
strings = st.text(st.characters(), max_size=8)  # includes lone surrogates
values = st.recursive(
    st.none() | st.booleans() | numbers | strings,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(strings, inner, max_size=3),
    max_leaves=6,
)
json_rows = st.lists(
    st.fixed_dictionaries(
        {}, optional={"_id": strings | numbers | st.none(), "title": values, "text": strings | values, "kept": values}
    ),
    max_size=6,
)


@settings(max_examples=150)
@given(rows=json_rows)
def test_json_values_give_the_documents_of_the_same_json_lines(tmp_path: Path, rows: list) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(each) + "\n" for each in rows))
    # The reasons may differ if a row has several faults.
    expected = [document for _, document, _ in rows_of(open_corpus([str(path)], fields=FIELDS))]
    assert [document for _, document, _ in rows_of(memory_corpus(rows, fields=FIELDS))] == expected


# Column types


def test_an_integer_column_with_gaps_is_float_unless_it_is_nullable() -> None:
    frame = pd.DataFrame({"_id": ["1", "2"], "text": ["a", "b"], "kept": [1, None]})
    assert kept(frame) == ["1.0", "null"]
    assert kept(frame.astype({"kept": "Int64"})) == ["1", "null"]
    assert kept(frame.astype({"kept": "category"})) == ["1.0", "null"]


TYPED = {
    "date": (pa.date32(), [JULY.date(), None], ['"2026-07-05"', "null"]),
    "moment": (pa.timestamp("us"), [JULY, None], ['"2026-07-05T01:02:03"', "null"]),
    "zoned": (
        pa.timestamp("ns", "Europe/Berlin"),
        [JULY.replace(tzinfo=dt.UTC), None],
        ['"2026-07-05T03:02:03+02:00"', "null"],
    ),
    "nanoseconds": (pa.timestamp("ns"), [1, None], ['"1970-01-01T00:00:00.000000001"', "null"]),
    "decimal": (pa.decimal128(30, 2), [Decimal("27.90"), None], ["27.9", "null"]),
    "float": (pa.float32(), [0.1, float("nan")], ["0.10000000149011612", "null"]),
    "time": (pa.time64("us"), [dt.time(1, 2, 3), None], ['"01:02:03"', "null"]),
    "duration": (pa.duration("us"), [dt.timedelta(1, 60), None], ['"P1DT0H1M0S"', "null"]),
    "huge": (pa.decimal128(38, 0), [Decimal(10**30), None], [str(10**30), "null"]),
    "unsigned": (pa.uint64(), [2**64 - 1, 5], [str(2**64 - 1), "5"]),
    "enum": (pa.dictionary(pa.int8(), pa.string()), ["a", None], ['"a"', "null"]),
    "structs": (
        pa.list_(pa.struct({"a": pa.timestamp("s")})),
        [[{"a": JULY}, None], []],
        ['[{"a":"2026-07-05T01:02:03"},null]', "[]"],
    ),
}


@pytest.mark.parametrize("name", TYPED)
def test_typed_columns_have_the_same_values_in_every_container(name: str, tmp_path: Path) -> None:
    type_, content, expected = TYPED[name]
    table = pa.table({"_id": ["1", "2"], "text": ["a", "b"], "kept": pa.array(content, type_)})
    forms = [table, table.to_pandas(types_mapper=pd.ArrowDtype), datasets.Dataset(table), table.to_pylist()]
    if name != "structs":  # pandas stores these as arrays
        forms.append(table.to_pandas())
    if find_spec("polars"):
        forms.append(import_module("polars").from_arrow(table))
    for form in forms:
        assert kept(form) == expected, type(form)
    assert len({str(memory_corpus(form, fields=FIELDS).identity()) for form in forms}) == 1
    assert [kept_of(open_corpus([spec], fields=FIELDS)) for spec in saved(table, tmp_path)] == [expected] * 4


def saved(table: pa.Table, folder: Path) -> list[str]:
    """Save a table in four forms. Return their specs; the last two are read by `datasets`."""
    (folder / "hub").mkdir()
    pq.write_table(table, folder / "c.parquet")
    pq.write_table(table, folder / "hub" / "c.parquet")
    with pa.ipc.new_file(folder / "c.arrow", table.schema) as writer:
        writer.write_table(table)
    datasets.Dataset(table).save_to_disk(folder / "saved")
    return [str(folder / "c.parquet"), str(folder / "c.arrow"), f"hf:{folder / 'hub'}", f"hf:{folder / 'saved'}"]


@pytest.mark.parametrize("nested", [False, True])
def test_columns_of_the_arrow_json_type_are_parsed(tmp_path: Path, nested: bool) -> None:
    content = pa.ExtensionArray.from_storage(pa.json_(), pa.array(['{"a": [1, 2.5]}', '"b"', "1", None, "null"]))
    expected = ['{"a":[1,2.5]}', '"b"', "1", "null", "null"]
    if nested:
        content = pa.StructArray.from_arrays([content], names=["x"])
        expected = [f'{{"x":{each}}}' for each in expected]
    texts = pa.array(list("abcde"))
    table = pa.table({"_id": texts, "text": texts, "kept": content})
    assert kept(table) == expected
    assert [kept_of(open_corpus([spec], fields=FIELDS)) for spec in saved(table, tmp_path)] == [expected] * 4


def test_ids_of_the_arrow_json_type_are_strings_and_integers(tmp_path: Path) -> None:
    ids = pa.ExtensionArray.from_storage(pa.json_(), pa.array(["1", '"2"', "1.5"]))
    pq.write_table(pa.table({"_id": ids, "text": ["a", "b", "c"]}), tmp_path / "c.parquet")
    rows = [row for row, _ in open_corpus([str(tmp_path / "c.parquet")], fields=FieldNames()).rows()]
    assert [row.document and row.document.id for row in rows] == ["1", "2", None]
    assert rows[2].reason == 'the id in "_id" is 1.5; expected a non-empty string or an integer'


def test_ids_may_be_uuids(tmp_path: Path) -> None:
    ids = pa.ExtensionArray.from_storage(pa.uuid(), pa.array([bytes(range(16))], pa.binary(16)))
    pq.write_table(pa.table({"id": ids, "text": ["a"]}), tmp_path / "c.parquet")
    ((row, _),) = open_corpus([str(tmp_path / "c.parquet")], fields=FieldNames()).rows()
    assert row.document.id == "00010203-0405-0607-0809-0a0b0c0d0e0f"


def test_bytes_in_a_parquet_file_make_a_bad_row(tmp_path: Path) -> None:
    path = tmp_path / "c.parquet"
    pq.write_table(pa.table({"_id": ["1", "2"], "text": ["a", "b"], "kept": [None, b"raw"]}), path)
    assert kept_of(open_corpus([str(path)], fields=FIELDS)) == [
        "null",
        'column "kept": JSON has no values of type bytes; convert it to a string or a number',
    ]


def test_arrow_maps_are_objects() -> None:
    inner = pa.map_(pa.string(), pa.list_(pa.int64()))
    type_ = pa.struct({"m": pa.list_(pa.map_(pa.int32(), inner))})
    content = [{"m": [[(7, [("a", [1]), ("b", None)])], []]}, {"m": None}, None]
    table = pa.table({"_id": ["1", "2", "3"], "text": ["a", "b", "c"], "kept": pa.array(content, type_)})
    assert kept(table) == ['{"m":[{"7":{"a":[1],"b":null}},{}]}', '{"m":null}', "null"]


def test_a_map_that_cannot_be_an_object_makes_a_bad_row() -> None:
    for type_, content, found in [
        (pa.map_(pa.string(), pa.int64()), [[("a", 1), ("a", 2)]], "duplicate keys"),
        (pa.map_(pa.binary(), pa.int64()), [[(b"a", 1)]], "JSON has no values of type bytes"),
        (pa.map_(pa.struct({"a": pa.int64()}), pa.int64()), [[({"a": 1}, 1)]], "unhashable type"),
    ]:
        table = pa.table({"_id": ["1"], "text": ["a"], "kept": pa.array(content, type_)})
        (reason,) = kept(table)
        assert found in reason


def test_an_arrow_value_that_python_cannot_read_makes_a_bad_row() -> None:
    moments = pa.array([0, 10**18, None], pa.timestamp("s"))
    table = pa.table({"_id": ["1", "2", "3"], "text": ["a", "b", "c"], "kept": moments})
    first, reason, last = kept(table)
    assert (first, last) == ('"1970-01-01T00:00:00"', "null")
    assert reason.startswith('column "kept": Python cannot read a value of type timestamp[s]: ')
    raw = pa.array([b"a", b"\xff", b"c"]).view(pa.string())
    first, reason, last = kept(table.set_column(2, "kept", raw))
    assert (first, last) == ('"a"', '"c"')
    assert reason == "not UTF-8: byte 0xff at byte 1 of a value"


def test_every_string_type_is_read() -> None:
    content = {
        "dictionary": pa.array(["x", "y", "x"]).dictionary_encode(),
        "view": pa.array(["x", "y", "x"], pa.string_view()),
        "large": pa.array(["x", "y", "x"], pa.large_string()),
    }
    for array in content.values():
        table = pa.table({"_id": ["1", "2", "3"], "text": ["a", "b", "c"], "kept": array})
        assert kept(table) == ['"x"', '"y"', '"x"']


def test_a_polars_column_without_an_arrow_type_is_refused() -> None:
    polars = pytest.importorskip("polars")
    columns = {"_id": ["1"], "text": ["a"]}
    (reason,) = kept(polars.DataFrame({**columns, "kept": polars.Series([7], dtype=polars.Object)}))
    assert reason.startswith('column "kept": JSON has no values of type bytes')
    with pytest.raises(UsageError, match="is not a table that Arrow can read"):
        kept(polars.DataFrame({**columns, "kept": polars.Series([2**100], dtype=polars.Int128)}))


def test_polars_bytes_make_a_bad_row() -> None:
    polars = pytest.importorskip("polars")
    assert kept(polars.DataFrame({"_id": ["1"], "text": ["a"], "kept": [b"raw"]}))[0].startswith(
        'column "kept": JSON has no values of type bytes'
    )


def test_a_json_feature_of_a_dataset_is_parsed() -> None:
    if not hasattr(datasets, "Json"):
        pytest.skip("this release of datasets has no Json feature")
    text = datasets.Value("string")
    features = datasets.Features({"_id": text, "text": text, "kept": datasets.Json()})
    rows = [row({"a": 1}), row([1, "b"])]
    assert kept(datasets.Dataset.from_list(rows, features=features)) == ['{"a":1}', '[1,"b"]']


def test_a_generated_dataset_may_have_values_of_mixed_types() -> None:
    rows = [row(1), row("x"), row({"a": None}), {"_id": "4", "text": "d"}]
    generated = datasets.IterableDataset.from_generator(lambda: iter(rows))
    assert kept(generated) == ["1", '"x"', '{"a":null}', ""]


@pytest.mark.parametrize(
    ("container", "libraries"),
    [
        ("rows", {"pandas", "polars", "datasets", "torch"}),
        ("pyarrow.Table.from_pylist(rows)", {"polars", "datasets", "torch"}),  # pyarrow itself imports pandas
    ],
)
def test_libraries_of_unused_containers_are_not_imported(container: str, libraries: set) -> None:
    program = (
        "import sys, pyarrow\n"
        "from sparse_ingest.corpora.documents import FieldNames\n"
        "from sparse_ingest.corpora.memory import memory_corpus\n"
        "rows = [{'_id': '1', 'text': 'a', 'kept': float('nan')}]\n"
        f"memory_corpus({container}, fields=FieldNames(keep=('kept',)))\n"
        f"print(set(sys.modules) & {libraries})\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
