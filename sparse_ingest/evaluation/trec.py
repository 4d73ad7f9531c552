"""Run files as trec_eval reads them: `query Q0 document rank score tag`, a line a document.

In: rankings, or such a file. Out: lines, or `{query id: {document id: score}}`. trec_eval looks at the score and not at
the rank, so scores are written with nine digits, which distinguish any two float32 values.
"""

from __future__ import annotations

import contextlib
from collections.abc import Container
from pathlib import Path
from typing import IO

from sparse_ingest.errors import CorpusError, UsageError
from sparse_ingest.searching.hits import Ranked
from sparse_ingest.storage.durable import atomic_file

TAG = "sparse-ingest"


def trec_lines(ranking: Ranked, tag: str = TAG) -> str:
    """Return the lines of a ranking.

    Raises:
        CorpusError: an id holds a blank, which such a file cannot hold.
    """
    lines = []
    for rank, (doc_id, score) in enumerate(zip(ranking.doc_ids, ranking.scores, strict=True), start=1):
        lines.append(f"{ranking.query_id} Q0 {doc_id} {rank} {score:.9g} {tag}\n")
        if len(lines[-1].split()) != 6:
            wrong = next(one for one in (ranking.query_id, doc_id, tag) if len(one.split()) != 1)
            raise CorpusError(
                f"The id {wrong!r} holds a blank, and a TREC run file parts its columns at blanks. "
                "Leave the run file out (`search --json` has the same rankings), or give the collection other ids."
            )
    return "".join(lines)


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


def written(path: Path | str | None) -> contextlib.AbstractContextManager[IO[bytes] | None]:
    """Open a file that gets its name when the block is done, complete or not at all; None without a path.

    Raises:
        UsageError: the folder does not exist.
    """
    if path is None:
        return contextlib.nullcontext()
    path = Path(path)
    if not path.parent.is_dir():
        raise UsageError(f"--trec-run {path}: the folder {path.parent} does not exist. Create it first.")
    return atomic_file(path)
