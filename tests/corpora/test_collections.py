"""Queries and relevance judgments: every layout, and errors with file, line and reason."""

import gzip
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sparse_ingest.corpora.collections import read_qrels, read_queries
from sparse_ingest.corpora.documents import FieldNames
from sparse_ingest.corpora.files import open_corpus
from sparse_ingest.errors import CorpusError, UsageError
from sparse_ingest.records import Query

SHARED = Path(__file__).parents[2].parent / "shared" / "data"
in_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="shared/data does not exist")


def write(path: Path, content: str | bytes) -> Path:
    content = content.encode() if isinstance(content, str) else content
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


JSON_QUERIES = '{"_id": "1", "text": "a b", "title": "not read"}\n\n{"id": 2, "text": ""}\n'
JSON_QRELS = '{"query-id": "q 1", "corpus-id": 7, "score": 2}\n{"query-id": "q 1", "corpus-id": "8", "score": 0.0}\n'


@pytest.mark.parametrize("name", ["queries.jsonl", "queries.jsonl.gz", "any.ndjson"])
def test_queries_are_read_from_json_lines(tmp_path, name):
    assert list(read_queries(write(tmp_path / name, JSON_QUERIES))) == [Query("1", "a b"), Query("2", "")]


def test_queries_are_read_from_tsv_without_header(tmp_path):
    path = write(tmp_path / "q.tsv", "\ufeff1\ta b\r\n\n2\tc\td\n")
    assert list(read_queries(path)) == [Query("1", "a b"), Query("2", "c\td")]


def test_queries_of_a_folder_are_found(tmp_path):
    write(tmp_path / "queries.jsonl", JSON_QUERIES)
    assert len(list(read_queries(tmp_path))) == 2


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("q.jsonl", '{"_id": "1", "text": "a"}\n{', "broken JSON"),
        ("q.jsonl", '{"_id": "1", "text": "a"}\n{"text": "a"}', 'no column "id" for the id; the columns are "text"'),
        ("q.jsonl", '{"_id": "1", "text": "a"}\n{"_id": "2"}', 'no column "text" for the text; the columns are "_id"'),
        ("q.jsonl", '{"_id": "1", "text": "a"}\n{"_id": 1, "text": ""}', 'duplicate query id "1" (first seen at '),
        ("q.tsv", "1\ta\n2 b\n", 'expected two columns with a tab between them, found "2 b"'),
        ("q.tsv", b"1\ta\n2\t\xff\n", "not UTF-8: byte 0xff"),
        ("q.tsv", "1\ta\n\tb\n", 'the id in "id" is ""'),
    ],
)
def test_a_bad_query_is_an_error_with_file_and_line(tmp_path, name, content, reason):
    path = write(tmp_path / name, content)
    with pytest.raises(CorpusError) as error:
        list(read_queries(path))
    assert str(error.value).startswith(f"{path}:2: ") and reason in str(error.value)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("test.tsv", "\nquery-id\tcorpus-id\tscore\nq 1\t7\t2\nq 1\t8\t0\n"),
        ("test.tsv", "\ufeffq 1\t7\t2\r\n\r\nq 1\t8\t0"),
        ("qrels.trec", "q 1\t0\t7\t2\nq 1\tQ0\t8\t0\n"),
        ("qrels.jsonl", JSON_QRELS),
        ("qrels.jsonl.gz", JSON_QRELS),
        ("test.tsv.gz", "q 1\t7\t2\nq 1\t7\t2\nq 1\t8\t0\n"),
    ],
)
def test_judgments_are_read_in_every_layout(tmp_path, name, content):
    assert read_qrels(write(tmp_path / name, content)) == {"q 1": {"7": 2, "8": 0}}


def test_trec_columns_may_be_separated_by_spaces(tmp_path):
    assert read_qrels(write(tmp_path / "qrels.txt", "1 0  d1 3\n1 0 d2 -1\n")) == {"1": {"d1": 3, "d2": -1}}


