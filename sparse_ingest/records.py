"""Records that packages exchange, ids of passages, names of fields, and batches.

Corpora yield `SourceRow`s (each with a `Document`, or the reason why it has none), models and run folders yield
`SparseRows`, the loader yields one `Outcome` per bulk request.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from itertools import islice
from typing import NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
from msgspec import Struct

from sparse_ingest.errors import UsageError, short_repr, shown

PARENT = "parent"  # the field of a passage with the id of its document
MAX_ID_BYTES = 512  # the limit of OpenSearch for `_id`
MAX_NAME = 50_000  # characters of a field's name
MAX_LEVELS = 20  # of lists in lists, and of objects in mapped objects (index.mapping.depth.limit)
# Names that OpenSearch 3.6.0 reserves at the top level of a document; other names may start with an underscore.
METADATA = frozenset(
    "_data_stream_timestamp _feature _field_names _id _ignored _index _nested_path _routing _seq_no _source "
    "_version".split()
)
_ZERO, _INFINITE = 2.0**-150, (2 - 2.0**-24) * 2.0**127  # float32 rounds these to zero and to infinity
S = TypeVar("S", bound=Sized)
T = TypeVar("T")


class Document(NamedTuple):
    """One document: its id, the text that the model reads, and a JSON object of the kept fields."""

    id: str
    text: str
    fields: str


class Query(NamedTuple):
    """One query of a collection."""

    id: str
    text: str


def check_weights(weights: object) -> None:
    """Raise `UsageError` unless the weights of a query are a mapping from tokens to float32 values above zero."""
    if not isinstance(weights, Mapping):
        raise UsageError(f"The query is {short_repr(weights)}; expected a text, or a mapping from tokens to weights.")
    for token, weight in weights.items():
        if not isinstance(token, str):
            raise UsageError(f"The query has the token {short_repr(token)}; expected a string.")
        if not _is_weight(weight):
            raise UsageError(
                f"The query weight of {shown(token)} is {short_repr(weight)}; expected a number above zero within "
                "float32 range."
            )


def _is_weight(value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float | np.floating | np.integer):
        return False
    try:
        return _ZERO < float(value) < _INFINITE
    except OverflowError:  # a large int
        return False


class SourceRow(Struct, frozen=True, gc=False):
    """One row of a corpus. `row` counts from 0 over all files; `line` counts lines or rows from 1 within `file`.

    A row that cannot become a document has `document` None and a `reason`.
    """

    row: int
    file: str
    line: int
    document: Document | None
    reason: str | None
    unit: str = "line"

    @property
    def place(self) -> str:
        """Its place, for messages."""
        return place_text(self.file, self.line, self.unit)


class SparseRows(NamedTuple):
    """Sparse vectors as CSR: row i has the terms `indptr[i]:indptr[i + 1]` of `token_ids` and `weights`.

    `indptr` is int64 of length rows + 1; `token_ids` is uint16 or uint32, ascending within a row; `weights` is
    float16 or float32, all above zero.
    """

    doc_ids: Sequence[str]
    indptr: npt.NDArray[np.int64]
    token_ids: npt.NDArray[np.integer]
    weights: npt.NDArray[np.floating]

    def row(self, index: int) -> tuple[npt.NDArray[np.integer], npt.NDArray[np.floating]]:
        """Return the token ids and weights of one row, as views."""
        start, end = self.indptr[index], self.indptr[index + 1]
        return self.token_ids[start:end], self.weights[start:end]

    def take(self, places: npt.NDArray[np.integer]) -> SparseRows:
        """Return the rows at these places, in this order."""
        lengths = np.diff(self.indptr)[places]
        indptr = np.concatenate(([0], np.cumsum(lengths)))
        terms = np.arange(indptr[-1]) + np.repeat(self.indptr[places] - indptr[:-1], lengths)
        return SparseRows(
            [self.doc_ids[i] for i in places.tolist()], indptr, self.token_ids[terms], self.weights[terms]
        )

    def keep(self, kept: npt.NDArray[np.bool_]) -> SparseRows:
        """Return the rows with the terms for which `kept`, one bool per term, is true."""
        before = np.concatenate(([0], np.cumsum(kept)))
        return SparseRows(self.doc_ids, before[self.indptr], self.token_ids[kept], self.weights[kept])

    @staticmethod
    def joined(parts: Sequence[SparseRows]) -> SparseRows:
        """Return the rows of one or more parts, in their order."""
        return SparseRows(
            [doc_id for part in parts for doc_id in part.doc_ids],
            np.concatenate(([0], np.cumsum(np.concatenate([np.diff(part.indptr) for part in parts])))),
            np.concatenate([part.token_ids for part in parts]),
            np.concatenate([part.weights for part in parts]),
        )


class Refusal(NamedTuple):
    """A document that the cluster refused. `status` is the HTTP status of its item."""

    doc_id: str
    shard: int
    row: int
    status: int
    reason: str


class Outcome(NamedTuple):
    """The result of one bulk request with documents of one shard: each was acknowledged or refused."""

    shard: int
    acknowledged: int
    refused: list[Refusal]

    @property
    def documents(self) -> int:
        """The number of documents of the request."""
        return self.acknowledged + len(self.refused)


class TermShare(NamedTuple):
    """The contribution of one token to a score: the product of its query and document weights."""

    token: str
    query_weight: float
    document_weight: float
    contribution: float


def place_text(file: object, number: int, unit: str = "line") -> str:
    """Return the place of a line or row in a file, for messages: `articles.jsonl:3`, or `products.parquet: row 7`."""
    return f"{file}:{number}" if unit == "line" else f"{file}: {unit} {number}"


def field_path(name: str) -> str:
    """Return the path of a field in OpenSearch, which ignores dots at the end of a name."""
    return name.rstrip(".")


def is_within(path: str, other: str) -> bool:
    """Return whether a path is `other` or inside it."""
    return path == other or path.startswith(f"{other}.")


def refused_name(name: str, *, inner: bool = False) -> str | None:
    """Return why OpenSearch 3.6.0 refuses a field of this name, `inner`: in an object that the index maps; or None."""
    if not name:
        return "an empty name"
    if name in METADATA and not inner:
        return "a metadata field"
    if len(name) > MAX_NAME:
        return f"longer than {MAX_NAME:,} characters"
    if "." not in name:
        return None
    # Blank as in Java, which does not include four characters that are blank in Python.
    blank = (all(c.isspace() and c not in "\x85\xa0\u2007\u202f" for c in part) for part in field_path(name).split("."))
    return "nothing between or before its dots" if any(blank) else None


def passage_id(doc_id: str, number: int) -> str:
    """Return the id of a passage, unique if document ids are."""
    return f"{doc_id}#{number}"


def document_id(passage: str) -> str:
    """Return the id of a passage's document."""
    return passage.rpartition("#")[0]


def passage_number(passage: str) -> int:
    """Return the number of a passage in its document, from 0."""
    return int(passage.rpartition("#")[2])


def batched(values: Iterable[T], most: int) -> Iterator[list[T]]:
    """Yield lists of `most` values; the last one may be shorter."""
    waiting = iter(values)
    while batch := list(islice(waiting, most)):
        yield batch


def in_batches(sequences: Iterable[S], most: int, most_size: int) -> Iterator[list[S]]:
    """Yield lists of at most `most` texts or arrays with a total length of `most_size`; a longer one is alone."""
    batch: list[S] = []
    size = 0
    for sequence in sequences:
        if batch and (len(batch) == most or size + len(sequence) > most_size):
            yield batch
            batch, size = [], 0
        batch.append(sequence)
        size += len(sequence)
    if batch:
        yield batch
