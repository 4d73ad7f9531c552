"""Fast JSON: orjson parses and writes exactly as Python's json module does."""

import json
from json.encoder import encode_basestring
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_ingest.corpora import documents
from sparse_ingest.corpora.collections import read_qrels, read_queries
from sparse_ingest.corpora.documents import BadRow, FieldNames, document_of, json_object, needed_columns
from sparse_ingest.corpora.files import open_corpus
from sparse_ingest.errors import CorpusError

numbers = st.one_of(
    st.integers(),
    st.integers(-(1 << 70), 1 << 70),
    st.sampled_from([(1 << 63) - 1, 1 << 63, (1 << 64) - 1, 1 << 64, -(1 << 63), -(1 << 63) - 1, 10**400]),
    st.floats(),
)
strings = st.text(st.characters(), max_size=8)  # includes lone surrogates
values = st.recursive(
    st.none() | st.booleans() | numbers | strings,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(strings, inner, max_size=3),
    max_leaves=6,
)
objects = st.builds(
    lambda value, ascii_only: json.dumps(value, ensure_ascii=ascii_only).encode("utf-8", "surrogatepass"),
    st.dictionaries(strings, values, max_size=3) | values,
    st.booleans(),
)
# Spellings that json.dumps never writes, and invalid JSON.
pieces = st.sampled_from(
    rb'{ } [ ] , : " \ a "a" "a":1 1 -0 -0.0 0.5e3 1e999 01 1. .5 NaN Infinity null true \n \u00e9 \ud800 \/ \x'.split()
    + [
        b"//",
        b" ",
        b"\t",
        b"\r\n",
        b"\0",
        b"\x1f",
        b"\x7f",
        b"\xff",
        b"\xed\xa0\x80",
        b"\xef\xbb\xbf",
        b"\x0b",
        b"9" * 30,
    ]
)
lines = st.one_of(
    objects,
    st.builds(lambda parts: b"".join(parts), st.lists(pieces, max_size=12)),
    st.builds(lambda parts: b'{"a": ' + b"".join(parts) + b"}", st.lists(pieces, max_size=4)),
    st.builds(
        lambda number: b'{"a": ' + number.encode() + b"}", st.from_regex(r"-?[0-9]{1,25}(\.[0-9]+)?", fullmatch=True)
    ),
)


def parsed(parse, raw: bytes) -> str:
    """Return the repr of the value, or the reason."""
    try:
        return repr(parse(raw))
    except BadRow as bad:
        return f"bad: {bad}"


@settings(max_examples=200)
@given(lines)
def test_any_line_is_parsed_as_by_the_json_module(raw: bytes) -> None:
    assert parsed(json_object, raw) == parsed(documents._json_object, raw)


@pytest.mark.parametrize(
    "line",
    [
        '{"a": 18446744073709551616, "b": [-9223372036854775809, {"c": 123456789012345678901234567890}]}',
        '{"a": 9223372036854775808.0, "b": 1e19, "c": 1E400, "d": 1e-400}',
        '{"a": 1, "b": 2, "a": 3}',
        '{"a": -0, "b": -0.0}',
        '{"a": "\\ud800"}',
        '{"a": NaN}',
        '{"a": ' + "9" * 5000 + "}",
    ],
)
def test_known_differences_of_parsers_are_parsed_as_by_the_json_module(line: str) -> None:
    assert parsed(json_object, line.encode()) == parsed(documents._json_object, line.encode())


@pytest.mark.parametrize("levels", [100, 980, 1020, 5000])
def test_deep_lines_are_bad_on_every_python(levels: int) -> None:
    """The json module reads 1,000 levels, from Python 3.14 on more."""
    line = '{"a": ' + "[" * levels + "]" * levels + "}"
    assert parsed(json_object, line.encode()) == "bad: nested more than 100 levels deep"


def test_every_character_is_written_as_by_the_json_module() -> None:
    for start in range(0, 0x110000, 64):
        text = "x" + "".join(chr(code) for code in range(start, start + 64) if not 0xD800 <= code < 0xE000)
        document = document_of({"_id": "1", "title": text, "text": text}, FieldNames(), 0)
        assert document.fields == f'{{"title":{encode_basestring(text)},"text":{encode_basestring(text)}}}'


# Columns


def test_needed_columns_are_in_the_order_of_the_table() -> None:
    names = ["vector", "title", "id", "year", "text", "_id"]
    found = needed_columns(names, FieldNames(keep=("year",)))
    assert list(found.items()) == [("title", "title"), ("year", "kept field"), ("text", "text"), ("_id", "id")]
    assert list(needed_columns(names, FieldNames(id=":row", text="year"))) == ["title", "year"]


def test_a_row_number_is_the_id_even_if_a_column_is_called_row() -> None:
    assert document_of({":row": "x", "text": "a"}, FieldNames(id=":row"), 7).id == "7"


@pytest.mark.parametrize("levels", [101, 300, 700, 960, 1_000, 2_000, 200_000])
@pytest.mark.parametrize(
    "one", [("[", "", "]"), ('{"a":', "1", "}"), ('[{"a":', "1", "}]")], ids=["lists", "objects", "both"]
)
def test_a_deeply_nested_row_is_a_bad_row_with_its_line(levels: int, one: tuple[str, str, str], tmp_path: Path) -> None:
    begin, inner, end = one
    deep = begin * levels + inner + end * levels
    file = tmp_path / "corpus.jsonl"
    file.write_text(f'{{"_id": "1", "text": "x"}}\n{{"_id": "2", "text": "x", "kept": {deep}}}\n')
    (_, bad) = (row for row, _ in open_corpus([str(file)], fields=FieldNames(keep=("kept",))).rows())
    assert bad.document is None and bad.place == "corpus.jsonl:2" and "nested" in (bad.reason or "")
    with pytest.raises(CorpusError, match="corpus.jsonl:2.*nested"):
        list(read_queries(file))
    file.write_text(f'{{"query-id": "1", "corpus-id": "1", "score": 1}}\n{{"query-id": {deep}}}\n')
    with pytest.raises(CorpusError, match="corpus.jsonl:2.*nested"):
        read_qrels(file)


@pytest.mark.parametrize("value", ["5", "null", "[]", "{}", "true", "1e400", "9" * 5_000], ids=lambda value: value[:9])
def test_values_of_a_wrong_type_are_errors_with_their_line(value: str, tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    for row, read in (
        (f'{{"_id": "1", "text": {value}}}', read_queries),
        (f'{{"query-id": {value if value != "5" else "null"}, "corpus-id": "1", "score": 1}}', read_qrels),
        (f'{{"query-id": "1", "corpus-id": "1", "score": {value if value != "5" else "0.5"}}}', read_qrels),
        (value, read_queries),
        (value, read_qrels),
    ):
        file.write_text(f"{row}\n")
        with pytest.raises(CorpusError, match="rows.jsonl:1"):
            list(read(file))