@pytest.mark.parametrize(("name", "content"), [("qrels/test.tsv", "q 1\t7\t2\n"), ("qrels.jsonl", JSON_QRELS)])
def test_judgments_of_a_folder_are_found(tmp_path, name, content):
    write(tmp_path / name, content)
    assert read_qrels(tmp_path)["q 1"]["7"] == 2


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("q.tsv", "1\t7\t2\n1\t8\tx\n", 'the score is "x"; expected an integer'),
        ("q.tsv", "1\t7\t2\n1\t8\t1.5\n", 'the score is "1.5"'),
        ("q.tsv", "1\t7\t2\n1\t8\t1_0\n", 'the score is "1_0"'),
        ("q.tsv", "1\t7\t2\n1\t7\t1\n", 'query "1" and document "7" have the score 1 here and 2 before'),
        ("q.tsv", "1\t7\t2\nquery-id\tcorpus-id\tscore\n", 'the score is "score"'),
        ("q.tsv", "1\t7\t2\n1 8 2\n", "query, document and score with tabs between them"),
        ("q.tsv", "1\t7\t2\n\t8\t2\n", 'the id in "query-id" is ""'),
        ("q.jsonl", JSON_QRELS.splitlines()[0] + '\n{"query-id": "1"}', 'no column "corpus-id" for the id'),
        ("q.jsonl", JSON_QRELS.splitlines()[0] + '\n{"query-id": "1", "corpus-id": "2"}', 'no column "score"'),
        (
            "q.jsonl",
            JSON_QRELS.splitlines()[0] + '\n{"query-id": "1", "corpus-id": "2", "score": true}',
            "the score is true",
        ),
    ],
)
def test_a_bad_judgment_is_an_error_with_file_and_line(tmp_path, name, content, reason):
    path = write(tmp_path / name, content)
    with pytest.raises(CorpusError) as error:
        read_qrels(path)
    assert str(error.value).startswith(f"{path}:2: ") and reason in str(error.value)


def test_missing_files_are_reported(tmp_path):
    there = "queries.jsonl, queries.jsonl.gz, queries.jsonl.zst, queries.tsv"
    with pytest.raises(CorpusError, match=f"has none of {there}"):
        list(read_queries(tmp_path))
    with pytest.raises(CorpusError, match="has none of qrels/test.tsv"):
        read_qrels(tmp_path)
    with pytest.raises(CorpusError, match=r'There is no file or folder ".*nope.tsv"'):
        read_qrels(tmp_path / "nope.tsv")


@in_shared
@pytest.mark.parametrize(("name", "queries", "judgments"), [("cranfield", 225, 1837), ("limit-small", 1000, 2000)])
def test_shared_collections_are_read_completely(name, queries, judgments):
    assert len(list(read_queries(SHARED / name))) == queries
    assert sum(map(len, read_qrels(SHARED / name).values())) == judgments


# Parquet, and folders of MTEB


def write_table(path: Path, columns: dict[str, list]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path)
    return path


def test_an_mteb_folder_of_parquet_is_a_corpus_queries_and_judgments(tmp_path):
    for shard, doc_id in enumerate(("b", "a")):
        columns = {"_id": [doc_id], "title": [""], "text": [f"text of {doc_id}"]}
        write_table(tmp_path / "corpus" / f"test-0000{shard}-of-00002.parquet", columns)
    write_table(tmp_path / "queries" / "test-00000-of-00001.parquet", {"_id": [1, 2], "text": ["x", "y"]})
    judgments = {"query-id": [1, 2], "corpus-id": ["a", "b"], "score": [2.0, 0.0]}
    write_table(tmp_path / "qrels" / "test-00000-of-00001.parquet", judgments)
    write_table(tmp_path / "qrels" / "train-00000-of-00001.parquet", {**judgments, "score": [1, 1]})
    write(tmp_path / "README.md", "a card")
    rows = open_corpus([str(tmp_path)], fields=FieldNames()).rows()
    assert [row.document.id for row, _ in rows] == ["b", "a"]
    assert list(read_queries(tmp_path)) == [Query("1", "x"), Query("2", "y")]
    assert read_qrels(tmp_path) == {"1": {"a": 2}, "2": {"b": 0}}


def test_queries_and_judgments_may_be_csv(tmp_path):
    queries = write(tmp_path / "q.csv", 'id,text\n01,"a, b"\n')
    assert list(read_queries(queries)) == [Query("01", "a, b")]
    assert read_qrels(write(tmp_path / "j.csv", "query-id,corpus-id,score\n01,d,1\n")) == {"01": {"d": 1}}


