"""csv and tsv: quotes, headers, columns, bad rows and bad files."""

import csv
import json
import re
from itertools import islice
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from support.forms import packed

from sparse_ingest.corpora.documents import FieldNames
from sparse_ingest.corpora.files import open_corpus
from sparse_ingest.corpora.sources import Corpus
from sparse_ingest.errors import CorpusError, UsageError
from sparse_ingest.records import SourceRow


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(packed(path.name, content.encode() if isinstance(content, str) else content))
    return path


def read(path: Path, *, format: str | None = None, columns: list[str] | None = None, quoting=None, **fields) -> list:
    corpus = open_corpus([str(path)], fields=FieldNames(**fields), format=format, columns=columns, quoting=quoting)
    return [row for row, _ in corpus.rows()]


def documents(path: Path, **options) -> list[tuple[str, str]]:
    rows = read(path, **options)
    assert [row.reason for row in rows] == [None] * len(rows)
    return [(row.document.id, row.document.text) for row in rows]


def test_quoted_values_may_contain_separators_line_breaks_and_doubled_quotes(tmp_path):
    path = write(tmp_path / "c.csv", 'id,text\r\n1,"a, ""b""\r\nc"\r\n"2",d"e\r\n')
    assert documents(path) == [("1", 'a, "b"\r\nc'), ("2", 'd"e')]


def test_a_row_is_reported_with_its_first_line(tmp_path):
    path = write(tmp_path / "c.csv", 'id,text\n1,"a\n\nb"\n\n2\n3,c\n')
    good, bad, last = read(path)
    assert (good.line, bad.line, last.line) == (2, 6, 7)
    assert bad.reason == 'the row has 1 column; expected 2: "id", "text"'


def test_a_value_that_looks_like_a_number_is_a_string(tmp_path):
    path = write(tmp_path / "c.csv", "id,text,year\n007,1.50,1e3\n")
    (row,) = read(path, keep=("year",))
    assert row.document == ("007", "1.50", '{"text":"1.50","year":"1e3"}')


def test_columns_are_the_names_of_a_file_without_a_header(tmp_path):
    path = write(tmp_path / "c.csv.zst", "1,x,a\n2,y,b\n")
    assert documents(path, columns=["id", "z", "text"]) == [("1", "a"), ("2", "b")]


def test_a_byte_order_mark_is_not_part_of_the_first_name(tmp_path):
    assert documents(write(tmp_path / "c.csv", b'\xef\xbb\xbf"id",text\n1,a\n')) == [("1", "a")]


def test_an_empty_file_and_one_of_only_a_header_have_no_rows(tmp_path):
    assert documents(write(tmp_path / "a.csv", "id,text\n")) == documents(write(tmp_path / "b.csv", "\n")) == []


def test_collection_tsv_is_read_as_ms_marco_without_quoting(tmp_path):
    for name in ("collection.tsv", "Collection.tsv.gz"):
        path = write(tmp_path / name, '0\t"a" b\n1\t"c\r\n\n2\td "" e')
        assert documents(path) == [("0", '"a" b'), ("1", '"c'), ("2", 'd "" e')]


def test_format_msmarco_accepts_other_columns(tmp_path):
    path = write(tmp_path / "docs.tsv", 'D1\thttps://a\tT"\tx\n')
    assert documents(path, format="msmarco", columns=["_id", "url", "title", "text"]) == [("D1", 'T" x')]


def test_columns_are_only_for_text_tables_and_must_be_unique(tmp_path):
    path = write(tmp_path / "c.jsonl", "{}\n")
    with pytest.raises(UsageError, match=r"--columns is for csv, tsv, msmarco; .* is jsonl\. Omit"):
        read(path, columns=["a"])
    for columns in (["a", ""], ["a", "a"]):
        with pytest.raises(UsageError, match="an empty or a duplicate name"):
            read(path, columns=columns)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (b"2", 'the row has 1 column; expected 2: "id", "text"'),
        (b"2,a,b", "the row has 3 columns; expected 2"),
        (b'2,"a" b', "something follows a closing quote; double a quote within a value"),
        (b'2,"a\n"3"', "double a quote within a value (the row ends in line 4)"),
        (b"2,a\rb", "a carriage return is outside quotes"),
        (b"2,a\0", "the row has a NUL byte"),
        (b"2,caf\xe9", "not UTF-8: byte 0xe9 at byte 6 of the line"),
        (b'2,"a\ncaf\xe9"', "not UTF-8: byte 0xe9 at byte 4 of the line"),
        (b",a", 'the id in "id" is ""; expected a non-empty string'),
    ],
)
def test_a_bad_row_has_a_reason_and_other_rows_are_read(tmp_path, row, reason):
    before, bad, after = read(write(tmp_path / "c.csv", b"id,text\n1,a\n" + row + b"\n3,c\n"))
    assert (before.document.id, after.document.id) == ("1", "3")
    assert (bad.line, bad.document) == (3, None) and reason in bad.reason


