"""Run files as trec_eval reads them: `query Q0 document rank score tag`, a line a document.

In: rankings, or such a file. Out: lines, or `{query id: {document id: score}}`. trec_eval looks at the score and not at
the rank, so scores are written with nine digits, which distinguish any two float32 values.
"""

from __future__ import annotations

import contextlib
from collections.abc import Container, Iterable
from pathlib import Path
from typing import IO

from sparse_ingest.errors import CorpusError, UsageError
from sparse_ingest.searching.hits import Ranked
from sparse_ingest.storage.durable import atomic_file

TAG = "sparse-ingest"


def trec_lines(ranking: Ranked, tag: str = TAG) -> str:
    """Return the lines of a ranking.

    Raises:
        CorpusError: such a file cannot hold an id.
    """
    for kind, one in (("query id", ranking.query_id), ("tag", tag), *(("document id", one) for one in ranking.doc_ids)):
        _refuse_unfit(kind, one)
    found = enumerate(zip(ranking.doc_ids, ranking.scores, strict=True), start=1)
    return "".join(f"{ranking.query_id} Q0 {doc_id} {rank} {score:.9g} {tag}\n" for rank, (doc_id, score) in found)


def _refuse_unfit(kind: str, name: str) -> None:
    if len(name.split()) != 1 or name != name.strip() or "\0" in name:
        raise CorpusError(
            f"The {kind} {name!r} cannot be in a TREC run file, whose columns are separated by white space. Omit the "
            "run file (`search --json` has the same rankings), or give the collection other ids."
        )


def read_trec_run(path: Path, wanted: Container[str]) -> dict[str, dict[str, float]]:
    """The scores in a run file by document, for the queries that are wanted.

    Raises:
        CorpusError: a line does not have six columns, or its score is not a number.
    """
    found: dict[str, dict[str, float]] = {}
    # A wrong byte does not stop the reading: it can only be in an id, which then matches no other.
    with path.open(encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, start=1):
            if not (columns := line.split()):
                continue
            try:
                query_id, _, doc_id, _, score, _ = columns
                value = float(score)
            except ValueError:
                raise CorpusError(
                    f"{path} line {number}: six columns with the score in the fifth were expected (query Q0 document "
                    f"rank score tag), found {line.strip()[:80]!r}."
                ) from None
            if query_id in wanted:
                found.setdefault(query_id, {})[doc_id] = value
    return found


def written(path: Path | str | None, query_ids: Iterable[str]) -> contextlib.AbstractContextManager[IO[bytes] | None]:
    """Open a file that gets its name when the block is done, complete or not at all; None without a path.

    Raises:
        UsageError: the folder does not exist.
        CorpusError: such a file cannot hold the id of a query.
    """
    if path is None:
        return contextlib.nullcontext()
    for query_id in query_ids:
        _refuse_unfit("query id", query_id)
    path = Path(path)
    if not path.parent.is_dir():
        raise UsageError(f"--trec-run {path}: the folder {path.parent} does not exist. Create it first.")
    return atomic_file(path)
