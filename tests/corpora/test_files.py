"""Corpora in files: file selection, rows, reasons for bad rows, and resuming at any row."""

import bz2
import gzip
import io
import json
import lzma
import os
import re
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_ingest.corpora.documents import FieldNames
from sparse_ingest.corpora.files import open_corpus
from sparse_ingest.corpora.memory import corpus_of
from sparse_ingest.corpora.sources import START, Cursor, Position, bad_document
from sparse_ingest.errors import CorpusError, UsageError
from sparse_ingest.records import Document

SHARED = Path(__file__).parents[2].parent / "shared" / "data"
in_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="shared/data does not exist")

# Every character except lone surrogates, which UTF-8 cannot encode.
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
ids = texts.filter(lambda text: 0 < len(text.encode()) <= 512)


def write(path: Path, *lines: object) -> Path:
    """Write lines: bytes unchanged, other values as JSON."""
    content = b"".join(line if isinstance(line, bytes) else json.dumps(line).encode() + b"\n" for line in lines)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def read(*specs: Path | str, start: Position = START, format: str | None = None, **fields):
    corpus = open_corpus([str(spec) for spec in specs], fields=FieldNames(**fields), format=format)
    return [source for source, _ in corpus.rows(start)]


def documents(*specs: Path | str, **options) -> list[Document]:
    rows = read(*specs, **options)
    assert [row.reason for row in rows] == [None] * len(rows)
    return [row.document for row in rows]


def names(*specs: Path | str, **options) -> list[str]:
    return [source.name for source in open_corpus([str(s) for s in specs], fields=FieldNames(), **options).sources]


def doc(doc_id: str = "a", text: str = "t", **columns) -> dict[str, object]:
    return {"_id": doc_id, "text": text, **columns}


# Rows to documents


def test_title_and_text_are_joined_by_a_space_and_empty_parts_are_omitted(tmp_path):
    path = write(
        tmp_path / "c.jsonl",
        doc("1", "b", title="a"),
        doc("2", "b", title=""),
        doc("3", "", title="a"),
        doc("4", " b ", title=" a"),
        doc("5", "b", title=None),
        doc("6", "b"),
        doc("7", ""),
    )
    assert [d.text for d in documents(path)] == ["a b", "b", "a", " a  b ", "b", "b", ""]


def test_fields_contain_title_text_and_kept_columns_in_that_order(tmp_path):
    columns = {"year": 1, "tags": ["é", None, {"a": 1.5}], "text": 'b "q"\n', "_id": "1", "title": "a"}
    path = write(tmp_path / "c.jsonl", columns)
    (document,) = documents(path, keep=("tags", "year"))
    assert document.fields == '{"title":"a","text":"b \\"q\\"\\n","tags":["é",null,{"a":1.5}],"year":1}'


def test_without_text_only_kept_columns_are_in_the_fields(tmp_path):
    path = write(tmp_path / "c.jsonl", doc(title="x", year=1))
    assert documents(path, carry_text=False)[0].fields == "{}"
    assert documents(path, carry_text=False, keep=("year", "title"))[0].fields == '{"year":1,"title":"x"}'
    assert documents(path, carry_text=False)[0].text == "x t"


def test_an_empty_title_is_not_in_the_fields(tmp_path):
    assert documents(write(tmp_path / "c.jsonl", doc(title="")))[0].fields == '{"text":"t"}'


def test_a_missing_kept_column_is_omitted_and_null_is_kept(tmp_path):
    path = write(tmp_path / "c.jsonl", doc("1"), doc("2", year=None))
    assert [d.fields for d in documents(path, keep=("year",))] == ['{"text":"t"}', '{"text":"t","year":null}']


def test_keeping_title_or_text_explicitly_changes_nothing(tmp_path):
    path = write(tmp_path / "c.jsonl", doc(title="x", a=1))
    assert documents(path, keep=("a", "text", "a", "title"))[0].fields == '{"title":"x","text":"t","a":1}'


def test_keeping_text_if_another_column_is_the_text_is_a_usage_error(tmp_path):
    path = write(tmp_path / "c.jsonl", doc())
    with pytest.raises(UsageError, match='--keep text: the text is read from "body"'):
        open_corpus([str(path)], fields=FieldNames(text="body", keep=("text",)))


