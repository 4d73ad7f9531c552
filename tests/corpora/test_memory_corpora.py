"""Rows in memory: every container gives the documents of the same rows as JSON lines."""

from __future__ import annotations

import json
from collections import UserDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import pandas as pd
import pyarrow as pa
import pytest
from support.forms import rows_of

from sparse_ingest.corpora.documents import FieldNames
from sparse_ingest.corpora.files import open_corpus
from sparse_ingest.corpora.memory import corpus_of, memory_corpus
from sparse_ingest.corpora.sources import Corpus
from sparse_ingest.encoding.counts import RowHash
from sparse_ingest.errors import UsageError

FIELDS = FieldNames(keep=("year", "tags", "price", "open", "place"))
ROWS: list[dict[str, Any]] = [
    {
        "_id": f"d{number}",
        "title": f'Title "{number}", é' if number % 3 else None,
        "text": f"text {number}\n\u2028日本 \\ " * (number % 5),
        "year": 1900 + number,
        "tags": [f"a{number}", "b"] if number % 4 else None,
        "price": number / 10,
        "open": bool(number % 2),
        "place": {"lat": number / 7, "names": ["x"]},
    }
    for number in range(1200)
]


class Stream:
    """An object that has only Arrow's stream protocol."""

    def __init__(self, table: pa.Table) -> None:
        self._table = table

    def __arrow_c_stream__(self, requested_schema: object = None) -> object:
        return self._table.__arrow_c_stream__(requested_schema)


def arrow(rows: list) -> pa.Table:
    return pa.Table.from_pylist(rows)


def polars(rows: list) -> object:
    return pytest.importorskip("polars").DataFrame(rows)


KINDS: dict[str, Callable[[list], Any]] = {
    "list": list,
    "tuple": tuple,
    "generator": lambda rows: (row for row in rows),
    "mappings": lambda rows: map(UserDict, rows),
    "other order of columns": lambda rows: [dict(reversed(row.items())) for row in rows],
    "pandas": pd.DataFrame,
    "pandas with an index": lambda rows: pd.DataFrame(rows).set_index("_id", drop=False),
    "pandas of Arrow's types": lambda rows: arrow(rows).to_pandas(types_mapper=pd.ArrowDtype),
    "series": pd.Series,
    "polars": polars,
    "table": arrow,
    "batches": lambda rows: pa.Table.from_batches(arrow(rows).to_batches(max_chunksize=70)),
    "batch": lambda rows: arrow(rows).combine_chunks().to_batches()[0],
    "reader": lambda rows: arrow(rows).to_reader(max_chunksize=70),
    "protocol": lambda rows: Stream(arrow(rows)),
    "Dataset": datasets.Dataset.from_list,
    "Dataset for numpy": lambda rows: datasets.Dataset.from_list(rows).with_format("numpy"),
    "reordered Dataset": lambda rows: datasets.Dataset.from_list(rows[::-1]).select(range(len(rows))[::-1]),
    "IterableDataset": lambda rows: datasets.Dataset.from_list(rows).to_iterable_dataset(),
    "IterableDataset of a generator": lambda rows: datasets.IterableDataset.from_generator(lambda: iter(rows)),
}


def json_lines(folder: Path, rows: list) -> Path:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def hash_of(corpus: Corpus) -> str:
    digest = RowHash()
    for row, _ in corpus.rows():
        digest.add(row)
    return digest.hexdigest()


def reasons(rows: object, fields: FieldNames = FIELDS) -> list[str | None]:
    return [row.reason for row, _ in memory_corpus(rows, fields=fields).rows()]


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any, Any]:
    """Rows and hash of the JSON lines, and the identity of the list."""
    lines = open_corpus([str(json_lines(tmp_path_factory.mktemp("lines"), ROWS))], fields=FIELDS)
    return rows_of(lines), hash_of(lines), memory_corpus(ROWS, fields=FIELDS).identity()


@pytest.mark.parametrize("kind", KINDS)
def test_every_container_gives_the_same_documents_and_identity(expected: tuple[Any, Any, Any], kind: str) -> None:
    corpus = corpus_of(KINDS[kind](ROWS), fields=FIELDS)
    assert (rows_of(corpus), hash_of(corpus), corpus.identity()) == expected


def test_the_identity_is_name_count_and_a_stable_hash() -> None:
    rows = [{"_id": "1", "text": "é", "price": 1e16}, "no row", {"_id": "2", "text": "b", "price": None}]
    assert memory_corpus(rows, fields=FieldNames(keep=("price",))).identity() == [
        # printf '%s\n' '{"_id":"1","price":1e+16,"text":"é"}' null '{"_id":"2","price":null,"text":"b"}' | sha256sum
        {"name": "memory", "rows": 3, "sha256": "8241c3cd638e6c90d215b58ecb38b35f25b4b6e4d0e38d6bcc97089e2df27f56"}
    ]


