"""Sparse vectors in memory: CSR arrays with the vocabulary that names their tokens.

In: arrays, the `SparseRows` of a run, or dictionaries from token to weight. Out: dictionaries, lists of tokens and
weights, a scipy matrix, or the dot products of two sets of vectors. Needs only numpy. Text is encoded in encoder.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any, TypeAlias, overload

import numpy as np
import numpy.typing as npt

from sparse_ingest.errors import UsageError, needs_extra
from sparse_ingest.models.dot_products import Postings, query_token_mask
from sparse_ingest.records import SparseRows

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix

SHOWN_TOKENS = 5  # of the first row, in a repr
# Documents scored together: their terms are sorted by token, about 60 MB for 200 terms per document.
DOCUMENTS_AT_ONCE = 1 << 14

Places: TypeAlias = slice | Sequence[int] | npt.NDArray[np.integer] | npt.NDArray[np.bool_]


@dataclass(frozen=True, eq=False, repr=False)
class SparseVectors:
    """Sparse vectors of one model, a row for each text.

    `vectors[i]` is a dictionary from token to weight, heaviest first, equal weights by token id. A slice, an array of
    row numbers or a mask gives `SparseVectors`. Iteration yields the dictionaries.

    Attributes:
        indptr: int64 `[rows + 1]`; row i has the terms `indptr[i]:indptr[i + 1]` of the next two arrays.
        token_ids: int32 `[terms]`, ascending within a row.
        weights: float32 `[terms]`.
        vocabulary: the token string of each id, None where an id has no token; its length is the width of the model.
        doc_ids: the id of each row, or None.

    Raises:
        UsageError: the lengths of the arrays disagree, or a token id is outside the vocabulary.
    """

    indptr: npt.NDArray[np.int64]
    token_ids: npt.NDArray[np.int32]
    weights: npt.NDArray[np.float32]
    vocabulary: Sequence[str | None]
    doc_ids: Sequence[str] | None = None

    def __post_init__(self) -> None:
        terms, rows = len(self.weights), len(self.indptr) - 1
        if rows < 0 or self.indptr[0] != 0 or self.indptr[-1] != terms or len(self.token_ids) != terms:
            raise UsageError(
                f"Not CSR arrays: indptr has length {len(self.indptr)}, token_ids {len(self.token_ids)} and "
                f"weights {terms}. indptr must start with 0 and end with the number of token ids and weights."
            )
        if self.doc_ids is not None and len(self.doc_ids) != rows:
            raise UsageError(f"{len(self.doc_ids)} document ids for {rows} rows; expected one for each row.")
        if terms and not 0 <= self.token_ids.min() <= self.token_ids.max() < len(self.vocabulary):
            raise UsageError(
                f"Token ids from {self.token_ids.min()} to {self.token_ids.max()}, but the vocabulary has "
                f"{len(self.vocabulary)} tokens. Pass the vocabulary of the model that encoded the texts."
            )

    @classmethod
    def from_rows(cls, rows: SparseRows, vocabulary: Sequence[str | None]) -> SparseVectors:
        """Return the vectors of a run's rows; float16 weights become the same numbers in float32.

        Raises:
            UsageError: a token id is outside the vocabulary.
        """
        token_ids, weights = rows.token_ids.astype(np.int32, copy=False), rows.weights.astype(np.float32, copy=False)
        return cls(rows.indptr.astype(np.int64), token_ids, weights, vocabulary, rows.doc_ids)

    @classmethod
    def from_dicts(
        cls, weights: Sequence[Mapping[str, float]], vocabulary: Sequence[str | None] | None = None
    ) -> SparseVectors:
        """Return the vectors of dictionaries from token to weight.

        Args:
            weights: one dictionary for each row.
            vocabulary: the token string of each id; None numbers the tokens in the order in which they appear.

        Raises:
            UsageError: a row is not a dictionary, or has a token that is not in the vocabulary.
        """
        for row, one in enumerate(weights):
            if not isinstance(one, Mapping):
                raise UsageError(f"Row {row} is {type(one).__name__}; expected a dictionary from token to weight.")
        if vocabulary is None:
            vocabulary = list(dict.fromkeys(token for one in weights for token in one))
        ids = {token: token_id for token_id, token in enumerate(vocabulary) if token is not None}
        indptr = np.concatenate(([0], np.cumsum([len(one) for one in weights], dtype=np.int64))).astype(np.int64)
        try:
            token_ids = np.array([ids[token] for one in weights for token in one], dtype=np.int32)
        except KeyError as error:
            raise UsageError(f"The vocabulary of {len(ids)} tokens has no token {error.args[0]!r}.") from error
        values = np.array([weight for one in weights for weight in one.values()], dtype=np.float32)
        order = np.lexsort((token_ids, np.repeat(np.arange(len(weights)), np.diff(indptr))))
        return cls(indptr, token_ids[order], values[order], vocabulary)

    def __len__(self) -> int:
        return len(self.indptr) - 1

    @overload
    def __getitem__(self, place: int | np.integer[Any]) -> dict[str, float]: ...

    @overload
    def __getitem__(self, place: Places) -> SparseVectors: ...

    def __getitem__(self, place: int | np.integer[Any] | Places) -> dict[str, float] | SparseVectors:
        if isinstance(place, int | np.integer):
            return dict(self._pairs(range(len(self))[place]))
        if not isinstance(place, slice):
            place = np.asarray(place) if len(place) else np.empty(0, dtype=np.int64)
        places = np.arange(len(self))[place]
        taken = SparseVectors.from_rows(self.to_rows().take(places), self.vocabulary)
        return taken if self.doc_ids is not None else replace(taken, doc_ids=None)

    def __iter__(self) -> Iterator[dict[str, float]]:
        return (dict(self._pairs(row)) for row in range(len(self)))

    def __repr__(self) -> str:
        rows, terms, width = len(self), len(self.weights), len(self.vocabulary)
        shape = f"{rows:,} {'row' if rows == 1 else 'rows'} of {width:,} tokens, {terms:,} non-zero weights"
        if not rows:
            return f"<SparseVectors: {shape}>"
        shown = self._pairs(0, SHOWN_TOKENS)
        first = ", ".join(f"{token!r}: {weight:.3g}" for token, weight in shown)
        more = ", ..." if self.indptr[1] > len(shown) else ""
        return f"<SparseVectors: {shape}; [0] {{{first}{more}}}>"

    def to_dicts(self) -> list[dict[str, float]]:
        """Return a dictionary from token to weight for each row, heaviest first."""
        return list(self)

    def to_rows(self) -> SparseRows:
        """Return the vectors in the format of runs; without `doc_ids` the ids are "0", "1", "2", ..."""
        doc_ids = [str(row) for row in range(len(self))] if self.doc_ids is None else self.doc_ids
        narrow = np.uint16 if len(self.vocabulary) <= 1 << 16 else np.uint32
        return SparseRows(doc_ids, self.indptr, self.token_ids.astype(narrow), self.weights)

    def to_scipy(self) -> csr_matrix:
        """Return a copy as a float32 `scipy.sparse.csr_matrix` of shape `[rows, len(vocabulary)]`.

        Raises:
            MissingExtraError: scipy is not installed.
        """
        with needs_extra("evaluate", "SparseVectors.to_scipy()"):
            from scipy.sparse import csr_matrix
        shape = (len(self), len(self.vocabulary))
        return csr_matrix((self.weights, self.token_ids, self.indptr), shape=shape, copy=True)

    def decode(self, top_k: int | None = None) -> list[list[tuple[str, float]]]:
        """Return the tokens and weights of each row, heaviest first, equal weights by token id.

        Args:
            top_k: how many of a row; None for all.

        Raises:
            UsageError: top_k is not an integer above zero.
        """
        limit = positive_integer("top_k", top_k)
        return [self._pairs(row, limit) for row in range(len(self))]

    def _pairs(self, row: int, limit: int | None = None) -> list[tuple[str, float]]:
        terms = slice(int(self.indptr[row]), int(self.indptr[row + 1]))
        token_ids, weights = self.token_ids[terms], self.weights[terms]
        order = np.argsort(-weights, kind="stable")[:limit]
        tokens = (str(self.vocabulary[token_id]) for token_id in token_ids[order].tolist())
        return list(zip(tokens, weights[order].tolist(), strict=True))


Vectors: TypeAlias = SparseVectors | Mapping[str, float] | Sequence[Mapping[str, float]]


def as_vectors(vectors: Vectors) -> SparseVectors:
    """Return vectors from one dictionary from token to weight, or a list of them. Raise `UsageError` for others."""
    if isinstance(vectors, SparseVectors):
        return vectors
    if isinstance(vectors, Mapping):
        return SparseVectors.from_dicts([vectors])
    if isinstance(vectors, Sequence) and not isinstance(vectors, str | bytes):
        return SparseVectors.from_dicts(vectors)
    raise UsageError(
        f"Not sparse vectors: {type(vectors).__name__}; expected SparseVectors, a dictionary from token to weight, or "
        "a list of such dictionaries."
    )


def similarity(queries: Vectors, documents: Vectors) -> npt.NDArray[np.float32]:
    """Return the dot product of each query with each document; weights are matched by token string.

    Scores equal Lucene's and `search`'s (dot_products.py).

    Args:
        queries: SparseVectors, a dictionary from token to weight, or a list of such dictionaries.
        documents: the same. Memory grows with the result and with one block of documents.

    Returns:
        float32 `[queries, documents]`.

    Raises:
        UsageError: an argument is not sparse vectors.
    """
    left, right = as_vectors(queries), as_vectors(documents)
    terms = SparseRows((), left.indptr, _ids_in(right.vocabulary, left), left.weights)
    terms = terms.keep(terms.token_ids >= 0)
    token_ids = terms.token_ids.astype(np.uint32)
    scores = np.zeros((len(left), len(right)), dtype=np.float32)
    for first in range(0, len(right), DOCUMENTS_AT_ONCE):
        indptr = right.indptr[first : first + DOCUMENTS_AT_ONCE + 1]
        block = slice(int(indptr[0]), int(indptr[-1]))
        rows = SparseRows((), indptr, right.token_ids[block], right.weights[block])
        postings = Postings.of(rows, query_token_mask(token_ids))
        for row, (start, end) in enumerate(pairwise(terms.indptr.tolist())):
            found, values = postings.scores(token_ids[start:end], terms.weights[start:end])
            scores[row, first + found] = values
    return scores


def positive_integer(name: str, value: int | None) -> int | None:
    """Return an option that is None or an integer above zero. Raise `UsageError` for other values."""
    if value is not None and (isinstance(value, bool) or not isinstance(value, int | np.integer) or value <= 0):
        raise UsageError(f"{name} is {value!r}; expected an integer above zero, or None.")
    return None if value is None else int(value)


def _ids_in(vocabulary: Sequence[str | None], vectors: SparseVectors) -> npt.NDArray[np.int32]:
    """Return the id of the token of each term in another vocabulary, -1 if it lacks the token."""
    if vocabulary is vectors.vocabulary or list(vocabulary) == list(vectors.vocabulary):
        return vectors.token_ids
    ids = {token: token_id for token_id, token in enumerate(vocabulary) if token is not None}
    renumbered = [-1 if token is None else ids.get(token, -1) for token in vectors.vocabulary]
    return np.array(renumbered, dtype=np.int32)[vectors.token_ids]