@pytest.mark.parametrize("name", ["_id", "_source", "", "a..b", ".x", "a. .b", "x" * 50_001])
def test_a_kept_name_that_opensearch_refuses_is_a_usage_error(tmp_path, name):
    fields = FieldNames(keep=("fine", name))
    for corpus in ([str(write(tmp_path / "c.jsonl", doc()))], [{"id": "1", "text": "a", name: 1}]):
        with pytest.raises(UsageError, match="clusters refuse documents with a field"):
            corpus_of(corpus, fields=fields)
    for allowed in ("y.", " ", "_foo", "a b", "a.b", "sparse"):
        assert documents(tmp_path / "c.jsonl", keep=(allowed,))


def test_an_id_is_a_string_or_integer_and_underscore_id_has_priority(tmp_path):
    both = {"id": "y", "_id": -3, "text": ""}
    path = write(tmp_path / "c.jsonl", doc("x"), {"id": 12, "text": ""}, both, doc("é" * 256))
    assert [d.id for d in documents(path)] == ["x", "12", "-3", "é" * 256]


def test_named_columns_are_used(tmp_path):
    path = write(tmp_path / "c.jsonl", {"_id": 1, "docno": "d", "body": "b", "head": "h", "text": 0})
    assert documents(path, id="docno", text="body", title="head") == [Document("d", "h b", '{"title":"h","text":"b"}')]


def test_row_numbers_as_ids_count_all_files_and_bad_rows(tmp_path):
    one = write(tmp_path / "1.jsonl", {"text": "a"}, b"\n", b"{\n", {"text": "b"})
    two = write(tmp_path / "2.jsonl", {"text": "c"})
    rows = read(one, two, id=":row")
    assert [row.document and row.document.id for row in rows] == ["0", None, "2", "3"]
    assert [(row.row, row.file, row.line) for row in rows] == [
        (0, "1.jsonl", 1),
        (1, "1.jsonl", 3),
        (2, "1.jsonl", 4),
        (3, "2.jsonl", 1),
    ]


# Lines


def test_blank_lines_count_as_lines_and_not_as_rows(tmp_path):
    path = write(tmp_path / "c.jsonl", b"\n \t\r\n", doc("1"), b"\r\n", doc("2"), b"\n\n")
    assert [(row.row, row.line) for row in read(path)] == [(0, 3), (1, 5)]


def test_crlf_and_a_last_line_without_newline_are_accepted(tmp_path):
    path = write(tmp_path / "c.jsonl", b'{"_id":"1","text":"a"}\r\n{"_id":"2","text":"b"}')
    assert [d.text for d in documents(path)] == ["a", "b"]


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz"])
def test_a_byte_order_mark_at_the_start_of_a_file_is_dropped(tmp_path, suffix):
    one = write(tmp_path / f"1{suffix}", b"\xef\xbb\xbf", doc("1"))
    two = write(tmp_path / f"2{suffix}", b"\xef\xbb\xbf\n", doc("2"))
    assert [d.id for d in documents(one, two)] == ["1", "2"]


def test_a_very_long_line_is_one_document(tmp_path):
    assert len(documents(write(tmp_path / "c.jsonl", doc(text="ab " * 2_000_000), doc("2")))[0].text) == 6_000_000


def test_an_empty_file_has_no_rows(tmp_path):
    assert read(write(tmp_path / "a.jsonl"), write(tmp_path / "b.jsonl.gz")) == []


# Bad rows: file, line and reason

