"""Queries and relevance judgments (qrels) of a test collection.

In: a file, or the BEIR or MTEB folder that has it. Queries are rows with `_id` (or `id`) and `text` in JSON lines, csv,
Parquet or Arrow, lines of `id<TAB>text`, or titles of TREC topics. Judgments are rows with `query-id`, `corpus-id` and
`score` in these formats or as BEIR's table with tabs, or TREC's four columns. Text may be compressed (.gz, .zst). A
query or judgment that cannot be read is an error: skipping it would change every measure.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path

from sparse_ingest.corpora.documents import (
    BadRow,
    FieldNames,
    id_in,
    needed_columns,
    refuse_repeated,
    require,
    text_in,
    utf8,
)
from sparse_ingest.corpora.files import FORMAT_OF_SUFFIX, source_of
from sparse_ingest.corpora.stored import BYTE_ORDER_MARK, PACKED, FoundFile, LineSource, suffix_of
from sparse_ingest.corpora.text_formats import Quoting
from sparse_ingest.errors import CorpusError, UsageError, shown
from sparse_ingest.records import Query, place_text

logger = logging.getLogger(__name__)

# Patterns of names in a folder; the first match is used. A folder of Parquet is MTEB's layout on the hub.
_QUERIES = (
    *(f"queries{suffix}{packed}" for suffix in (".jsonl", ".tsv") for packed in ("", *PACKED)),
    "queries.parquet",
    "queries/*.parquet",
    "queries/*.jsonl",
)
_QRELS = ("qrels/test.tsv", "qrels.jsonl", "qrels.jsonl.gz", "qrels/test.jsonl", "qrels.parquet", "qrels/test*.parquet")
_QUERY, _DOCUMENT, _SCORE = _HEADER = ["query-id", "corpus-id", "score"]
_TAG = re.compile(r"<(/?[a-z]+)>", re.IGNORECASE)
_LABEL = re.compile(r"^(number|topic)\s*:", re.IGNORECASE)


def read_queries(path: Path, quoting: Quoting | None = None) -> Iterator[Query]:
    """Yield the queries of a file or a collection's folder, in order; `quoting` is for csv."""
    seen: dict[str, str] = {}  # id to place
    for file in _files_in(path, _QUERIES):
        for at, query in _queries_of(file, quoting):
            if query.id in seen:
                found = f"duplicate query id {shown(query.id)} (first seen at {seen[query.id]})"
                raise CorpusError(f"{at}: {found}. Remove one.")
            seen[query.id] = at
            yield query


def read_qrels(path: Path, quoting: Quoting | None = None) -> dict[str, dict[str, int]]:
    """Return the judgments of a file or a collection's folder: score by query id and document id."""
    qrels: dict[str, dict[str, int]] = {}
    for file in _files_in(path, _QRELS):
        for at, query_id, doc_id, score in _judgments_of(file, quoting if _format(file) == "csv" else None):
            before = qrels.setdefault(query_id, {}).setdefault(doc_id, score)
            if before != score:
                pair = f"query {shown(query_id)} and document {shown(doc_id)}"
                raise CorpusError(f"{at}: {pair} have the score {score} here and {before} before. Remove one of them.")
    return qrels


def _files_in(path: Path, patterns: Sequence[str]) -> list[Path]:
    if not path.is_dir():
        return [path]
    for pattern in patterns:
        if found := sorted(each for each in path.glob(pattern) if each.is_file()):
            return found
    raise CorpusError(f'The folder "{path}" has none of {", ".join(patterns)}. Name the file itself.')


# Rows of queries and of judgments


def _format(path: Path) -> str:
    """Return the format by the suffix. The default is text with tabs and without a header."""
    return FORMAT_OF_SUFFIX.get(suffix_of(path.name), "tsv")


@lru_cache
def _warn_once(message: str) -> None:
    logger.warning("%s", message)


def _rows(
    path: Path, wanted: Mapping[str, str] | None, quoting: Quoting | None
) -> Iterator[tuple[str, Mapping[str, object]]]:
    """Yield the place and columns of each row. `wanted` has the columns and their roles; None: columns of a query."""

    def choose(names: Sequence[str]) -> Mapping[str, str]:
        if wanted is None:
            return needed_columns([name for name in names if name != "title"], FieldNames())
        for name in wanted:
            require(name, dict.fromkeys(names))
        refuse_repeated(names, wanted)
        return wanted

    source = source_of(FoundFile.found(path), choose, label=str(path), quoting=quoting)
    for record in source.records(0, 1):
        at = place_text(path, record.line, source.unit)
        if record.columns is None:
            raise CorpusError(f"{at}: {record.reason}")
        yield at, record.columns
    for message in source.merged():
        _warn_once(message)


