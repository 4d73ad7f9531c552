"""The finished shards of a run read whole, and refused when they are not what the run says they are.

In: a run, some of its shards. Out: their parts, in order. A shard whose SHA-256 or number of rows is another than that
of its file in done/ was damaged, or comes from somewhere else.
Not covered: what the parts hold (an index has its own rules for that).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from sparse_ingest.errors import RunError
from sparse_ingest.records import SparseRows
from sparse_ingest.runs.run import Run
from sparse_ingest.runs.shards import read_documents


class CheckedPart(NamedTuple):
    """One row group without what only encode needs."""

    vectors: SparseRows
    fields: list[str]


def checked_parts(run: Run, shards: Iterable[int]) -> Iterator[CheckedPart]:
    """The parts of some finished shards.

    Raises:
        RunError: a shard is damaged.
    """
    for shard in shards:
        path, record = run.shard_path(shard), run.done(shard)
        if record is None:
            raise RunError(f"{path} is missing, its file in done/ is there. Delete that file and encode again.")
        if not {"sha256", "rows"} <= record.keys():
            raise RunError(f"The file of {path} in done/ names no sha256 or rows. Delete that file and encode again.")
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if digest != record["sha256"]:
            raise RunError(
                f"{path} has SHA-256 {digest[:12]}, its file in done/ says {str(record['sha256'])[:12]}. "
                "The shard is damaged: delete that file and encode again, or copy the run anew."
            )
        rows = 0
        for part in map(CheckedPart._make, read_documents(path)):
            rows += len(part.fields)
            yield part
        if rows != record["rows"]:
            raise RunError(
                f"{path} holds {rows} documents, its file in done/ says {record['rows']}. "
                "The run is damaged: delete that file and encode again."
            )