BAD_LINES = {
    "broken JSON": (b' {"_id": "1", "text": }', "broken JSON at column 23: Expecting value"),
    "cut off": (b'{"_id": "1", "text": "a', "broken JSON at column 22: Unterminated string"),
    "two values": (b'{"_id": "1", "text": "a"} {}', 'broken JSON: something follows the first value, "{}"'),
    "NaN": (b'{"_id": "1", "text": "a", "x": NaN}', "broken JSON: NaN is not JSON"),
    "Infinity": (b'{"_id": "1", "text": "a", "x": -Infinity}', "broken JSON: -Infinity is not JSON"),
    "huge integer": (b'{"_id": ' + b"9" * 5000 + b"}", "broken JSON: Exceeds the limit (4300 digits)"),
    "deep nesting": (b'{"_id": ' + b"[" * 100_000, "nested more than 100 levels deep"),
    "not UTF-8": (b'{"_id": "1", "text": "\xff"}', "not UTF-8: byte 0xff at byte 23 of the line"),
    "encoded surrogate": (b'{"_id": "1", "text": "\xed\xa0\x80"}', "not UTF-8: byte 0xed"),
    "array": (b'["a"]', 'expected a JSON object, found ["a"]'),
    "string": (b'"a"', 'expected a JSON object, found "a"'),
    "no id": (
        b'{"docid": 1, "text": "a"}',
        'no column "_id" or "id"; the columns are "docid", "text"; name another with --id-field',
    ),
    "no columns": (b"{}", "the row has no columns"),
    "null id": (b'{"_id": null, "id": "1"}', 'the id in "_id" is null; expected a non-empty string or an integer'),
    "empty id": (b'{"_id": "", "text": "a"}', 'the id in "_id" is ""'),
    "float id": (b'{"_id": 1.0, "text": "a"}', 'the id in "_id" is 1.0'),
    "bool id": (b'{"id": true, "text": "a"}', 'the id in "id" is true'),
    "long id": (b'{"_id": "' + b"x" * 513 + b'", "text": "a"}', "x… has 513 bytes; expected at most 512"),
    "long number as id": (b'{"_id": ' + b"1" * 513 + b', "text": "a"}', "has 513 bytes"),
    "long id in UTF-8": (('{"_id": "' + "é" * 257 + '", "text": "a"}').encode(), "has 514 bytes"),
    "no text": (
        b'{"_id": "1", "contents": "a"}',
        'no column "text" for the text; the columns are "_id", "contents"; name another with --text-field',
    ),
    "null text": (b'{"_id": "1", "text": null}', 'the text in "text" is null; a string was expected'),
    "number as text": (b'{"_id": "1", "text": 5}', 'the text in "text" is 5; a string was expected'),
    "number as title": (b'{"_id": "1", "text": "a", "title": 5}', 'the title in "title" is 5; a string was expected'),
    "surrogate in id": (b'{"_id": "\\ud800", "text": "a"}', "half of a surrogate pair"),
    "surrogate in text": (b'{"_id": "1", "text": "a\\udfff"}', "the title or text has \\udfff, half of a"),
    "surrogate in title": (b'{"_id": "1", "text": "a", "title": "\\ud8ab"}', "the title or text has \\ud8ab"),
    "surrogate in a kept field": (
        b'{"_id": "1", "text": "a", "kept": ["\\ud800"]}',
        'the kept field "kept" has \\ud800',
    ),
    "kept number beyond float64": (
        b'{"_id": "1", "text": "a", "kept": 1e999}',
        'the kept field "kept" cannot be written as JSON again: Infinity',
    ),
    "kept lists in lists": (
        b'{"_id": "1", "text": "a", "kept": [0, %b]}' % (b"[" * 20 + b"]" * 20),
        'the kept field "kept" has lists in more than 20 levels',
    ),
}


@pytest.mark.parametrize("name", BAD_LINES)
def test_a_bad_line_has_a_reason_and_other_rows_are_read(tmp_path, name):
    line, reason = BAD_LINES[name]
    path = write(tmp_path / "c.jsonl", doc("before"), line + b"\n", doc("after"))
    before, bad, after = read(path, keep=("kept",))
    assert (before.document.id, after.document.id) == ("before", "after")
    assert (bad.row, bad.file, bad.line, bad.document) == (1, path.name, 2, None)
    assert reason in bad.reason
    assert "\n" not in bad.reason and len(bad.reason.encode()) < 300
    advice = "Fix the corpus, or pass --on-bad-document skip."
    assert str(bad_document(bad)) == f"{path.name}:2: {bad.reason}. {advice}"


@pytest.mark.parametrize(("option", "what"), [("id", "id"), ("text", "text"), ("title", "title")])
def test_a_missing_named_column_lists_the_others(tmp_path, option, what):
    (bad,) = read(write(tmp_path / "c.jsonl", doc(title="x")), **{option: "nope"})
    assert bad.reason == f'no column "nope" for the {what}; the columns are "_id", "text", "title"'


def test_a_named_title_of_null_is_an_empty_title(tmp_path):
    assert documents(write(tmp_path / "c.jsonl", doc(head=None)), title="head")[0].text == "t"


def test_lone_surrogates_in_unused_columns_are_ignored(tmp_path):
    assert documents(write(tmp_path / "c.jsonl", b'{"_id": "1", "text": "a", "\\ud800": "\\ud800"}'))[0].id == "1"