def _texts(path: Path) -> Iterator[tuple[str, str]]:
    """Yield each line that is not blank: its place and its text."""
    for line, raw in enumerate(LineSource(FoundFile.found(path), str(path)).lines(), 1):
        at = place_text(path, line)
        try:
            text = utf8(raw.removeprefix(BYTE_ORDER_MARK) if line == 1 else raw).rstrip("\r\n")
        except BadRow as bad:
            raise CorpusError(f"{at}: {bad}") from bad
        if text.strip():
            yield at, text


# Queries


def _queries_of(path: Path, quoting: Quoting | None) -> Iterator[tuple[str, Query]]:
    at = place_text(path, 1)
    try:
        if _format(path) != "tsv":
            for at, columns in _rows(path, None, quoting):
                yield at, Query(id_in(columns, "_id" if "_id" in columns else "id"), text_in(columns, "text"))
            return
        if quoting == "rfc4180":
            raise UsageError(f"--quoting rfc4180 is for csv; quotes have no meaning in {path}. Omit --quoting.")
        is_trec = False
        for at, text in _topics(_texts(path)):
            is_trec = is_trec or _begins_topic(text)
            yield at, _query_of_topic(text) if is_trec else _query_of_line(text)
    except BadRow as bad:
        raise CorpusError(f"{at}: {bad}") from bad


def _query_of_line(text: str) -> Query:
    query_id, tab, words = text.partition("\t")
    if not tab:
        raise BadRow(f"expected two columns with a tab between them, found {shown(text)}")
    return Query(id_in({"id": query_id}, "id"), words)


# TREC's topics in the classic form: <top>, <num>, <title>, other tags, </top>. The query is the title, with one blank
# between words, without labels (<num> Number: 301, <title> Topic: ...). Closing tags may be missing. XML is not read.


def _begins_topic(text: str) -> bool:
    return text.lstrip().lower().startswith("<top>")


def _topics(texts: Iterator[tuple[str, str]]) -> Iterator[tuple[str, str]]:
    """Join the lines of each topic: up to </top>, the next <top> or the end of the file."""
    lines: list[str] = []
    start = ""
    for at, text in texts:
        if lines and _begins_topic(text):
            yield start, " ".join(lines)
            lines = []
        start = start if lines else at
        lines.append(text)
        if "</top>" in text.lower() or not _begins_topic(lines[0]):
            yield start, " ".join(lines)
            lines = []
    if lines:
        yield start, " ".join(lines)


def _query_of_topic(topic: str) -> Query:
    if not _begins_topic(topic):
        raise BadRow(f"expected <top>, found {shown(topic)}")
    if "</top>" not in topic.lower():
        raise BadRow("the topic has no </top>; is the file cut off?")
    _, *parts = _TAG.split(topic)
    values: dict[str, str] = {}
    for tag, text in zip(parts[::2], parts[1::2], strict=True):
        if tag.lower() == "/top" and text.strip():
            raise BadRow(f"something follows </top>: {shown(text.strip())}")
        if (name := tag.lower()) in values:
            raise BadRow(f"the topic has two <{name}>")
        values[name] = " ".join(_LABEL.sub("", text.strip()).split())
    for name in ("num", "title"):
        if not values.get(name):
            raise BadRow(f"the topic has no <{name}>")
    return Query(id_in(values, "num"), values["title"])


# Judgments


def _judgments_of(path: Path, quoting: Quoting | None) -> Iterator[tuple[str, str, str, int]]:
    at = place_text(path, 1)
    try:
        if _format(path) != "tsv":
            for at, columns in _rows(path, {_QUERY: "id", _DOCUMENT: "id", _SCORE: "kept field"}, quoting):
                yield at, *_judgment(columns)
            return
        for number, (at, text) in enumerate(_texts(path)):
            # Blanks separate columns only in lines without a tab: "Geneva Durben" is an id.
            values = text.split("\t") if "\t" in text else text.split()
            if number or values != _HEADER:
                yield at, *_judgment(_columns_of(text, values))
    except BadRow as bad:
        raise CorpusError(f"{at}: {bad}") from bad


def _columns_of(text: str, values: list[str]) -> dict[str, object]:
    if len(values) == 4:
        del values[1]
    elif len(values) != 3 or "\t" not in text:
        expected = "expected query, document and score with tabs between them, or TREC's four columns"
        raise BadRow(f"{expected}, found {shown(text)}")
    return dict(zip(_HEADER, values, strict=True))


def _judgment(columns: Mapping[str, object]) -> tuple[str, str, int]:
    query_id, doc_id = id_in(columns, _QUERY), id_in(columns, _DOCUMENT)
    require(_SCORE, columns)
    return query_id, doc_id, _score_of(columns[_SCORE])


def _score_of(value: object) -> int:
    if isinstance(value, (int, float, str)) and not isinstance(value, bool):
        try:
            number = float("nan" if "_" in str(value) else value)  # Python reads 1_0 as 10
        except (ValueError, OverflowError):
            number = float("nan")
        if number.is_integer():
            return int(number)
    raise BadRow(f"the score is {shown(value)}; expected an integer")
