"""Every file format gives the same documents and can be resumed at any row."""

import io
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.forms import FORMS, INDEXED, STREAMED, rows_of, write_form

from sparse_ingest.corpora.documents import FieldNames
from sparse_ingest.corpora.files import open_corpus
from sparse_ingest.corpora.sources import Corpus, Position
from sparse_ingest.corpora.stored import FoundFile
from sparse_ingest.encoding.counts import RowHash
from sparse_ingest.errors import CorpusError

ROWS = [
    {
        "_id": str(number),
        "title": f'Title "{number}", é' if number % 3 else "",
        "text": f'text {number},\t"quoted"\r\nsecond line\n\n 日本 \\n \u2028 end ' * (number % 5),
        "kept": "" if number % 7 else f"{number}",
    }
    for number in range(1000)
]


def corpus_of(path: Path, **options) -> Corpus:
    return open_corpus([str(path)], fields=FieldNames(keep=("kept",)), **options)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("forms")
    for form in FORMS:
        write_form(folder, form, ROWS)
    return folder


@pytest.fixture(scope="module")
def expected(folder: Path) -> list:
    rows = rows_of(corpus_of(folder / "corpus.jsonl"))
    assert [(document.id, json.loads(document.fields)["text"]) for _, document, _ in rows] == [
        (row["_id"], row["text"]) for row in ROWS
    ]
    return rows


@pytest.mark.parametrize("form", FORMS)
def test_every_format_gives_the_same_1000_documents(folder: Path, expected: list, form: str) -> None:
    corpus = corpus_of(folder / f"corpus{form}")
    assert rows_of(corpus) == expected
    digests = []
    for one_corpus in (corpus, corpus_of(folder / "corpus.jsonl")):
        digest = RowHash()
        for row, _ in one_corpus.rows():
            digest.add(row)
        digests.append(digest.hexdigest())
    assert digests[0] == digests[1]


@pytest.mark.parametrize("form", FORMS)
def test_reading_resumes_at_any_row(folder: Path, form: str) -> None:
    corpus = corpus_of(folder / f"corpus{form}")
    rows = list(corpus.rows())
    for place in (0, 1, 129, 130, 169, 170, 299, 300, 301, 640, 998, 999):
        again = Position(*json.loads(json.dumps(rows[place][1])))
        assert list(corpus.rows(again)) == rows[place + 1 :]


@pytest.mark.parametrize("form", FORMS)
def test_the_share_read_increases_to_one(folder: Path, form: str) -> None:
    corpus = corpus_of(folder / f"corpus{form}")
    shares = [corpus.share(position) for _, position in corpus.rows()]
    assert shares == sorted(shares) and 0 <= shares[0] <= shares[-1] <= 1
    assert corpus.share(last_position(corpus)) == 1


def last_position(corpus: Corpus) -> Position:
    return [position for _, position in corpus.rows()][-1]


@dataclass(frozen=True)
class CountedFile:
    """A local file that records the number of bytes of each read."""

    file: FoundFile
    counted: list[int]

    name = property(lambda self: self.file.name)
    place = property(lambda self: self.file.place)
    bytes = property(lambda self: self.file.bytes)

    def open(self) -> io.BufferedReader:
        counted = self.counted

        class Raw(io.FileIO):
            def readinto(self, buffer) -> int:
                count = super().readinto(buffer)
                counted.append(count)
                return count

        return io.BufferedReader(Raw(self.file.path), 8192)

    def refuse_changed(self) -> None:
        self.file.refuse_changed()


