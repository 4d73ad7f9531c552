"""Sparse rows as the bytes of bulk requests, straight from the arrays.

In: SparseRows with the JSON object of each document's fields. Out: `BulkRequest`s of at most 8 MiB, one `index`
operation with an id per document. A token is escaped once per vocabulary and a weight written once per value that
the index can keep, so a document costs two table look-ups per term and one join; no dict is ever built. A weight
is the shortest decimal that the index keeps as the same 9 bits: the postings are identical, at half the bytes.
Not covered: sending (sending.py).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from fractions import Fraction
from itertools import chain
from json.encoder import encode_basestring
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from sparse_ingest.errors import PipelineError, RunError
from sparse_ingest.opensearch.scores import DROPPED_BITS, LOWEST_WEIGHT, weight_codes
from sparse_ingest.records import SparseRows

MAX_BYTES = 8 << 20  # managed services refuse requests from 10 MiB
MAX_DOCUMENTS = 5000
_CODES = 1 << 16


class BulkRequest(NamedTuple):
    """Some documents to send: the operation of each (two lines of JSON), and their source rows and ids."""

    operations: list[bytes]
    documents: list[tuple[int, str]]

    @property
    def body(self) -> bytes:
        """What goes over the wire."""
        return b"".join(self.operations)

    def part(self, places: Sequence[int]) -> BulkRequest:
        """The documents at these places as a request of their own."""
        return BulkRequest([self.operations[place] for place in places], [self.documents[place] for place in places])


class BodyWriter:
    """Writes the documents of one vocabulary into one field."""

    def __init__(self, vocabulary: Sequence[str | None], field: str) -> None:
        self._field = field
        self._opening = encode_basestring(field).encode() + b":{"
        # None stays None, so that a weight without a token is noticed and not written as a token "None".
        self._tokens = [None if token is None else encode_basestring(token).encode() + b":" for token in vocabulary]
        self._decimals: list[bytes] = [b""] * _CODES
        self._known = np.zeros(_CODES, dtype=np.bool_)

    def operations(self, vectors: SparseRows, fields: Sequence[str]) -> Iterator[bytes]:
        """The two lines of each document, in order.

        Raises:
            PipelineError: a document carries a field of the same name as the sparse field.
            RunError: a token id or a weight that no encoder writes: the run is damaged.
        """
        pieces = self._pieces(vectors)
        borders = (2 * vectors.indptr).tolist()
        for place, (doc_id, carried) in enumerate(zip(vectors.doc_ids, fields, strict=True)):
            refuse_clash(carried, self._field)
            # Every weight ends with a comma: the last one of a document is cut off again.
            terms = b"".join(pieces[borders[place] : borders[place + 1]])[:-1]
            # A line break between the parts of a JSON object is only white space, but it would end the operation.
            object_start = carried.strip().replace("\n", " ").encode()[:-1].rstrip()
            comma = b"" if object_start == b"{" else b","
            yield b'{"index":{"_id":%b}}\n%b%b%b%b}}\n' % (
                encode_basestring(doc_id).encode(), object_start, comma, self._opening, terms,
            )  # fmt: skip

    def _pieces(self, vectors: SparseRows) -> list[bytes]:
        """Token, weight, token, weight, … of all rows."""
        if not len(vectors.weights):
            return []
        weights, token_ids = vectors.weights, vectors.token_ids
        # Written so that a NaN fails as well.
        if not (weights.min() >= LOWEST_WEIGHT and weights.max() < np.inf):
            raise RunError(
                f"The run holds weights from {weights.min()} to {weights.max()}; an index takes finite weights from "
                f"{LOWEST_WEIGHT:.8g}. The run is damaged: encode it again."
            )
        if token_ids.max() >= len(self._tokens):
            raise RunError(
                f"The run holds token id {token_ids.max()}, but vocab.json has {len(self._tokens)} tokens. "
                "The run is damaged: encode it again."
            )
        codes = weight_codes(weights)
        self._write_decimals(codes)
        tokens = list(map(self._tokens.__getitem__, token_ids.tolist()))
        if None in tokens:
            raise RunError(
                f"The run has a weight for token id {token_ids[tokens.index(None)]}, which is no token by vocab.json. "
                "The run is damaged: encode it again."
            )
        values = map(self._decimals.__getitem__, codes.tolist())
        return list(chain.from_iterable(zip(tokens, values, strict=True)))  # type: ignore[arg-type]

    def _write_decimals(self, codes: npt.NDArray[np.uint32]) -> None:
        for code in np.unique(codes[~self._known[codes]]).tolist():
            self._decimals[code] = shortest_decimal(code).encode() + b","
            self._known[code] = True


def bulk_requests(
    documents: Iterable[tuple[int, str, bytes]], *, max_bytes: int = MAX_BYTES, max_documents: int = MAX_DOCUMENTS
) -> Iterator[BulkRequest]:
    """Gather operations, each with its row and id, into requests below both limits (a single one may exceed them)."""
    request = BulkRequest([], [])
    size = 0
    for row, doc_id, operation in documents:
        if request.operations and (size + len(operation) > max_bytes or len(request.operations) >= max_documents):
            yield request
            request, size = BulkRequest([], []), 0
        request.operations.append(operation)
        request.documents.append((row, doc_id))
        size += len(operation)
    if request.operations:
        yield request


def refuse_clash(fields: str, field: str) -> None:
    """Refuse a document's JSON object of fields when it has the sparse field's own name.

    Raises:
        PipelineError: it has.
    """
    # Parsing every object would cost more than writing it: look for the name first.
    if (encode_basestring(field) in fields or json.dumps(field) in fields) and field in json.loads(fields):
        raise PipelineError(
            f"The documents carry a field {field!r}, which is also the name of the sparse field. "
            "Choose another one with --field, or leave that field out with encode --keep."
        )


def shortest_decimal(code: int) -> str:
    """The shortest decimal that a rank_features field keeps as `code`, whatever way a parser rounds.

    Both ends of the range are float32 values of that code, so any rounding to float32, also by way of double, stays
    inside: a decimal never sits on the border of a 9-bit step.
    """
    lowest = np.array([code << DROPPED_BITS], dtype=np.uint32)
    low, high = (Fraction(float(edge.view(np.float32)[0])) for edge in (lowest, lowest | ((1 << DROPPED_BITS) - 1)))
    power = len(str(high.numerator)) - len(str(high.denominator)) + 1
    while True:
        unit = Fraction(10) ** power
        digits = -(-low // unit)
        if digits and digits * unit <= high:
            return _spelled(int(digits), power)
        power -= 1


def _spelled(digits: int, power: int) -> str:
    """digits · 10^power in the shorter of its two spellings, without an exponent if they are equal."""
    short = f"{digits}e{power}"
    if power >= 0:
        plain = str(digits) + "0" * power
    else:
        padded = str(digits).rjust(1 - power, "0")
        plain = f"{padded[:power]}.{padded[power:]}"
    return plain if len(plain) <= len(short) else short
