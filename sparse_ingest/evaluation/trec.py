"""Read and write TREC run files: `query Q0 document rank score tag`, one line per document. Read evaluations as JSON.

trec_eval uses the score, not the rank, so scores are written with nine digits, which distinguish all float32 values.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Container, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from sparse_ingest.errors import CorpusError, UsageError, first_line
from sparse_ingest.records import place_text
from sparse_ingest.searching.hits import Ranked
from sparse_ingest.storage.durable import atomic_file
from sparse_ingest.storage.foreign_json import read_json

TAG = "sparse-ingest"


@dataclass(frozen=True)
class _Evaluation:
    """The part of the JSON of `evaluate` that is compared."""

    per_query: dict[str, dict[str, float]]


def trec_lines(ranking: Ranked) -> str:
    """Return the lines of a ranking. Raise `CorpusError` if an id contains white space."""
    for kind, one in (("query id", ranking.query_id), *(("document id", one) for one in ranking.doc_ids)):
        _refuse_unfit(kind, one)
    found = enumerate(zip(ranking.doc_ids, ranking.scores, strict=True), start=1)
    return "".join(f"{ranking.query_id} Q0 {doc_id} {rank} {score:.9g} {TAG}\n" for rank, (doc_id, score) in found)


def _refuse_unfit(kind: str, name: str) -> None:
    if len(name.split()) != 1 or name != name.strip() or "\0" in name:
        raise CorpusError(
            f"The {kind} {name!r} cannot be in a TREC run file, whose columns are separated by white space. Use "
            "`search --json` instead, or change the ids."
        )


def read_trec_run(path: Path, wanted: Container[str]) -> dict[str, dict[str, float]]:
    """Return the scores in a run file by document, for the wanted queries.

    Raise `CorpusError` if a line does not have six columns, its score is not a number, or a document is repeated.
    """
    found: dict[str, dict[str, float]] = {}
    # Invalid bytes can only be in an id, which then matches no other.
    with path.open(encoding="utf-8-sig", errors="replace") as file:
        for number, line in enumerate(file, start=1):
            if not (columns := line.split()):
                continue
            try:
                query_id, _, doc_id, _, score, _ = columns
                value = float(score)
                if math.isnan(value):
                    raise ValueError
            except ValueError:
                raise CorpusError(
                    f"{place_text(path, number)}: expected six columns (query Q0 document rank score tag) and a number "
                    f"as score, found {line.strip()[:80]!r}."
                ) from None
            if query_id in wanted:
                scores = found.setdefault(query_id, {})
                if doc_id in scores:
                    twice = f"query {query_id!r} has the document {doc_id!r} twice"
                    raise CorpusError(f"{place_text(path, number)}: {twice}. Remove one line.")
                scores[doc_id] = value
    return found


def read_per_query(path: Path) -> dict[str, dict[str, float]] | None:
    """Return the values by measure and query in the output of `evaluate --json --per-query`; None for other files.

    Raise `CorpusError` if it is JSON without these values.
    """
    if not path.is_file():  # a pipe can be read only once
        return None
    with path.open("rb") as file:
        if not file.read(1024).lstrip().startswith(b"{"):
            return None
    try:
        return read_json(path, _Evaluation).per_query
    except ValueError as error:
        raise CorpusError(
            f"{path} is not the JSON of an evaluation with values by query: {first_line(error)}. Create it with "
            "`evaluate --json --per-query`, or give a TREC run file."
        ) from error


def written(path: Path | str | None, query_ids: Iterable[str]) -> contextlib.AbstractContextManager[IO[bytes] | None]:
    """Open a file that is created when the block is done; None without a path.

    Raise `UsageError` if the folder does not exist, `CorpusError` if the id of a query contains white space.
    """
    if path is None:
        return contextlib.nullcontext()
    for query_id in query_ids:
        _refuse_unfit("query id", query_id)
    path = Path(path)
    if not path.parent.is_dir():
        raise UsageError(f"--trec-run {path}: the folder {path.parent} does not exist. Create it first.")
    return atomic_file(path)