def test_an_unclosed_quote_is_an_error_of_the_file(tmp_path):
    path = write(tmp_path / "c.tsv", 'id\ttext\n1\ta\n2\t"b\n' + "3\tc\n" * 5)
    with pytest.raises(CorpusError) as error:
        read(path)
    assert str(error.value) == (
        "c.tsv:3: a quote opens in this row and is not closed in the 6 lines up to the end. "
        "Close or double it, or pass --quoting none if quotes have no meaning in this file."
    )


def test_a_value_above_the_limit_is_an_error_of_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr("sparse_ingest.corpora.text_formats._MAX_VALUE", 1000)
    with pytest.raises(CorpusError, match="c.csv:2: a value is longer than 1,000 characters; is a quote not"):
        read(write(tmp_path / "c.csv", 'id,text\n1,"a\n' + "2,b\n" * 400))


@pytest.mark.parametrize(
    ("header", "reason"),
    [
        (b"id,te\xe9xt\n", "not UTF-8: byte 0xe9"),
        ("id,text\n".encode("utf-16"), "not UTF-8: byte 0xff at byte 1"),
        (b'id,"text" x\n', "something follows a closing quote"),
    ],
)
def test_a_bad_header_is_an_error(tmp_path, header, reason):
    with pytest.raises(CorpusError, match=rf"c.csv:1: the header cannot be read: {reason}.*--columns"):
        read(write(tmp_path / "c.csv", header + b"1,a\n"))


def test_a_repeated_column_is_an_error_if_it_is_read(tmp_path):
    path = write(tmp_path / "c.csv", "id,text,note,note,,\n1,a,b,c,,\n")
    assert documents(path) == [("1", "a")]
    with pytest.raises(CorpusError, match=re.escape('c.csv:1: 2 columns are named "note"; expected one')):
        read(path, keep=("note",))


@pytest.mark.parametrize(
    ("name", "header", "advice"),
    [
        ("c.csv", "id;text", 'if "id;text" is several columns, convert the file: csv has "," between them'),
        ("c.csv", "sep=;", 'if "sep=;" is several columns, convert the file: csv has "," between them'),
        ("c.csv", "id\ttext", r'if "id\ttext" is several columns, convert the file: csv has "," between them'),
        ("c.tsv", "id,text", r'if "id,text" is several columns, convert the file: tsv has "\t" between them'),
        ("c.csv", "id", ""),
    ],
)
def test_a_header_with_another_separator_is_an_error_with_advice(tmp_path, name, header, advice):
    with pytest.raises(CorpusError) as raised:
        read(write(tmp_path / name, f"{header}\n"))
    message = str(raised.value)
    assert message.startswith(f"{name}:1: no column") and message.endswith(advice or "--text-field")


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({}, 'no column "text" for the text; the columns are "id", "body"; name another with --text-field'),
        ({"text": "body", "id": "docno"}, 'no column "docno" for the id'),
        ({"text": "body", "title": "head"}, 'no column "head" for the title'),
        ({"text": "body", "keep": ("year",)}, 'no column "year" to keep; the columns are "id", "body"'),
    ],
)
def test_a_missing_column_is_an_error_that_lists_the_others(tmp_path, fields, reason):
    with pytest.raises(CorpusError) as error:
        read(write(tmp_path / "c.csv", "id,body\n1,a\n"), **fields)
    assert str(error.value).startswith(f"c.csv:1: {reason}")


# Lone quotes

LONE = 'id\ttext\n1\tone\n2\t"lone quote\n3\tthree\n4\tbye"\n5\tfive\n6\t"a\tb\nc"\n'