def test_column_names_in_a_reason_are_escaped_and_shortened(tmp_path):
    (bad,) = read(write(tmp_path / "c.jsonl", b'{"\\ud800\\n": 1}'))
    assert '"\\ud800\\n"' in bad.reason
    (bad,) = read(write(tmp_path / "c.jsonl", {f"c{i}": i for i in range(1000)}))
    assert "and 940 more" in bad.reason


# Which files


def test_a_folder_gives_its_files_in_byte_order_without_hidden_ones(tmp_path):
    for name in ["b.jsonl", "B.jsonl", "a10.jsonl.gz", "a9.ndjson", "é.jsonl", "z.JSONL"]:
        write(tmp_path / name, doc(name))
    write(tmp_path / ".hidden", b"x")
    assert names(tmp_path) == ["B.jsonl", "a10.jsonl.gz", "a9.ndjson", "b.jsonl", "z.JSONL", "é.jsonl"]
    assert [d.id for d in documents(tmp_path)] == names(tmp_path)


def test_a_glob_gives_its_files_in_byte_order(tmp_path):
    for name in ["y/b.jsonl", "x/c.jsonl", "x/.h.jsonl", "x/a.txt"]:
        write(tmp_path / name, doc(name))
    assert names(tmp_path / "*" / "*.jsonl") == ["c.jsonl", "b.jsonl"]
    assert names(tmp_path / "**" / "*.jsonl") == ["c.jsonl", "b.jsonl"]


def test_an_existing_file_has_priority_over_a_glob(tmp_path):
    write(tmp_path / "a.jsonl")
    assert names(write(tmp_path / "[a].jsonl")) == ["[a].jsonl"]


def test_files_are_read_in_the_given_order(tmp_path):
    assert names(write(tmp_path / "b.jsonl"), write(tmp_path / "a.jsonl")) == ["b.jsonl", "a.jsonl"]


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_a_beir_folder_gives_its_corpus_file(tmp_path, suffix):
    write(tmp_path / f"corpus.jsonl{suffix}", doc())
    write(tmp_path / "queries.jsonl", doc())
    write(tmp_path / "qrels" / "test.tsv")
    assert names(tmp_path) == [f"corpus.jsonl{suffix}"]


def test_an_mteb_folder_gives_the_files_in_its_corpus_folder(tmp_path):
    for name in ("corpus/b.jsonl", "corpus/a.jsonl", "corpus/.hidden", "queries/q.jsonl", "README.md"):
        write(tmp_path / name, doc(name))
    assert names(tmp_path) == ["a.jsonl", "b.jsonl"]
    write(tmp_path / "corpus.jsonl", doc())
    with pytest.raises(CorpusError, match="has both corpus.jsonl and corpus"):
        names(tmp_path)


def test_a_beir_folder_with_two_corpora_is_refused(tmp_path):
    write(tmp_path / "corpus.jsonl")
    write(tmp_path / "corpus.jsonl.gz")
    with pytest.raises(CorpusError, match="has both corpus.jsonl and corpus.jsonl.gz"):
        names(tmp_path)


def test_the_identity_lists_names_and_sizes_in_order(tmp_path):
    one, two = write(tmp_path / "b.jsonl", doc()), write(tmp_path / "a.jsonl.gz", doc())
    corpus = open_corpus([str(one), str(two)], fields=FieldNames())
    assert corpus.identity() == [
        {"name": "b.jsonl", "bytes": one.stat().st_size},
        {"name": "a.jsonl.gz", "bytes": two.stat().st_size},
    ]


def test_rows_of_files_with_the_same_name_have_their_paths(tmp_path):
    paths = [write(tmp_path / folder / "c.jsonl", doc(folder)) for folder in ("x", "y")]
    assert [row.file for row in read(*paths)] == [str(path) for path in paths]


def test_an_explicit_format_overrides_suffixes(tmp_path):
    write(tmp_path / "a.json", doc("1"))
    write(tmp_path / "b.json.gz", doc("2"))
    assert [d.id for d in documents(tmp_path, format="jsonl")] == ["1", "2"]


