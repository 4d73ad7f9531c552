"""Whether the model that a search asks for is the one that an index or a run was made with.

In: the model that was asked for, what a stamp or a manifest remembers. Out: the difference as a sentence, or None.
What counts is the side that makes queries: the commit on the hub, or the bytes of its files, whatever it is called.
To compare bytes the whole folder is hashed, in 0.3 s of CPU for 400 MB; a search without --model hashes nothing.
Settings are not compared: asking with another prompt or weight for missing tokens is a search, not a mistake.
Not covered: a model that nobody asked for by name; then the remembered one is used.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from sparse_ingest.errors import CheckpointError
from sparse_ingest.pipeline import ModelSettings

if TYPE_CHECKING:
    from sparse_ingest.checkpoints.layouts import Checkpoint

WAY_OUT = "Leave out --model (and [model]) to search with the remembered one, or give --force."


class QuerySide(NamedTuple):
    """The checkpoint that queries are made with, as it is remembered."""

    name: str
    revision: str | None
    sha256: str | None

    def __str__(self) -> str:
        if self.revision:
            return f"{self.name} at revision {self.revision[:12]}"
        return f"{self.name} (sha256 {self.sha256[:12]})" if self.sha256 else self.name


def remembered_side(stored: Mapping[str, Any]) -> QuerySide | None:
    """The query side in a stamp or a manifest; None where it names no model."""
    if stored.get("query"):
        of_queries = stored.get("query_side") or {}
        return QuerySide(str(stored["query"]), stored.get("query_revision"), of_queries.get("sha256"))
    if stored.get("document"):
        return QuerySide(str(stored["document"]), stored.get("revision"), stored.get("sha256"))
    return None


def other_model(
    asked: ModelSettings, stored: Mapping[str, Any], vocabulary: str | Callable[[], Sequence[str | None]]
) -> str | None:
    """What is different, with both models named; None when they are the same, or when only one is named at all.

    `vocabulary` is that of the documents, or its hash.
    """
    name, there = asked.query or asked.document, remembered_side(stored)
    if not name or there is None:
        return None
    from sparse_ingest.checkpoints.layouts import read_checkpoint

    revision = asked.query_revision if asked.query else asked.revision
    checkpoint = read_checkpoint(name, revision, code=asked.trust_remote_code)
    if checkpoint.revision and (checkpoint.name, checkpoint.revision) == (there.name, there.revision):
        return None
    # The same files may lie in a folder here and on the hub there.
    if there.sha256 in (checkpoint.sha256, None) and (there.sha256 or checkpoint.name == there.name):
        return None
    from sparse_ingest.cluster.indexes import vocabulary_hash

    here = QuerySide(checkpoint.name, checkpoint.revision, checkpoint.sha256)
    of_documents = vocabulary if isinstance(vocabulary, str) else vocabulary_hash(vocabulary())
    same = _vocabulary_hash(checkpoint) == of_documents
    rest = "its files are others" if same else "even its vocabulary is another, so its tokens mean other words"
    return f"remembered is {there}, given is {here}; {rest}. {WAY_OUT}"


def _vocabulary_hash(checkpoint: Checkpoint) -> str | None:
    from sparse_ingest.cluster.indexes import vocabulary_hash
    from sparse_ingest.queries.weight_table import read_vocabulary

    try:
        return vocabulary_hash(read_vocabulary(checkpoint.query.folder))
    except CheckpointError:
        return None
