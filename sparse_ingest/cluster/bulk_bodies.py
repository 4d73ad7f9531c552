"""Sparse rows as the bytes of bulk requests, straight from the arrays.

In: the rows, vectors and fields of a shard's parts. Out: `BulkRequest`s below a limit of bytes and of documents, one
operation with an id per document. A token is escaped once per vocabulary and a weight spelled once per value that
the index can keep; a request is then one gather of such pieces by Arrow, and nothing in Python is done per term, four
times faster than joining the pieces in Python. A weight is the shortest decimal that the index keeps as the same 9
bits: the postings are identical, at half the bytes.
Not covered: sending (sending.py); the spelling of weights for sparse_vector fields.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from decimal import Decimal
from json.encoder import encode_basestring
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from sparse_ingest.cluster.scores import DROPPED_BITS, LOWEST_WEIGHT, weight_codes
from sparse_ingest.errors import PipelineError, RunError
from sparse_ingest.records import SparseRows, batched
from sparse_ingest.runs.shards import ShardPart, parse_fields

MAX_BYTES = 8 << 20  # managed services refuse requests from 10 MiB
MAX_DOCUMENTS = 5000
_CODES = 1 << 16
# Terms laid out at a time, about 50 bytes of memory each: a part of 8192 long documents has millions.
_SLICE_TERMS = 1 << 18
# And characters of fields: a part of 8192 articles has more bytes than Arrow counts in 31 bits.
_SLICE_CHARACTERS = 8 << 20

BulkOperation = Literal["index", "update", "delete"]
WriteOperation = Literal["index", "update", "replace"]


class BulkRequest(NamedTuple):
    """Some documents of one shard to send. `borders` are the offsets in `body` where each begins, and its end."""

    body: bytes
    borders: npt.NDArray[np.int64]
    rows: npt.NDArray[np.uint64]
    doc_ids: Sequence[str]
    shard: int = 0
    operation: BulkOperation = "index"

    def part(self, places: Sequence[int]) -> BulkRequest:
        """The documents at these places as a request of their own."""
        edges = self.borders.tolist()
        body = b"".join(self.body[edges[place] : edges[place + 1]] for place in places)
        borders = _borders(np.diff(self.borders)[places])
        doc_ids = [self.doc_ids[place] for place in places]
        return self._replace(body=body, borders=borders, rows=self.rows[places], doc_ids=doc_ids)


class Spelling(NamedTuple):
    """How weights are written: `codes` gives each a number below 65536, `decimal` the JSON number of a code."""

    codes: Callable[[npt.NDArray[np.floating[Any]]], npt.NDArray[np.integer[Any]]]
    decimal: Callable[[int], str]


def shortest_decimal(code: int) -> str:
    """The shortest decimal that a rank_features field keeps as `code`, whatever way a parser rounds.

    Both ends of the range are float32 values of that code, so any rounding to float32, also by way of double, stays
    inside: a decimal never sits on the border of a 9-bit step.
    """
    lowest = np.array([code << DROPPED_BITS], dtype=np.uint32)
    low, high = (float(edge.view(np.float32)[0]) for edge in (lowest, lowest | ((1 << DROPPED_BITS) - 1)))
    return shortest_between(low, high)


def shortest_between(lowest: float, highest: float) -> str:
    """The shortest decimal from `lowest` to `highest`, both above zero, the ends included.

    Of two spellings of equal length it is the one without an exponent.
    """
    low, low_divisor = lowest.as_integer_ratio()
    high, high_divisor = highest.as_integer_ratio()
    power = len(str(high)) - len(str(high_divisor)) + 1
    while True:
        # In whole numbers: the least multiple of 10^power that is not below `lowest`.
        up, down = (10**power, 1) if power >= 0 else (1, 10**-power)
        digits = -(-low * down // (low_divisor * up))
        if digits and digits * up * high_divisor <= high * down:
            short = f"{digits}e{power}"
            plain = f"{Decimal(short):f}"
            return plain if len(plain) <= len(short) else short
        power -= 1


FEATURE_SPELLING = Spelling(weight_codes, shortest_decimal)


class _OperationText(NamedTuple):
    """The JSON of an operation around the id, the fields and the vector, whose object `{…}` precedes `end`."""

    operation: BulkOperation
    action: bytes  # with %b for the id
    opening: bytes  # behind the carried fields, if the operation has any
    end: bytes
    without: bytes  # instead of opening and end when the document has no vector


def _operation_text(operation: str, field: str) -> _OperationText:
    name = encode_basestring(field).encode()
    if operation == "index":
        return _OperationText("index", b'{"index":{"_id":%b}}\n', name + b":{", b"}}\n", b"}\n")
    # Without retry_on_conflict a request that is delivered twice answers 409 for some documents.
    action = b'{"update":{"_id":%b,"retry_on_conflict":3}}\n'
    # An update that brings nothing would be none: the vector that the index has would stay.
    remove = b'{"script":{"source":"ctx._source.remove(params.f)","params":{"f":%b}}}\n' % name
    if operation == "update":
        return _OperationText("update", action, b'{"doc":{%b:{' % name, b"}}}\n", remove)
    # A partial document is merged: the old tokens would stay beside the new ones where the vector is in _source.
    script = b'{"script":{"source":"ctx._source[params.f]=params.v","params":{"f":%b,"v":{' % name
    return _OperationText("update", action, script, b"}}}}\n", remove)


class BodyWriter:
    """Writes documents with their vectors in one field.

    Args:
        keys: the JSON key of each token id; None where an id has no token.
        operation: "index" writes whole documents. "update" writes only the vector, into documents that exist and
            have none in their `_source`; "replace" does so where they may have one.
        empty_field: a document without terms has an empty object; else it has no such field at all.
    """

    def __init__(
        self,
        keys: Sequence[str | None],
        field: str,
        *,
        spelling: Spelling = FEATURE_SPELLING,
        operation: WriteOperation = "index",
        empty_field: bool = True,
    ) -> None:
        self._field = field
        self._names = {encode_basestring(field), json.dumps(field)}
        self._spelling = spelling
        self._text = _operation_text(operation, field)
        self._without = self._text.opening + self._text.end if empty_field else self._text.without
        self._no_token = np.array([key is None for key in keys], dtype=np.bool_)
        self._keys = _arrow([encode_basestring(key or "").encode() + b":" for key in keys])
        self._decimals: list[bytes] = []
        # The place of a code's decimal in that list, -1 while it has none.
        self._places = np.full(_CODES, -1, dtype=np.int32)
        self._lay_out_pieces()

    def requests(
        self, parts: Iterable[ShardPart], *, shard: int = 0, max_bytes: int | Callable[[], int] = MAX_BYTES
    ) -> Iterator[BulkRequest]:
        """Yield the documents in requests of at most MAX_DOCUMENTS and `max_bytes`; a larger one has its own request.

        Args:
            max_bytes: when it is a function, it is asked before each request.

        Raises:
            PipelineError: a document carries a field of the same name as the sparse field.
            RunError: a token id or a weight that no encoder writes: the run is damaged.
        """
        limit = max_bytes if callable(max_bytes) else lambda: max_bytes
        waiting: list[BulkRequest] = []
        room_bytes, room_documents = limit(), MAX_DOCUMENTS
        for layout in (layout for part in parts for layout in self._layouts(part)):
            start = 0
            while start < len(layout.doc_ids):
                end = layout.fitting(start, room_bytes, room_documents)
                if end == start and not waiting:
                    end = start + 1
                if end > start:
                    waiting.append(layout.written(start, end))
                    room_bytes -= len(waiting[-1].body)
                    room_documents -= end - start
                    start = end
                if start < len(layout.doc_ids):
                    yield self._request(waiting, shard)
                    waiting, room_bytes, room_documents = [], limit(), MAX_DOCUMENTS
        if waiting:
            yield self._request(waiting, shard)

    def _request(self, written: Sequence[BulkRequest], shard: int) -> BulkRequest:
        if len(written) == 1:
            return written[0]._replace(shard=shard, operation=self._text.operation)
        body = b"".join([one.body for one in written])
        borders = _borders(np.concatenate([np.diff(one.borders) for one in written]))
        rows = np.concatenate([one.rows for one in written])
        doc_ids = [doc_id for one in written for doc_id in one.doc_ids]
        return BulkRequest(body, borders, rows, doc_ids, shard, self._text.operation)

    def _layouts(self, part: ShardPart) -> Iterator[_Layout]:
        """The part's documents, some at a time."""
        vectors, start = part.vectors, 0
        characters = _borders(np.fromiter(map(len, part.fields), dtype=np.int64))
        while start < len(vectors.doc_ids):
            limits = ((vectors.indptr, _SLICE_TERMS), (characters, _SLICE_CHARACTERS))
            ends = [int(np.searchsorted(sums, sums[start] + most, side="right")) - 1 for sums, most in limits]
            end = max(start + 1, min(ends))
            terms = slice(int(vectors.indptr[start]), int(vectors.indptr[end]))
            some = SparseRows(
                vectors.doc_ids[start:end],
                vectors.indptr[start : end + 1] - terms.start,
                vectors.token_ids[terms],
                vectors.weights[terms],
            )
            yield self._layout(part.rows[start:end], some, part.fields[start:end])
            start = end

    def _layout(self, rows: npt.NDArray[np.uint64], vectors: SparseRows, fields: Sequence[str]) -> _Layout:
        """Which pieces make up each document: head, (key, decimal)*, the last decimal together with the end."""
        self._refuse_damage(vectors)
        codes = self._spelling.codes(vectors.weights)
        self._spell(codes)
        terms = np.diff(vectors.indptr)
        borders = _borders(2 * terms + 1)
        pieces = np.empty(int(borders[-1]), dtype=np.int32)
        before = (borders[:-1] + 1 - 2 * vectors.indptr[:-1]).astype(np.int32)
        at = np.repeat(before, terms) + np.arange(0, 2 * len(codes), 2, dtype=np.int32)
        pieces[at] = vectors.token_ids
        decimals = self._places[codes] + np.int32(len(self._keys))
        decimals[vectors.indptr[1:][terms > 0] - 1] += len(self._decimals)
        pieces[at + 1] = decimals
        pieces[borders[:-1]] = np.arange(len(terms)) + len(self._pieces)
        heads = list(map(self._head, vectors.doc_ids, fields, terms.tolist()))
        lengths = np.concatenate((self._lengths, np.fromiter(map(len, heads), dtype=np.int32, count=len(heads))))
        sizes = np.add.reduceat(lengths[pieces], borders[:-1])
        table = pa.concat_arrays([self._pieces, _arrow(heads)])
        return _Layout(table, pieces, borders, _borders(sizes), rows, vectors.doc_ids)

    def _head(self, doc_id: str, carried: str, terms: int) -> bytes:
        """What stands before a document's terms; all of it when there are none."""
        action = self._text.action % encode_basestring(doc_id).encode()
        opening = self._text.opening if terms else self._without
        if self._text.operation == "update":
            return action + opening
        # Parsing every object would cost more than writing it. Most often the two names are one, and none is there.
        for name in self._names:
            if name in carried and self._field in parse_fields(carried, doc_id):
                raise PipelineError(
                    f"The documents carry a field {self._field!r}, which is also the name of the sparse field. "
                    "Choose another one with --field, or leave that field out with encode --keep."
                )
        # A line break between the parts of a JSON object is only white space, but it would end the operation.
        object_start = carried.strip().replace("\n", " ").encode()[:-1].rstrip()
        comma = b"" if object_start == b"{" or opening == self._text.without else b","
        return b"%b%b%b%b" % (action, object_start, comma, opening)

    def _refuse_damage(self, vectors: SparseRows) -> None:
        weights, token_ids = vectors.weights, vectors.token_ids
        if not len(weights):
            return
        weights = weights.astype(np.float32, copy=False)  # numpy compares float16 slowly
        damage = None
        # Written so that a NaN fails as well.
        if not (weights.min() >= LOWEST_WEIGHT and weights.max() < np.inf):
            damage = (
                f"holds weights from {weights.min()} to {weights.max()}; an index takes finite weights from "
                f"{LOWEST_WEIGHT:.8g}"
            )
        elif token_ids.max() >= len(self._no_token):
            damage = f"holds token id {token_ids.max()}, but vocab.json has {len(self._no_token)} tokens"
        elif (wrong := self._no_token[token_ids]).any():
            damage = f"has a weight for token id {token_ids[wrong.argmax()]}, which is no token by vocab.json"
        if damage:
            raise RunError(f"The run {damage}. The run is damaged: encode it again.")

    def _spell(self, codes: npt.NDArray[np.integer[Any]]) -> None:
        """See to it that each of these codes has its decimal among the pieces."""
        missing = np.unique(codes[self._places[codes] < 0]).tolist()
        if missing:
            self._places[missing] = np.arange(len(missing)) + len(self._decimals)
            self._decimals += [self._spelling.decimal(code).encode() for code in missing]
            self._lay_out_pieces()

    def _lay_out_pieces(self) -> None:
        """Keys, decimals before another key, decimals before a document's end."""
        inner = [decimal + b"," for decimal in self._decimals]
        last = [decimal + self._text.end for decimal in self._decimals]
        self._pieces: pa.Array[Any] = pa.concat_arrays([self._keys, _arrow([*inner, *last])])
        self._lengths = np.diff(np.frombuffer(self._pieces.buffers()[1], dtype=np.int32)[: len(self._pieces) + 1])