@pytest.mark.parametrize("spec", ["", "*"])
def test_marker_files_and_documentation_in_a_folder_are_skipped(tmp_path, spec):
    data = [write(tmp_path / f"part-{number}.jsonl", doc(f"d{number}")) for number in range(5)]
    marks = ("_SUCCESS", "_committed_1", "._SUCCESS.crc", "part-0.jsonl.crc", ".gitattributes")
    for name in marks:
        write(tmp_path / name)
    assert (names(tmp_path / spec), notes(tmp_path / spec)) == ([path.name for path in data], [])
    for name in ("README.md", "LICENSE", "_more.jsonl"):
        write(tmp_path / name, doc(name))
    assert names(tmp_path / spec) == [path.name for path in data]
    assert notes(tmp_path / spec) == [
        "Skipped: LICENSE, README.md, _more.jsonl. Read: part-0.jsonl, part-1.jsonl, part-2.jsonl and 2 more. To read "
        "a skipped file, name it."
    ]
    assert names(tmp_path / "_more.jsonl") == names(tmp_path / "_*.jsonl") == ["_more.jsonl"]


@pytest.mark.parametrize("glob", ["", "**/*.jsonl"])
def test_a_delta_lake_table_is_read_with_a_note(tmp_path, glob):
    for name in ("part-0.jsonl", "_delta_log/0.jsonl"):
        write(tmp_path / name, doc())
    assert names(tmp_path / glob) == ["part-0.jsonl"]
    note = notes(tmp_path / glob)[-1]
    assert note.startswith(f"{tmp_path} is a Delta Lake table: rows that were changed or deleted are read too")


def test_folders_of_markers_are_skipped_by_a_glob_that_does_not_name_them(tmp_path):
    for name in ("_data/a.jsonl", "_data/_temporary/0/b.jsonl"):
        write(tmp_path / name, doc(name))
    assert names(tmp_path / "_data/**/*.jsonl") == ["a.jsonl"]
    assert names(tmp_path / "_data/_temporary/**/*.jsonl") == ["b.jsonl"]


def test_a_folder_of_only_underscore_names_is_read(tmp_path):
    write(tmp_path / "_a.jsonl", doc())
    assert (names(tmp_path), notes(tmp_path)) == (["_a.jsonl"], [])


def notes(spec) -> list[str]:
    return list(open_corpus([str(spec)], fields=FieldNames()).notes)


ARCHIVES = {
    "c.jsonl.bz2": bz2.compress(b"{}\n"),
    "c.jsonl.xz": lzma.compress(b"{}\n"),
    "c.zip": b"PK\x05\x06" + bytes(18),
    "c.7z": b"7z\xbc\xaf\x27\x1c\x00\x04",
    "c.tar.gz": gzip.compress(bytes(1024)),
}


@pytest.mark.parametrize("name", ARCHIVES)
def test_archives_are_refused_with_advice_to_unpack_them(tmp_path, name):
    path = write(tmp_path / name, ARCHIVES[name])
    for spec in (path, tmp_path):
        with pytest.raises(CorpusError, match=rf"{name}\" is not read: it is .* Unpack it") as raised:
            names(spec)
        assert "--format" not in str(raised.value)
    write(tmp_path / "a.jsonl", doc())
    with pytest.raises(CorpusError, match=rf"{name}\" is not read: .*[Nn]ame the files to read.*/\*\.jsonl\."):
        names(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "advice"),
    [
        ("c.txt", b"hello", "Pass --format."),
        ("c.bin", bytes(range(256)), "It is neither text, Parquet nor Arrow: omit it."),
        ("c.bin", gzip.compress(b"{}", mtime=0), "It is gzip. Rename it to end in .gz after the suffix of its format"),
        ("c.bin", b"PAR1\x15\x04\x15PAR1", "It is Parquet. Pass --format parquet, or rename it to end in .parquet."),
        ("c.xlsx", b"PK\x03\x04" + bytes(26), "which is not a corpus format. Export it as csv."),
        ("_SUCCESS", b"", "It is empty: omit it."),
        ("LICENSE", b"MIT", "It seems to be documentation: omit it."),
    ],
)
def test_the_advice_for_an_unknown_name_depends_on_the_content(tmp_path, name, content, advice):
    with pytest.raises(CorpusError, match=re.escape(advice)):
        names(write(tmp_path / name, content))