def test_a_missing_column_is_an_error_that_lists_the_others(tmp_path):
    path = write_table(tmp_path / "q.parquet", {"_id": ["1"], "query": ["a"]})
    with pytest.raises(CorpusError, match='no column "text" for the text; the columns are "_id", "query"'):
        list(read_queries(path))
    path = write_table(tmp_path / "j.parquet", {"query-id": ["1"], "corpus-id": ["d"], "relevance": [1]})
    with pytest.raises(CorpusError, match='no column "score"; the columns are "query-id", "corpus-id", "rel'):
        read_qrels(path)


# TREC topics

TOPICS = """
<top>
<num> Number: 301
<title> International Organized Crime

<desc> Description:
Identify organizations.
</top>

<top>
<head> Tipster Topic Description
<num> Number:  052
<dom> Domain: International Economics
<title> Topic:  South African
  Sanctions
</top>
<top><num>303</num><title>Hubble</title></top>
"""


def test_trec_topics_give_number_and_title(tmp_path):
    for name in ("topics.301-450.txt", "topics.gz"):
        found = list(read_queries(write(tmp_path / name, TOPICS)))
        assert found == [
            Query("301", "International Organized Crime"),
            Query("052", "South African Sanctions"),
            Query("303", "Hubble"),
        ]


@pytest.mark.parametrize(
    ("topics", "line", "reason"),
    [
        ("<top>\n<num> 1\n<title> a\n", 2, "the topic has no </top>; is the file cut off?"),
        ("<top>\n<num> 1\n<title> a\n<top>\n<num> 2", 2, "the topic has no </top>"),
        ("<top>\n<num> 1\n<desc> a\n</top>", 2, "the topic has no <title>"),
        ("<top>\n<title> a\n</top>", 2, "the topic has no <num>"),
        ("<top>\n<num> 1\n<title>\n<desc> a\n</top>", 2, "the topic has no <title>"),
        ("<top>\n<num> 1\n<num> 2\n<title> a\n</top>", 2, "the topic has two <num>"),
        ("<top><num>1<title>a</top> b", 2, 'something follows </top>: "b"'),
        ("<top><num>1<title>a</top>\n2\tb", 3, 'expected <top>, found "2\\tb"'),
        ("<top><num>1<title>a</top>\n<top><num>1<title>b</top>", 3, 'duplicate query id "1" (first seen at '),
    ],
)
def test_a_bad_topic_is_an_error_with_file_and_line(tmp_path, topics, line, reason):
    path = write(tmp_path / "topics.txt", "\n" + topics)
    with pytest.raises(CorpusError) as error:
        list(read_queries(path))
    assert str(error.value).startswith(f"{path}:{line}: ") and reason in str(error.value)


def test_a_duplicate_id_in_another_file_is_reported_with_both_places(tmp_path):
    for name in ("a", "b"):
        write_table(tmp_path / "queries" / f"{name}.parquet", {"_id": ["1"], "text": ["x"]})
    with pytest.raises(CorpusError, match=r"b.parquet: row 1: duplicate .* \(first seen at .*a.parquet: row 1\)"):
        list(read_queries(tmp_path))


def test_a_lone_quote_in_csv_queries_is_logged_and_quoting_none_reads_every_line(tmp_path, caplog):
    path = write(tmp_path / "q.csv", 'id,text\n1,"a\n2,b"\n3,c\n')
    for _ in range(2):
        assert [query.id for query in read_queries(path)] == ["1", "3"]
    assert [record.message.partition(": ")[0] for record in caplog.records] == [f"{path}:2"]
    assert list(read_queries(path, "none")) == [Query("1", '"a'), Query("2", 'b"'), Query("3", "c")]
    qrels = write(tmp_path / "qrels.tsv", "query-id\tcorpus-id\tscore\n1\td\t1\n")
    assert read_qrels(qrels, "none") == {"1": {"d": 1}}
    with pytest.raises(UsageError, match="--quoting rfc4180 is for csv"):
        list(read_queries(write(tmp_path / "q.tsv", "1\ta\n"), "rfc4180"))
    with pytest.raises(UsageError, match="--quoting none is for csv and tsv"):
        list(read_queries(write(tmp_path / "q.jsonl", '{"_id": "1", "text": "a"}\n'), "none"))