class _Layout(NamedTuple):
    """Documents as numbers of the pieces in `table`: those of document i are `pieces[borders[i]:borders[i + 1]]`."""

    table: pa.Array[Any]
    pieces: npt.NDArray[np.int32]
    borders: npt.NDArray[np.int64]
    offsets: npt.NDArray[np.int64]
    rows: npt.NDArray[np.uint64]
    doc_ids: Sequence[str]

    def fitting(self, start: int, max_bytes: int, max_documents: int) -> int:
        """The end of the documents from `start` on that keep both limits; `start` when none does."""
        end = int(np.searchsorted(self.offsets, self.offsets[start] + max_bytes, side="right")) - 1
        return max(start, min(end, start + max_documents))

    def written(self, start: int, end: int) -> BulkRequest:
        """The documents from `start` to `end`."""
        pieces = self.pieces[self.borders[start] : self.borders[end]]
        gathered = self.table.take(pa.Array.from_buffers(pa.int32(), len(pieces), [None, pa.py_buffer(pieces)]))
        # Arrow lays the values of an array side by side: its buffer is the text.
        borders = self.offsets[start : end + 1] - self.offsets[start]
        body = gathered.buffers()[2].slice(0, int(borders[-1])).to_pybytes()
        return BulkRequest(body, borders, self.rows[start:end], self.doc_ids[start:end])