def test_an_unknown_suffix_is_an_error_that_lists_the_known_ones(tmp_path):
    write(tmp_path / "a.jsonl")
    path = write(tmp_path / "b.txt.gz")
    for spec in (path, tmp_path):
        with pytest.raises(CorpusError, match=r'b.txt.gz" is unclear: unknown suffix ".txt"; expected .jsonl,'):
            names(spec)
    with pytest.raises(CorpusError, match="If it has one JSON object per line, pass --format jsonl"):
        names(write(tmp_path / "c.json"))
    with pytest.raises(CorpusError, match="no suffix"):
        names(write(tmp_path / "c"))


def test_missing_files_are_reported(tmp_path):
    with pytest.raises(CorpusError, match='There is no file or folder ".*nope.jsonl"'):
        names(tmp_path / "nope.jsonl")
    with pytest.raises(CorpusError, match=r'No file matches the glob ".*\*.jsonl"'):
        names(tmp_path / "*.jsonl")
    with pytest.raises(CorpusError, match="has no files"):
        names(tmp_path)


def test_a_folder_in_a_folder_or_glob_is_refused(tmp_path):
    write(tmp_path / "a.jsonl")
    (tmp_path / "sub").mkdir()
    for spec in (tmp_path, tmp_path / "*"):
        with pytest.raises(CorpusError, match='sub" is not a file. Narrow the folder or glob to files'):
            names(spec)


def test_a_pipe_is_refused_with_advice(tmp_path):
    os.mkfifo(tmp_path / "p.jsonl")
    with pytest.raises(
        CorpusError, match="is not a file. Save its content to a file; a corpus may also be standard input"
    ):
        names(tmp_path / "p.jsonl")


def test_an_unknown_format_is_a_usage_error(tmp_path):
    with pytest.raises(UsageError, match='The format "xml" is unknown; expected one of jsonl'):
        names(write(tmp_path / "a.jsonl"), format="xml")


# Truncated, damaged and changing files


def test_a_truncated_gzip_file_gives_its_good_rows_and_then_an_error(tmp_path):
    path = write(tmp_path / "c.jsonl.gz", *(doc(os.urandom(20).hex()) for _ in range(20_000)))
    all_rows = read(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    corpus = open_corpus([str(path)], fields=FieldNames())
    rows = []
    with pytest.raises(CorpusError) as error:
        rows.extend(row for row, _ in corpus.rows())
    assert 9_000 < len(rows) < 11_000
    assert rows == all_rows[: len(rows)]
    assert str(error.value).startswith(f"{path} is damaged or cut off after line {len(rows)}: ")


def test_a_damaged_gzip_file_is_an_error(tmp_path):
    path = write(tmp_path / "c.jsonl.gz", *(doc(str(i)) for i in range(100)))
    content = bytearray(path.read_bytes())
    content[30] ^= 255
    path.write_bytes(content)
    with pytest.raises(CorpusError, match="is damaged or cut off after line"):
        read(path)


def test_several_gzip_members_are_one_file(tmp_path):
    path = tmp_path / "c.jsonl.gz"
    path.write_bytes(b"".join(gzip.compress(json.dumps(doc(str(i))).encode() + b"\n") for i in range(3)))
    assert [d.id for d in documents(path)] == ["0", "1", "2"]


def test_a_file_that_changes_during_reading_is_an_error(tmp_path):
    path = write(tmp_path / "c.jsonl", doc("1"))
    rows = open_corpus([str(path)], fields=FieldNames()).rows()
    next(rows)
    write(path, doc("1"), doc("2"))
    with pytest.raises(CorpusError, match="changed while it was read"):
        list(rows)


def test_a_deleted_file_is_an_error(tmp_path):
    path = write(tmp_path / "c.jsonl", doc("1"))
    corpus = open_corpus([str(path)], fields=FieldNames())
    path.unlink()
    with pytest.raises(CorpusError, match="cannot be read after line 0: No such file"):
        list(corpus.rows())


# Standard input


def test_standard_input_is_read_as_json_lines_and_only_once(monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b'{"_id": "1", "text": "a"}\n{')))
    corpus = open_corpus(["-"], fields=FieldNames())
    good, bad = (row for row, _ in corpus.rows())
    assert (good.document.id, bad.file, bad.line) == ("1", "-", 2)
    assert corpus.identity() == [{"name": "-"}]
    with pytest.raises(CorpusError, match="Standard input can be read only once"):
        list(corpus.rows())


