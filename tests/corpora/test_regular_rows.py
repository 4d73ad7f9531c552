"""Rows of a block of csv that numpy finds: those of the csv module, up to the first irregular one."""

import csv
import io
import re
from itertools import accumulate

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparse_ingest.corpora.regular_rows import RegularRows, regular_rows

PARTS = '" "" , \r a é, 1,x\n \0 \udcff'.split(" ") + ["\n", "\r\n", '"b,\n""c"', '2,"y"\r\n', '"3\n4",z\n', '"",""\n']
VALUES = st.text(st.sampled_from('a",\n\ré'), max_size=90)


def rows_of(found: RegularRows) -> list[list[str]]:
    return [list(values) for values in zip(*found.columns, strict=True)]


def parsed(block: bytes) -> list[list[str]]:
    return list(csv.reader(re.findall(r"[^\n]*\n", block.decode()), strict=True))


@given(st.lists(st.sampled_from(PARTS), max_size=60).map("".join), st.integers(1, 3))
def test_all_bytes_up_to_an_irregular_row_are_rows_of_the_csv_module(text, columns):
    block = text.encode(errors="surrogateescape")
    found = regular_rows(block, ",", columns, quotes=True)
    end = found.ends[-1] if found.ends else 0
    assert rows_of(found) == parsed(block[:end])
    starts = [0, *found.ends]
    assert [parsed(block[start:end]) for start, end in zip(starts, found.ends, strict=False)] == [
        [row] for row in rows_of(found)
    ]
    assert found.lines == [block[:end].count(b"\n") for end in found.ends]


def written(row: tuple[str, str], quoting: int, line_end: str) -> bytes:
    line = io.StringIO()
    csv.writer(line, quoting=quoting, lineterminator=line_end).writerow(row)
    return line.getvalue().encode()


# With lines that end in "\n", Python 3.11 writes "\r" without quotes.
@given(
    st.lists(st.tuples(VALUES, VALUES), min_size=1, max_size=30),
    st.sampled_from([(csv.QUOTE_MINIMAL, "\r\n"), (csv.QUOTE_ALL, "\n"), (csv.QUOTE_ALL, "\r\n")]),
    st.integers(0, 200),
)
def test_every_complete_row_that_the_csv_module_writes_is_found(rows, style, cut):
    lines = [written(row, *style) for row in rows]
    ends = list(accumulate(map(len, lines)))
    size = max(0, ends[-1] - cut)
    complete = sum(end <= size for end in ends)
    found = regular_rows(b"".join(lines)[:size], ",", 2, quotes=True)
    assert (rows_of(found), found.ends) == ([list(row) for row in rows[:complete]], ends[:complete])


@pytest.mark.parametrize(
    "row", ['a"b,c', 'a,"b"c', 'a, "b"', "a\rb,c", "a", "a,b,c", "", "\r", '"a,b\n"c,d', "\0,a", "a,\udcff", "a,\udcc3"]
)
def test_an_irregular_row_ends_the_regular_ones(row):
    block = f'1,a\n2,"b\n""c"\n{row}\n3,d\n'.encode(errors="surrogateescape")
    found = regular_rows(block, ",", 2, quotes=True)
    assert rows_of(found) == [["1", "a"], ["2", 'b\n"c']]
    assert (found.ends, found.lines) == ([4, 14], [1, 3])


def test_without_quotes_each_line_is_a_row():
    found = regular_rows(b'"1\ta"\r\n"2\tb\rc\n3\td', "\t", 2, quotes=False)
    assert (rows_of(found), found.lines) == ([['"1', 'a"'], ['"2', "b\rc"]], [1, 2])
