"""The other two parts of a test collection: queries, and the judgements of which document answers which.

In: a file, or the BEIR or MTEB folder that holds it. Queries are JSON lines (`_id` or `id`, `text`) or lines of
`id<TAB>text`. Judgements are BEIR's table (query, document, score, with or without its header), TREC's four columns
or MTEB's JSON lines. Each may be gzip, by the suffix .gz. Out: queries in order; judgements as
`{query id: {document id: score}}`.

A query or a judgement that cannot be read is an error: leaving one out would change every figure.

Not covered: the corpus (files.py), and whether queries, judgements and corpus fit together.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from sparse_ingest.corpora.documents import BadRow, columns_there, id_in, json_object, shown, text_in, utf8
from sparse_ingest.corpora.files import BYTE_ORDER_MARK, FORMAT_OF_SUFFIX, read_lines
from sparse_ingest.errors import CorpusError
from sparse_ingest.records import Query

_QUERIES = ("queries.jsonl", "queries.jsonl.gz", "queries.tsv")
_QRELS = ("qrels/test.tsv", "qrels.jsonl", "qrels.jsonl.gz", "qrels/test.jsonl")
_HEADER = ["query-id", "corpus-id", "score"]


def read_queries(path: Path) -> Iterator[Query]:
    """The queries of a file or a collection's folder, in order."""
    path = _file_in(path, _QUERIES)
    is_json = _is_json(path)
    lines: dict[str, int] = {}
    for line, raw in _numbered_lines(path):
        try:
            query = _json_query(raw) if is_json else _tab_query(raw)
            if query is None:
                continue
            if query.id in lines:
                raise BadRow(f"duplicate query id {shown(query.id)}: first at line {lines[query.id]}")
        except BadRow as bad:
            raise CorpusError(f"{path} line {line}: {bad}") from bad
        lines[query.id] = line
        yield query


def read_qrels(path: Path) -> dict[str, dict[str, int]]:
    """The judgements of a file or a collection's folder: score by query id and document id."""
    path = _file_in(path, _QRELS)
    is_json = _is_json(path)
    qrels: dict[str, dict[str, int]] = {}
    for line, raw in _numbered_lines(path):
        try:
            judgement = _json_judgement(raw) if is_json else _table_judgement(raw, first=line == 1)
            if judgement is None:
                continue
            query_id, doc_id, score = judgement
            before = qrels.setdefault(query_id, {}).setdefault(doc_id, score)
            if before != score:
                pair = f"query {shown(query_id)} and document {shown(doc_id)}"
                raise BadRow(f"{pair} have the score {score} here and {before} before")
        except BadRow as bad:
            raise CorpusError(f"{path} line {line}: {bad}") from bad
    return qrels


def _file_in(path: Path, names: tuple[str, ...]) -> Path:
    if not path.is_dir():
        return path
    for name in names:
        if (path / name).is_file():
            return path / name
    raise CorpusError(f'The folder "{path}" holds none of {", ".join(names)}. Name the file itself.')


def _is_json(path: Path) -> bool:
    return Path(path.name.lower().removesuffix(".gz")).suffix in FORMAT_OF_SUFFIX


def _numbered_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    for line, raw in enumerate(read_lines(path), 1):
        yield line, raw.removeprefix(BYTE_ORDER_MARK) if line == 1 else raw


def _json_query(raw: bytes) -> Query | None:
    columns = json_object(raw)
    if columns is None:
        return None
    return Query(id_in(columns, "_id" if "_id" in columns else "id"), text_in(columns, "text"))


def _tab_query(raw: bytes) -> Query | None:
    line = utf8(raw).rstrip("\r\n")
    if not line.strip():
        return None
    query_id, tab, text = line.partition("\t")
    if not tab:
        raise BadRow(f"two columns with a tab between them were expected, found {shown(line)}")
    return Query(id_in({"id": query_id}, "id"), text)


def _json_judgement(raw: bytes) -> tuple[str, str, int] | None:
    columns = json_object(raw)
    if columns is None:
        return None
    query_name, doc_name, score_name = _HEADER
    query_id, doc_id = id_in(columns, query_name), id_in(columns, doc_name)
    if score_name not in columns:
        raise BadRow(f'no column "{score_name}"; {columns_there(columns)}')
    return query_id, doc_id, _score_of(columns[score_name])


def _table_judgement(raw: bytes, *, first: bool) -> tuple[str, str, int] | None:
    line = utf8(raw).rstrip("\r\n")
    if not line.strip():
        return None
    # Ids may hold blanks ("Geneva Durben"): they part columns only where no tab does, as in TREC's files.
    columns = line.split("\t") if "\t" in line else line.split()
    if first and columns == _HEADER:
        return None
    if len(columns) == 4:
        query_id, _, doc_id, score = columns
    elif len(columns) == 3 and "\t" in line:
        query_id, doc_id, score = columns
    else:
        expected = "query, document and score with tabs between them, or TREC's four columns, were expected"
        raise BadRow(f"{expected}, found {shown(line)}")
    query_name, doc_name, _ = _HEADER
    return id_in({query_name: query_id}, query_name), id_in({doc_name: doc_id}, doc_name), _score_of(score)


def _score_of(value: object) -> int:
    if isinstance(value, (int, float, str)) and not isinstance(value, bool):
        try:
            number = float(value)
        except (ValueError, OverflowError):
            number = float("nan")
        if number.is_integer():
            return int(number)
    raise BadRow(f"the score is {shown(value)}; a whole number was expected")