@pytest.mark.parametrize(
    "other",
    [
        ROWS[:-1],
        [*ROWS[:-1], ROWS[-2]],
        [*ROWS[:-1], {**ROWS[-1], "text": "other"}],
        [*ROWS[:-1], {**ROWS[-1], "year": str(ROWS[-1]["year"])}],
        [*ROWS[:-2], ROWS[-1], ROWS[-2]],
        [*ROWS, b"no row"],
    ],
)
def test_other_rows_have_another_identity(other: list) -> None:
    assert memory_corpus(other, fields=FIELDS).identity() != memory_corpus(ROWS, fields=FIELDS).identity()


def test_unused_columns_are_not_read() -> None:
    fields = FieldNames(keep=("year",))
    plain = [{"_id": "1", "text": "a", "year": 1}]
    for rows in (
        [{**plain[0], "image": b"\0", "vector": object()}],
        pd.DataFrame([{**plain[0], "image": b"\0", "vector": object()}]),
        pa.Table.from_pylist([{**plain[0], "image": b"\0"}]),
    ):
        corpus = memory_corpus(rows, fields=fields)
        assert rows_of(corpus) == rows_of(memory_corpus(plain, fields=fields))
        assert corpus.identity() == memory_corpus(plain, fields=fields).identity()


def test_columns_are_found_by_default_and_given_names() -> None:
    (row, _), *_ = memory_corpus(pd.DataFrame({"id": [7], "text": ["a"]}), fields=FieldNames()).rows()
    assert row.document == ("7", "a", '{"text":"a"}')
    fields = FieldNames(id="key", text="body", title="head")
    (row, _), *_ = memory_corpus([{"key": "k", "body": "b", "head": "h", "text": "t"}], fields=fields).rows()
    assert row.document == ("k", "h b", '{"title":"h","text":"b"}')
    rows = memory_corpus(pa.table({"text": ["a", "b"]}), fields=FieldNames(id=":row")).rows()
    assert [row.document.id for row, _ in rows] == ["0", "1"]


def test_a_kept_column_may_be_missing_from_some_rows() -> None:
    rows = [{"_id": "1", "text": "a"}, {"_id": "2", "text": "b", "year": None}]
    documents = [row.document for row, _ in memory_corpus(rows, fields=FieldNames(keep=("year",))).rows()]
    assert [document.fields for document in documents] == ['{"text":"a"}', '{"text":"b","year":null}']


def test_ids_of_an_object_column_keep_their_types() -> None:
    frame = pd.DataFrame({"_id": [7, "007", 2**70], "text": ["a", "b", "c"]}, dtype=object)
    assert [row.document.id for row, _ in memory_corpus(frame, fields=FieldNames()).rows()] == ["7", "007", str(2**70)]


def test_a_dataset_with_a_transform_gives_the_transformed_rows() -> None:
    dataset = datasets.Dataset.from_list([{"_id": "1", "raw": "a"}])
    transformed = dataset.with_transform(
        lambda batch: {"_id": batch["_id"], "text": [f"<{raw}>" for raw in batch["raw"]]}
    )
    assert [row.document.text for row, _ in memory_corpus(transformed, fields=FieldNames()).rows()] == ["<a>"]


# Bad rows


def test_a_bad_row_is_reported_with_its_position() -> None:
    rows = [
        {"_id": "1", "text": "a"},
        {"_id": "2"},
        {"_id": "3", "text": b"raw"},
        "a.jsonl",
        None,
        {"_id": "4", "text": ""},
    ]
    read = [row for row, _ in memory_corpus(rows, fields=FieldNames()).rows()]
    assert [row.place for row in read if row.document is None] == [f"memory: row {number}" for number in (2, 3, 4, 5)]
    assert [row.reason for row in read] == [
        None,
        'no column "text" for the text; the columns are "_id"; name another with --text-field',
        'column "text": JSON has no values of type bytes; convert it to a string or a number',
        'expected a mapping of columns to values, found a value of type str: "a.jsonl"',
        "expected a mapping of columns to values, found a value of type NoneType",
        None,
    ]


@pytest.mark.parametrize("kind", ["list", "pandas", "polars", "table", "Dataset"])
def test_without_the_text_column_every_row_is_bad(kind: str) -> None:
    rows = [{"_id": str(number), "body": "a"} for number in range(3)]
    corpus = memory_corpus(KINDS[kind](rows), fields=FieldNames())
    assert len(rows_of(corpus)) == 3
    assert {row.reason for row, _ in corpus.rows()} == {
        'no column "text" for the text; the columns are "_id", "body"; name another with --text-field'
    }