@pytest.mark.parametrize("name", ["c.tsv", "c.csv", "c.tsv.gz"])
def test_rows_that_lone_quotes_may_have_merged_are_reported_once(tmp_path, name):
    content = LONE.replace("\t", ",") if "csv" in name else LONE
    corpus = open_corpus([str(write(tmp_path / name, content))], fields=FieldNames())
    assert corpus.merged() == []
    for _ in range(2):
        assert [row.document.id for row, _ in corpus.rows()] == ["1", "2", "5", "6"]
        assert corpus.merged() == [
            f"{name}:3: a quoted value spans 3 lines and contains the separator (the first of 2 such rows; the "
            "longest spans 3 lines). If quotes have no meaning in this file, rows were merged into one document: "
            "read it again with --quoting none."
        ]
    assert "quoting" not in corpus.identity()[0]


def test_rows_of_large_files_that_look_merged_are_counted_once(tmp_path):
    values = ["a,\n" + "b\n" * (n % 7) if n % 3 else "a\nb" for n in range(10_000)]
    rows = [f'{n},"{value}"\n' for n, value in enumerate(values)]
    corpus = open_corpus([str(write(tmp_path / "c.csv", f"id,text\n{''.join(rows)}"))], fields=FieldNames())
    assert len(list(islice(corpus.rows(), 2))) == 2
    assert "the first of" not in corpus.merged()[0]  # one row that was read
    for _ in range(2):
        assert len(list(corpus.rows())) == 10_000
        (message,) = corpus.merged()
        assert message.startswith("c.csv:4: a quoted value spans 3 lines and contains the separator")
        assert "(the first of 6,666 such rows; the longest spans 8 lines)" in message


def test_quotes_that_merge_nothing_are_not_reported(tmp_path):
    path = write(tmp_path / "c.csv", 'id,text\n1,"a\nb"\n2,"a, b"\n3,5" x\n')
    corpus = open_corpus([str(path)], fields=FieldNames())
    assert len(list(corpus.rows())) == 3 and corpus.merged() == []


@pytest.mark.parametrize(("name", "columns"), [("c.tsv", None), ("c.csv", None), ("c.tsv", ["id", "text"])])
def test_with_quoting_none_every_line_is_a_row(tmp_path, name, columns):
    content = LONE.replace("a\tb", "a b").partition("\n")[2] if columns else LONE.replace("a\tb", "a b")
    path = write(tmp_path / name, content.replace("\t", ",") if name == "c.csv" else content)
    *rows, last = read(path, quoting="none", columns=columns)
    assert [(row.document.id, row.document.text) for row in rows[:5]] == [
        ("1", "one"), ("2", '"lone quote'), ("3", "three"), ("4", 'bye"'), ("5", "five"),
    ]  # fmt: skip
    assert last.reason.startswith("the row has 1 column; expected 2")
    corpus = open_corpus([str(path)], fields=FieldNames(), columns=columns, quoting="none")
    assert corpus.identity()[0]["quoting"] == "none"
    positions = [position for _, position in corpus.rows()]
    assert [row.row for row, _ in corpus.rows(positions[3])] == [4, 5, 6]


@pytest.mark.parametrize("name", ["c.jsonl", "c.parquet", "collection.tsv"])
def test_quoting_is_refused_for_formats_without_quotes(tmp_path, name):
    with pytest.raises(UsageError, match="--quoting none is for csv and tsv; .* Omit --quoting"):
        read(write(tmp_path / name, ""), quoting="none")


def test_a_bad_row_of_merged_lines_is_reported_with_its_last_line(tmp_path):
    _, bad = read(write(tmp_path / "c.csv", 'id,text\n1,a\n2,"b\n3,c",d\n'))
    assert bad.reason.endswith("(the row ends in line 4; pass --quoting none if quotes have no meaning in this file)")


# Parts of rows: the values of a file, and what is between them, in any order.
PARTS = st.sampled_from(
    '" "" , \t \r a é, 1,x\n \0 \udcff'.split(" ") + ["\n", "\r\n", '"b,\n""c"', '2,"y"\r\n', '"3\n4",z\n', '"",""\n']
)


