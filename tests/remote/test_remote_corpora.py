"""Remote corpora: same rows as local files, resumable reading, and no secrets in messages."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.planned_starts import assert_same
from support.stores import SECRET, FaultyStore, put_folder, web_server

from sparse_ingest.corpora.documents import FieldNames
from sparse_ingest.corpora.files import open_corpus
from sparse_ingest.corpora.sources import Corpus
from sparse_ingest.corpora.starts import find_starts
from sparse_ingest.errors import CorpusError, StorageError
from sparse_ingest.storage.places import RemotePath

ROWS = [{"_id": f"d{place}", "text": f"the text of number {place} é\n" * 300} for place in range(2000)]


def write_all(folder: Path) -> None:
    lines = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
    folder.mkdir()
    (folder / "a.jsonl").write_bytes(lines)
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(lines, 1))
    with pa.CompressedOutputStream(str(folder / "c.jsonl.zst"), "zstd") as file:
        file.write(lines)
    table = pa.table({"_id": [row["_id"] for row in ROWS], "text": [row["text"] for row in ROWS]})
    pq.write_table(table, folder / "d.parquet", row_group_size=500, compression="none", use_dictionary=False)
    with (folder / "e.csv").open("w", newline="") as file:
        file.write("_id,text\n" + "".join(f'{row["_id"]},"{row["text"]}"\n' for row in ROWS))


NAMES = ("a.jsonl", "b.jsonl.gz", "c.jsonl.zst", "d.parquet", "e.csv")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus") / "files"
    write_all(folder)
    return folder


@pytest.fixture
def web(files: Path) -> Iterator[str]:
    with web_server(files, token=f"sig={SECRET}") as url:
        yield url


def corpus_of(*specs: object) -> Corpus:
    return open_corpus([str(spec) for spec in specs], fields=FieldNames())


def texts(corpus: Corpus) -> list[tuple[str, str]]:
    return [(row.document.id, row.document.text) for row, _ in corpus.rows() if row.document]


WANTED = [(row["_id"], row["text"]) for row in ROWS]


@pytest.mark.parametrize(
    "name",
    [name if name in ("c.jsonl.zst", "d.parquet") else pytest.param(name, marks=pytest.mark.slow) for name in NAMES],
)
def test_every_file_format_is_read_from_the_web(web: str, files: Path, name: str) -> None:
    corpus = corpus_of(f"{web}/{name}?sig={SECRET}")
    assert texts(corpus) == WANTED
    assert corpus.identity() == corpus_of(files / name).identity()
    assert SECRET not in json.dumps(corpus.identity()) + corpus.sources[0].label


@pytest.mark.parametrize(
    "name",
    [name if name in ("b.jsonl.gz", "d.parquet") else pytest.param(name, marks=pytest.mark.slow) for name in NAMES],
)
def test_every_file_format_is_read_from_a_store(bucket: str, files: Path, name: str) -> None:
    place = RemotePath.at(bucket) / name
    place.upload(files / name)
    assert texts(corpus_of(place)) == WANTED


@pytest.mark.parametrize("name", ["a.jsonl", "d.parquet", pytest.param("e.csv", marks=pytest.mark.slow)])
def test_reading_resumes_at_a_position_without_fetching_the_start(
    faulty: FaultyStore, bucket: str, files: Path, name: str
) -> None:
    place = RemotePath.at(bucket) / name
    place.upload(files / name)
    position = next(position for row, position in corpus_of(place).rows() if row.row == 1799)
    fetched = faulty.sent_of(".*")
    assert [row.document.id for row, _ in corpus_of(place).rows(position) if row.document] == [
        f"d{number}" for number in range(1800, 2000)
    ]
    assert faulty.sent_of(".*") - fetched < 0.4 * (files / name).stat().st_size


def test_the_starts_of_shards_in_a_store_are_those_of_a_walk(faulty: FaultyStore, bucket: str, files: Path) -> None:
    place = RemotePath.at(bucket)
    for name in ("a.jsonl", "d.parquet"):
        (place / name).upload(files / name)
    assert_same(corpus_of(place / "a.jsonl", place / "d.parquet"), 300, piece_bytes=5 << 20)
    sent = faulty.sent_of(".*")
    assert find_starts(corpus_of(place / "d.parquet"), 300).rows == 2000
    assert faulty.sent_of(".*") - sent < 1 << 20


def test_shards_from_a_server_without_ranges_are_one_group(files: Path) -> None:
    with web_server(files, ranges=False) as url:
        corpus = corpus_of(f"{url}/a.jsonl")
        starts = assert_same(corpus, 500, piece_bytes=5 << 20)
    assert starts and starts.groups == [range(4)]


def test_a_file_address_is_a_local_file(files: Path) -> None:
    corpus = corpus_of(f"file://{files}/a.jsonl")
    assert corpus.sources[0].label == corpus_of(files / "a.jsonl").sources[0].label
    with pytest.raises(CorpusError, match=f'no file or folder "{files}/none.jsonl"'):
        corpus_of(f"file://{files}/none.jsonl")


def test_folders_and_globs_of_a_store(bucket: str, tmp_path: Path) -> None:
    for name in ("b.jsonl", "B.jsonl", "a.jsonl", ".hidden.jsonl"):
        (tmp_path / name).write_text(json.dumps({"_id": name, "text": "x"}) + "\n")
    put_folder(tmp_path, RemotePath.at(f"{bucket}/folder"))
    for spec in ("folder", "folder/", "folder/*.jsonl", "f*/*.jsonl"):
        assert [source.name for source in corpus_of(f"{bucket}/{spec}").sources] == ["B.jsonl", "a.jsonl", "b.jsonl"]
    assert [source.name for source in corpus_of(f"{bucket}/folder/[ab].jsonl").sources] == ["a.jsonl", "b.jsonl"]
    for spec in ("none.jsonl", "none", "none/*.jsonl"):
        with pytest.raises(CorpusError, match="no file|No file"):
            corpus_of(f"{bucket}/{spec}")


def test_the_folder_of_a_collection_means_its_corpus(bucket: str, tmp_path: Path) -> None:
    for name in ("corpus.jsonl", "queries.jsonl"):
        (tmp_path / name).write_text(json.dumps({"_id": name, "text": "x"}) + "\n")
    put_folder(tmp_path, RemotePath.at(f"{bucket}/beir"))
    assert [source.name for source in corpus_of(f"{bucket}/beir").sources] == ["corpus.jsonl"]


@pytest.mark.parametrize("other", ["of another size", "of the same size"])
def test_a_file_replaced_while_it_is_read_is_reported(bucket: str, other: str) -> None:
    place = RemotePath.at(bucket) / "a.jsonl"
    line = json.dumps({"_id": "x", "text": "y"}).encode() + b"\n"
    place.write_whole(line)
    corpus = corpus_of(place)
    place.write_whole(line + line if other == "of another size" else line.replace(b"y", b"z"))
    with pytest.raises((CorpusError, StorageError), match="changed while it was read|was replaced"):
        list(corpus.rows())


def test_a_bad_row_is_reported_with_file_and_line(web: str, files: Path) -> None:
    (files / "bad.jsonl").write_text('{"_id": "a", "text": "x"}\n{"_id": \n')
    corpus = corpus_of(f"{web}/bad.jsonl?sig={SECRET}")
    bad = [row for row, _ in corpus.rows() if row.document is None]
    assert [(row.file, row.line) for row in bad] == [("bad.jsonl", 2)]


def test_a_missing_or_forbidden_corpus_gives_one_message(web: str) -> None:
    with pytest.raises(CorpusError, match=r'no file or folder "http://127.0.0.1:\d+/none.jsonl"'):
        corpus_of(f"{web}/none.jsonl?sig={SECRET}")
    with pytest.raises(StorageError, match="Check the credentials") as error:
        corpus_of(f"{web}/a.jsonl?sig=other-{SECRET[:4]}")
    assert SECRET[:4] not in str(error.value)


def test_connection_faults_lose_no_row(faulty: FaultyStore, bucket: str, files: Path) -> None:
    place = RemotePath.at(bucket) / "a.jsonl"
    place.upload(files / "a.jsonl")
    faulty.inject("GET", None, 503, "cut", "drop", 500)
    assert texts(corpus_of(place)) == WANTED
    assert faulty.done == [503, "cut", "drop", 500]