@pytest.mark.parametrize("format", ["csv", "tsv"])
def test_a_table_is_read_from_a_replaced_standard_input(monkeypatch, format):
    content = b"id,text\n1,a\n2,b\n".replace(b",", b"," if format == "csv" else b"\t")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))
    assert [(d.id, d.text) for d in documents("-", format=format)] == [("1", "a"), ("2", "b")]


def test_a_file_named_minus_is_not_standard_input(tmp_path, monkeypatch):
    monkeypatch.chdir(write(tmp_path / "-", doc("1")).parent)
    assert [d.id for d in documents("./-", format="jsonl")] == ["1"]


def test_standard_input_cannot_be_resumed_or_given_twice():
    with pytest.raises(CorpusError, match="from its start"):
        list(open_corpus(["-"], fields=FieldNames()).rows(Position(0, 10, 2, 1)))
    with pytest.raises(UsageError, match="given more than once"):
        open_corpus(["-", "-"], fields=FieldNames())


# Duplicate ids


def test_a_duplicate_id_is_reported_with_both_places(tmp_path):
    one = write(tmp_path / "1.jsonl", doc("a"), doc("b"))
    two = write(tmp_path / "2.jsonl", doc("b"), b"{\n", doc("c"), doc("a"), doc("a"))
    checked = list(Cursor(open_corpus([str(one), str(two)], fields=FieldNames()), None).take(9))
    assert [row.document and row.document.id for row in checked] == ["a", "b", None, None, "c", None, None]
    assert checked[2].reason == 'duplicate id "b": first at 1.jsonl line 2'
    assert str(bad_document(checked[6])).startswith('2.jsonl:5: duplicate id "a": first at 1.jsonl line 1. ')
    assert checked[3].reason.startswith("broken JSON")


def test_a_file_given_twice_has_only_duplicate_ids_the_second_time(tmp_path):
    path = str(write(tmp_path / "1.jsonl", doc("a")))
    rows = Cursor(open_corpus([path, path], fields=FieldNames()), None).take(9)
    assert [row.document is None for row in rows] == [False, True]


# Properties

anything = settings(max_examples=60)


some_lines = st.lists(
    st.one_of(
        st.builds(lambda text: json.dumps({"_id": "x", "text": text}, ensure_ascii=False).encode(), texts),
        st.binary(max_size=8).filter(lambda raw: b"\n" not in raw),
        st.sampled_from([b"", b"\r", b"{", b"[]"]),
    ),
    max_size=8,
)


@anything
@given(st.lists(st.tuples(some_lines, st.booleans(), st.booleans()), min_size=1, max_size=3))
def test_reading_resumes_at_any_position(tmp_path, files):
    for old in tmp_path.iterdir():
        old.unlink()
    for number, (lines, newline_last, packed) in enumerate(files):
        content = b"\n".join(lines) + b"\n" * newline_last
        write(tmp_path / (f"{number}.jsonl.gz" if packed else f"{number}.jsonl"), content)
    corpus = open_corpus([str(tmp_path)], fields=FieldNames(id=":row"))
    rows = list(corpus.rows())
    assert [source.row for source, _ in rows] == list(range(len(rows)))
    for index, (_, position) in enumerate(rows):
        again = Position(*json.loads(json.dumps(position)))
        assert list(corpus.rows(again)) == rows[index + 1 :]


# Real collections


@in_shared
def test_cranfield_has_1400_documents_two_of_them_empty():
    found = documents(SHARED / "cranfield")
    assert len(found) == 1400
    assert [d.id for d in found if not d.text] == ["471", "995"]


@in_shared
def test_limit_small_has_46_documents():
    found = documents(SHARED / "limit-small")
    assert len({d.id for d in found}) == 46
    assert found[0].text.startswith("Geneva Durben likes Quokkas")


def test_a_line_above_the_limit_is_an_error(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("sparse_ingest.corpora.stored.MAX_LINE", 64)
    good = '{"_id": "1", "text": "' + "x" * 40 + '"}'
    assert len(good) == 64
    path = tmp_path / "c.jsonl"
    path.write_text(good[:-4] + '"}\n' + good)
    rows = open_corpus([str(path)], fields=FieldNames()).rows()
    assert next(rows)[0].document is not None
    with pytest.raises(CorpusError, match=r"c\.jsonl:2: longer than 64 bytes; expected one row per line"):
        next(rows)
