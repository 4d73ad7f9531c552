"""The planner finds the same starts of shards as a walk over all rows, and a reader of a shard reads little more."""

from pathlib import Path

import pyarrow as pa
import pyarrow.feather as feather
import pyarrow.parquet as pq
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from support.forms import FORMS, packed, write_form
from support.planned_starts import assert_same, walk

from sparse_ingest.corpora.documents import FieldNames
from sparse_ingest.corpora.files import open_corpus
from sparse_ingest.corpora.memory import corpus_of
from sparse_ingest.corpora.sources import Corpus, Cursor, Position
from sparse_ingest.corpora.starts import Starts, find_starts
from sparse_ingest.errors import CorpusError, Interrupted
from sparse_ingest.reporting import SilentReporter


def opened(*paths: Path | str, **options) -> Corpus:
    return open_corpus([str(path) for path in paths], fields=FieldNames(), **options)


# Files of lines

JSON_LINES = (
    b'{"_id":"a","text":"b"}',
    b'{"_id":"1","text":"\\n"}',
    b"",
    b"",
    b" ",
    b"\t \r",
    b"{",
    b"\xff",
    b" {}",
    b"\x0b",
)
TABLE_LINES = (
    b"1\ta",
    b"2\t",
    b"",
    b"\r",
    b"\r\r",
    b" ",
    b"\t",
    b'3\t"',
    b'4\t"x"',
    b"\xef\xbb\xbf",
    b"a\tb\tc",
    b"\xff\t",
)
ENDS = (b"\n", b"\n", b"\r\n", b"\n\n")


def content_of(lines: tuple[bytes, ...]) -> st.SearchStrategy[bytes]:
    marks, ends = st.sampled_from((b"", b"\xef\xbb\xbf")), st.sampled_from((b"", b"\n"))
    rows = st.lists(st.tuples(st.sampled_from(lines), st.sampled_from(ENDS)).map(b"".join), max_size=12)
    return st.tuples(marks, rows.map(b"".join), st.sampled_from(lines), ends).map(b"".join)


def contents_of(lines: tuple[bytes, ...]) -> st.SearchStrategy[list[bytes]]:
    return st.lists(st.one_of(st.just(b""), content_of(lines)), min_size=1, max_size=3)


SHARDS = st.integers(1, 5)
LIMITS = st.one_of(st.none(), st.integers(0, 20))
PIECES = st.one_of(st.integers(1, 40), st.just(1 << 20))


def write_all(folder: Path, contents: list[bytes], suffix: str) -> list[Path]:
    paths = [folder / f"{number}{suffix}" for number in range(len(contents))]
    for path, content in zip(paths, contents, strict=True):
        path.write_bytes(packed(path.name, content))
    return paths


@settings(max_examples=60, deadline=None)
@given(
    contents_of(JSON_LINES), SHARDS, LIMITS, PIECES, st.sampled_from((".jsonl", ".jsonl", ".jsonl.gz", ".jsonl.zst"))
)
@example([b"\xef\xbb\xbf"], 1, None, 1, ".jsonl")
@example([b"\xef\xbb\xbf\n{}", b"", b"{}"], 1, None, 2, ".jsonl")
@example([b"\x1f\x8b{}\n"], 1, None, 1, ".jsonl")
def test_starts_in_json_lines_equal_a_walk(tmp_path_factory, contents, shard_rows, limit, piece_bytes, suffix):
    paths = write_all(tmp_path_factory.getbasetemp(), contents, suffix)
    assert_same(opened(*paths), shard_rows, limit, piece_bytes=piece_bytes, threads=2)


@settings(max_examples=30, deadline=None)
@given(
    contents_of(TABLE_LINES), SHARDS, LIMITS, PIECES, st.sampled_from((".tsv", ".tsv.gz")),
    st.sampled_from(({"format": "msmarco"}, {"quoting": "none"}, {"quoting": "none", "columns": ["id", "text"]}, {})),
)  # fmt: skip
@example([b"\n\nid\ttext\n1\ta\n\n2\tb"], 1, None, 1, ".tsv", {"quoting": "none"})
@example([b"id\ttext"], 1, None, 3, ".tsv", {"quoting": "none"})
@example([b"1\ta", b'1\ta\n3\t"\n1\ta'], 1, 2, 1, ".tsv", {})
def test_starts_in_tables_of_text_equal_a_walk(
    tmp_path_factory, contents, shard_rows, limit, piece_bytes, suffix, options
):
    if options.get("format") != "msmarco" and "columns" not in options:
        contents = [content and b"\r\nid\ttext\n" + content for content in contents]
    paths = write_all(tmp_path_factory.getbasetemp(), contents, suffix)
    assert_same(opened(*paths, **options), shard_rows, limit, piece_bytes=piece_bytes, threads=2)