@pytest.mark.parametrize("text", [None, float("nan"), pd.NA])
def test_a_missing_text_or_title_is_read_as_null(text: object) -> None:
    for rows in ([{"_id": "1", "text": text}], pd.DataFrame({"_id": ["1"], "text": [text]})):
        assert reasons(rows) == ['the text in "text" is null; a string was expected']
    (row, _), *_ = memory_corpus([{"_id": "1", "title": text, "text": "a"}], fields=FieldNames()).rows()
    assert row.document.fields == '{"text":"a"}'


def test_a_column_with_a_duplicate_name_makes_bad_rows() -> None:
    for table in (
        pd.DataFrame([["1", "a", "b"]], columns=["_id", "text", "text"]),
        pa.table([["1"], ["a"], ["b"]], names=["_id", "text", "text"]),
    ):
        assert reasons(table) == ['2 columns are named "text"; expected one']


def test_bad_rows_have_the_hash_of_bad_rows_in_a_file(tmp_path: Path) -> None:
    rows = [{"_id": "1", "text": "a"}, {"_id": "2"}, {"_id": None, "text": "c"}, {"_id": "\ud800", "text": "\ud800"}]
    expected = open_corpus([str(json_lines(tmp_path, rows))], fields=FIELDS)
    corpus = memory_corpus(rows, fields=FIELDS)
    assert hash_of(corpus) == hash_of(expected)
    assert rows_of(corpus) == rows_of(expected)


def test_a_row_that_is_too_long_is_bad(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sparse_ingest.corpora.memory.MAX_LINE", 64)
    rows = [{"_id": "1", "text": "a"}, {"_id": "2", "text": "a" * 64}]
    assert reasons(rows) == [None, "the row has 86 bytes as JSON; expected less than 64"]


def test_an_exception_of_the_iterable_is_raised_unchanged() -> None:
    class OwnError(Exception):
        pass

    def rows_then(error: Exception) -> Iterator[dict]:
        yield {"_id": "1", "text": "a"}
        raise error

    schema = pa.schema({"_id": pa.string(), "text": pa.string()})
    for error in (OwnError("mine"), OSError("mine")):
        with pytest.raises(type(error), match="mine") as raised:
            memory_corpus(rows_then(error), fields=FIELDS)
        assert raised.value is error
        batches = (pa.RecordBatch.from_pylist([row], schema) for row in rows_then(error))
        with pytest.raises(type(error), match="mine"):
            memory_corpus(pa.RecordBatchReader.from_batches(schema, batches), fields=FIELDS)


# Which values are corpora


@pytest.mark.parametrize("wrap", [str, Path, lambda path: [str(path)], lambda path: (path,)])
def test_strings_and_paths_name_files(tmp_path: Path, wrap: Callable) -> None:
    path = json_lines(tmp_path, ROWS[:3])
    corpus = corpus_of(wrap(path), fields=FIELDS)
    assert corpus.identity() == [{"name": "rows.jsonl", "bytes": path.stat().st_size}]
    assert len(rows_of(corpus)) == 3


def test_format_and_columns_are_for_files_and_refused_for_rows(tmp_path: Path) -> None:
    path = tmp_path / "rows.txt"
    path.write_text("1,a\n")
    corpus = corpus_of(path, fields=FieldNames(), format="csv", columns=["_id", "text"])
    assert [row.document.id for row, _ in corpus.rows()] == ["1"]
    for options in ({"format": "jsonl"}, {"columns": ["_id", "text"]}):
        with pytest.raises(UsageError, match="for files"):
            corpus_of(ROWS, fields=FIELDS, **options)


@pytest.mark.parametrize(
    ("corpus", "found"),
    [
        ([], "empty list"),
        ((), "empty list"),
        (None, "NoneType"),
        (7, "int"),
        (b"rows.jsonl", "bytes"),
        ({"_id": "1", "text": "a"}, "a list of them"),
        (datasets.DatasetDict(train=datasets.Dataset.from_list(ROWS[:1])), "splits: train"),
        (pa.chunked_array([[1]]), "ChunkedArray"),
    ],
)
def test_a_value_that_is_not_a_corpus_is_refused(corpus: object, found: str) -> None:
    with pytest.raises(UsageError, match=found):
        corpus_of(corpus, fields=FIELDS)


@pytest.mark.parametrize("kind", ["pandas", "polars", "table", "Dataset"])
def test_a_container_without_rows_is_an_empty_corpus(kind: str) -> None:
    full = KINDS[kind](ROWS)
    corpus = memory_corpus(full.select([]) if kind == "Dataset" else full[:0], fields=FIELDS)
    assert corpus.identity() == memory_corpus(iter(()), fields=FIELDS).identity()
    assert rows_of(corpus) == []