@pytest.mark.parametrize("form", [".jsonl", ".csv", ".tsv", ".parquet", ".feather"])
def test_resuming_near_the_end_reads_less_than_a_fifth_of_the_file(tmp_path: Path, monkeypatch, form: str) -> None:
    counted: list[int] = []
    monkeypatch.setattr(FoundFile, "found", lambda path: CountedFile(FoundFile(path, path.stat().st_size), counted))
    texts = [Random(number).randbytes(300).hex() for number in range(3000)]
    rows = [{"_id": str(number), "text": text, "kept": ""} for number, text in enumerate(texts)]
    corpus = corpus_of(write_form(tmp_path, form, rows))
    positions = [position for _, position in corpus.rows()]
    total = sum(counted)
    counted.clear()
    assert len(rows_of(corpus, positions[2979])) == 20
    assert sum(counted) < total / 5  # row groups have 300 rows, record batches 170


@pytest.mark.parametrize("form", STREAMED)
def test_every_streamable_format_is_read_from_standard_input(
    folder: Path, expected: list, monkeypatch, form: str
) -> None:
    content = (folder / f"corpus{form}").read_bytes()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BufferedReader(io.BytesIO(content))))
    corpus = open_corpus(["-"], fields=FieldNames(keep=("kept",)), format=form.strip(".").removesuffix("s"))
    assert rows_of(corpus) == expected
    assert not corpus.rereadable
    with pytest.raises(CorpusError, match="only once"):
        rows_of(corpus)


@pytest.mark.parametrize("form", INDEXED)
def test_formats_with_a_footer_are_refused_on_standard_input(folder: Path, monkeypatch, form: str) -> None:
    content = (folder / f"corpus{form}").read_bytes()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BufferedReader(io.BytesIO(content))))
    with pytest.raises(CorpusError, match="cannot be read .*from a pipe or"):
        format = "parquet" if form == ".parquet" else "arrow"
        rows_of(open_corpus(["-"], fields=FieldNames(), format=format))


def test_the_identity_contains_format_and_columns(folder: Path) -> None:
    size = (folder / "corpus.csv").stat().st_size
    (entry,) = corpus_of(folder / "corpus.csv").identity()
    assert entry == {"name": "corpus.csv", "bytes": size, "format": "csv"}
    (entry,) = corpus_of(folder / "corpus.csv", columns=["_id", "title", "text", "kept"]).identity()
    assert entry["columns"] == ["_id", "title", "text", "kept"]
    (entry,) = corpus_of(folder / "corpus.jsonl").identity()
    assert "format" not in entry  # as written by releases that read only JSON lines


# Round trips of arbitrary documents. csv cannot contain NUL.

characters = st.characters(exclude_categories=["Cs"], exclude_characters="\0")
texts = st.text(characters, max_size=30) | st.text("\",\n\r\t\\' a\ufeff\x85\u2028\x1c", max_size=12)
huge = st.builds(lambda text, times: text * times, st.text(characters, min_size=1, max_size=5), st.integers(1, 40_000))
ids = texts.filter(lambda text: 0 < len(text.encode()) <= 512)
some_rows = st.lists(
    st.fixed_dictionaries({"_id": ids, "title": st.none() | texts, "text": texts | huge, "kept": texts}),
    min_size=1,
    max_size=6,
)


@pytest.mark.parametrize("form", FORMS)
@settings(max_examples=15)
@given(rows=some_rows)
def test_any_document_round_trips_in_every_format(tmp_path: Path, form: str, rows: list) -> None:
    corpus = corpus_of(write_form(tmp_path, form, rows))
    for (number, document, reason), row in zip(rows_of(corpus), rows, strict=True):
        assert reason is None, (number, reason)
        assert document.id == row["_id"]
        assert document.text == " ".join(filter(None, (row["title"], row["text"])))
        title = {"title": row["title"]} if row["title"] else {}
        assert json.loads(document.fields) == {**title, "text": row["text"], "kept": row["kept"]}


@pytest.mark.parametrize("form", [".jsonl", *INDEXED, ".arrows"])
def test_nul_round_trips_in_formats_that_allow_it(tmp_path: Path, form: str) -> None:
    path = write_form(tmp_path, form, [{"_id": "1", "title": "", "text": "a\0b", "kept": "\0"}])
    assert rows_of(corpus_of(path))[0][1].text == "a\0b"