@pytest.mark.parametrize("piece_bytes", [1000, 5000, 40_000, 1 << 20])
def test_starts_between_and_at_marks_equal_a_walk(tmp_path, piece_bytes):
    path = tmp_path / "c.jsonl"
    path.write_text(
        "".join(f'{{"_id":"{row}","text":"{"x" * (row % 9)}"}}\n' + "\n" * (row % 50 == 7) for row in range(5000))
    )
    for shard_rows in (64, 700, 1024, 4999):
        assert_same(opened(path), shard_rows, None, piece_bytes=piece_bytes)


def test_lines_of_several_blocks_and_blank_ones_equal_a_walk(tmp_path):
    path = tmp_path / "c.jsonl"
    blank = b" " * 1_200_000
    long = b'{"_id":"1","text":"' + b"x" * 1_500_000 + b'"}'
    path.write_bytes(b"\n".join([long, blank, blank + b"{}", b"", long, blank]))
    for piece_bytes in (100_000, 1 << 20, 1 << 30):
        assert_same(opened(path), 1, None, piece_bytes=piece_bytes)


@pytest.mark.parametrize("blank", [b"\r\n", b"\r\r\n", b"\xef\xbb\xbf\n"])
def test_short_lines_between_two_blocks_equal_a_walk(tmp_path, blank):
    path = tmp_path / "c.tsv"
    for place in range(5):
        path.write_bytes(b"1\t" + b"x" * ((1 << 19) - 3 - place) + b"\n" + blank + b"2\ta\n")
        assert_same(opened(path, format="msmarco"), 1)


def test_a_line_that_is_too_long_is_the_error_of_a_walk(tmp_path):
    path = tmp_path / "c.jsonl"
    path.write_bytes(b'{"_id":"1","text":"a"}\n' * 3 + b" " * ((1 << 26) - 1) + b"\n")
    with pytest.raises(CorpusError, match=r"c\.jsonl:4: longer than 67,108,864 bytes"):
        find_starts(opened(path), 2, piece_bytes=1 << 25)
    assert_same(opened(path), 2)
    assert find_starts(opened(path), 2, 3).rows == 3


# Every format

ROWS = [{"_id": str(number), "title": f"T\n{number}", "text": 'a "b"\n\nc ' * (number % 4)} for number in range(1000)]


@pytest.mark.parametrize("form", FORMS)
def test_starts_in_every_format_equal_a_walk(tmp_path, form):
    first, second = write_form(tmp_path, form, ROWS), write_form(tmp_path, form, ROWS[:510], "other")
    for shard_rows, limit in ((170, None), (100, None), (64, 1170), (7, 1000)):
        assert_same(opened(first, second, first), shard_rows, limit)


def test_starts_in_csv_with_quotes_bad_rows_and_without_a_last_newline_equal_a_walk(tmp_path):
    path = tmp_path / "c.csv"
    path.write_bytes(b'\xef\xbb\xbfid,text\r\n1,"a\n\n,b"\r\n\n2\n3,"a""b"x\n4,\xff\n5,c')
    corpus = opened(path)
    assert_same(corpus, 1)
    assert len(corpus.merged()) == 1
    path.write_bytes(b'id,text\n1,a\n2,"b\n3,c\n')
    assert_same(opened(path), 1)
    assert_same(opened(path), 1, 1)


def test_a_shard_that_begins_a_file_is_read_from_it(tmp_path):
    path = write_form(tmp_path, ".jsonl.gz", ROWS)
    found = assert_same(opened(path, path), 500)
    assert found and found.begins[2] == Position(1, 0, 1, 1000)
    assert found.groups == [range(0, 2), range(2, 4)]