def table_of(folder: Path, rows: str, separator: str, columns: int, quoting: str | None = None) -> Corpus:
    path = folder / ("any.csv" if separator == "," else "any.tsv")
    names = ["text", "b", "c"][:columns]
    path.write_bytes(f"{separator.join(names)}\n{rows}".encode(errors="surrogateescape"))
    return open_corpus([str(path)], fields=FieldNames(id=":row", keep=tuple(names[1:])), quoting=quoting)


def values_of(row: SourceRow) -> list[str] | None:
    return row.document and list(json.loads(row.document.fields).values())


# Rows are read from a buffer of 256 KB: with `before` bytes it ends within them. With `after` bytes it is large enough
# for numpy.
@given(
    st.lists(PARTS, max_size=40).map("".join),
    st.just(0) | st.integers((1 << 18) - 60, 1 << 18),
    st.sampled_from([0, 1 << 15]),
    st.sampled_from(",\t"),
    st.integers(1, 3),
)
@example('1,a\n2,"b"\n3,""\n4,""""\n"5\n","c,\n""d"\r\n,\n', 0, 1 << 15, ",", 2)
@example("1,a\n2,b\r\n3,c\rd\n4,d\r\r\n5,e\n", 0, 1 << 15, ",", 2)
@example('1,a\n\n2,b\n3,c,d\n4,"e"f\n5,g"h\n6,i', 0, 1 << 15, ",", 2)
@example('1,a\n2"b,"c\nd",e"f\n3,g\n', 0, 1 << 15, ",", 2)  # with as many quotes in each line as regular rows have
@example('"a"\n\n""\n"b\n\n"\n', 0, 1 << 15, ",", 1)
def test_any_rows_are_those_of_the_csv_module(tmp_path_factory, rows, before, after, separator, columns):
    rows = f"{'x' * before}{',x' * (columns - 1)}\n{rows}" if before else rows
    rows = f"{rows}\n{'x' * after}{',x' * (columns - 1)}\n" if after else rows
    rows = rows.replace(",", separator)
    corpus = table_of(tmp_path_factory.getbasetemp(), rows, separator, columns)
    reader = csv.reader(re.findall(r"[^\n]*\n|[^\n]+", rows), delimiter=separator, strict=True)
    expected: list[tuple[int, list[str] | None]] = []
    while True:
        line = reader.line_num + 2
        try:
            values = next(reader, None)
        except csv.Error as error:
            if "unexpected end" in str(error):
                with pytest.raises(CorpusError, match="a quote opens in this row and is not closed"):
                    list(corpus.rows())
                return
            values = ["\0"]
        if values is None:
            break
        if values not in ([], [""]):
            is_good = len(values) == columns and not re.search("[\0\udcff]", "".join(values))
            expected.append((line, values if is_good else None))
    found = list(corpus.rows())
    assert [(row.line, values_of(row)) for row, _ in found] == expected
    if found:
        place = len(found) // 2
        assert list(corpus.rows(found[place][1])) == found[place + 1 :]


@settings(max_examples=50)
@given(st.lists(PARTS, max_size=40).map("".join), st.sampled_from(",\t"))
def test_with_quoting_none_any_line_is_split_at_its_separators(tmp_path_factory, rows, separator):
    found = table_of(tmp_path_factory.getbasetemp(), rows, separator, 2, "none").rows()
    lines = [line.removesuffix("\r").split(separator) for line in rows.split("\n")]
    assert [(row.line, values_of(row)) for row, _ in found] == [
        (number, values if len(values) == 2 and not re.search("[\0\udcff]", "".join(values)) else None)
        for number, values in enumerate(lines, 2)
        if values != [""]
    ]


def test_rows_are_split_into_the_same_values_at_every_size_of_a_file(tmp_path):
    row = 'value "{}", of\n{} lines é'
    values = [(str(n), row.format(n, "\n" * (n % 50))) for n in range(10_000)]
    path = tmp_path / "large.csv"
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([("id", "text"), *values])
    assert documents(path) == values
    tsv = write(tmp_path / "plain.tsv", "".join(f'{n}\t"{n}\r\n' for n in range(40_000)))
    assert documents(tsv, quoting="none", columns=["id", "text"]) == [(str(n), f'"{n}') for n in range(40_000)]