def _arrow(values: Sequence[bytes]) -> pa.Array[Any]:
    """The values as an Arrow array. For a list `pa.array` imports pandas where it is installed: 40 MB for nothing."""
    offsets = np.zeros(len(values) + 1, dtype=np.int32)
    np.cumsum(np.fromiter(map(len, values), dtype=np.int32, count=len(values)), out=offsets[1:])
    return pa.Array.from_buffers(
        pa.binary(), len(values), [None, pa.py_buffer(offsets), pa.py_buffer(b"".join(values))]
    )


def delete_requests(doc_ids: Iterable[str]) -> Iterator[BulkRequest]:
    """Requests that delete documents; no shard and no source row belongs to them."""
    for some in batched(doc_ids, MAX_DOCUMENTS):
        bodies = [b'{"delete":{"_id":%b}}\n' % encode_basestring(doc_id).encode() for doc_id in some]
        borders = _borders(list(map(len, bodies)))
        yield BulkRequest(b"".join(bodies), borders, np.zeros(len(some), np.uint64), some, operation="delete")


def _borders(sizes: npt.ArrayLike) -> npt.NDArray[np.int64]:
    """The offsets at which documents of these sizes begin, and the end of the last."""
    return np.concatenate(([0], np.cumsum(sizes, dtype=np.int64)))