def test_shards_of_a_large_row_group_or_record_batch_are_one_group(tmp_path):
    table = pa.table({"id": [str(row) for row in range(1000)], "text": ["x"] * 1000})
    pq.write_table(table, tmp_path / "c.parquet", row_group_size=500)
    feather.write_feather(table, tmp_path / "c.feather", chunksize=500)
    for name in ("c.parquet", "c.feather"):
        found = assert_same(opened(tmp_path / name), 100)
        assert found and found.groups == [range(0, 5), range(5, 10)]
    # A row group that continues in the next shard is read twice, if that is a twentieth or less.
    pq.write_table(table, tmp_path / "c.parquet", row_group_size=99)
    found = assert_same(opened(tmp_path / "c.parquet"), 100)
    assert found and found.groups == [*(range(shard, shard + 1) for shard in range(6)), range(6, 8), range(8, 10)]


def test_rows_in_memory_and_bad_ones_among_them_equal_a_walk():
    rows = [{"id": "1", "text": "a"}, 5, {"id": "2"}, {"id": "3", "text": "b"}] * 3
    assert_same(corpus_of(rows, fields=FieldNames()), 5)


def test_no_rows_have_no_starts(tmp_path):
    path = tmp_path / "c.jsonl"
    path.write_bytes(b"\n \n")
    assert assert_same(opened(path), 3) == Starts(0, [], [], [])


@pytest.mark.parametrize("name", ["c.jsonl.gz", "c.parquet", "c.feather", "c.arrows", "c.arrows.gz", "c.csv.zst"])
def test_a_damaged_file_is_the_error_of_a_walk(tmp_path, name):
    content = write_form(tmp_path, name[1:], ROWS).read_bytes()
    path = tmp_path / name
    for damaged in (b"", content[: len(content) // 2], b"{}\n"):
        path.write_bytes(damaged)
        with pytest.raises(CorpusError) as caught:
            walk(opened(path), 10, None)
        with pytest.raises(CorpusError) as found:
            find_starts(opened(path), 10)
        assert str(found.value) == str(caught.value)


def test_columns_that_are_missing_are_the_error_of_a_walk(tmp_path):
    for form in (".parquet", ".feather", ".csv", ".arrows"):
        path = write_form(tmp_path, form, [{"_id": "1", "body": "a"}])
        assert_same(opened(path), 1)


def test_standard_input_has_no_starts():
    with pytest.raises(ValueError, match="read only once"):
        find_starts(opened("-"), 10)


@pytest.mark.parametrize("form", [".csv", ".jsonl"])
def test_a_stop_request_ends_the_search(tmp_path, form):
    class Stopping(SilentReporter):
        def stop_requested(self) -> bool:
            return True

    path = write_form(tmp_path, form, ROWS * 2)
    with pytest.raises(Interrupted):
        find_starts(opened(path), 10, reporter=Stopping())


# What a reader of a shard reads


def bytes_read() -> int:
    return int(Path("/proc/self/io").read_text().split()[1])


@pytest.mark.parametrize("form", [".jsonl", ".parquet", ".feather"])
def test_the_reader_of_a_group_reads_at_most_a_tenth_more_than_its_bytes(tmp_path, form):
    path, count, shard_rows = tmp_path / f"c{form}", 3000, 1000
    texts = [f"{row:030000}" for row in range(count)]
    table = pa.table({"id": [str(row) for row in range(count)], "text": texts})
    if form == ".jsonl":
        path.write_text("".join(f'{{"id":"{row}","text":"{text}"}}\n' for row, text in enumerate(texts)))
    elif form == ".parquet":
        pq.write_table(table, path, row_group_size=300, compression="none", use_dictionary=False)
    else:
        feather.write_feather(table, path, chunksize=40, compression="uncompressed")
    corpus = opened(path)
    began = bytes_read()
    starts = find_starts(corpus, shard_rows)
    if form != ".jsonl":
        assert bytes_read() - began < path.stat().st_size / 20
    group = starts.groups[1]
    began = bytes_read()
    cursor = Cursor(corpus, None)
    cursor.jump(starts.begins[group.start])
    rows = list(cursor.take(shard_rows * len(group)))
    assert rows[0].row == starts.positions[group.start].row
    assert bytes_read() - began < 1.1 * path.stat().st_size * len(rows) / count
