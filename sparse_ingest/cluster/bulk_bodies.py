"""Bulk requests from the arrays of sparse rows.

In: the rows, vectors and fields of a shard's parts. Out: `BulkRequest`s with one operation and id per document, below a
limit of bytes and documents. Tokens and weights are converted once per distinct value; Arrow gathers these pieces, four
times faster than joining them in Python. A weight is the shortest decimal with the same 9 bits: identical postings, at
half the bytes. The decimals of sparse_vector fields are in seismic.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from decimal import Decimal
from json.encoder import encode_basestring
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from sparse_ingest.cluster.scores import DROPPED_BITS, weight_codes
from sparse_ingest.errors import RunError
from sparse_ingest.records import SparseRows, batched
from sparse_ingest.runs.shards import ShardPart

MAX_BYTES = 8 << 20  # managed services refuse requests from 10 MiB
MAX_DOCUMENTS = 5000
_CODES = 1 << 16
_SLICE_TERMS = 1 << 18  # converted at once, 50 bytes of memory each: a part of 8192 long documents has millions
_SLICE_CHARACTERS = 8 << 20  # of fields, at once: Arrow's offsets have 31 bits

BulkOperation = Literal["index", "update", "delete"]
WriteOperation = Literal["index", "update", "replace", "overwrite"]


class BulkRequest(NamedTuple):
    """Documents of one shard to send. `borders` are the offsets of the documents in `body`, and its end."""

    body: bytes
    borders: npt.NDArray[np.int64]
    rows: npt.NDArray[np.uint64]
    doc_ids: Sequence[str]
    shard: int = 0
    operation: BulkOperation = "index"

    def part(self, places: Sequence[int]) -> BulkRequest:
        """Return a request with the documents at these places."""
        edges = self.borders.tolist()
        body = b"".join(self.body[edges[place] : edges[place + 1]] for place in places)
        borders = _borders(np.diff(self.borders)[places])
        doc_ids = [self.doc_ids[place] for place in places]
        return self._replace(body=body, borders=borders, rows=self.rows[places], doc_ids=doc_ids)


class Spelling(NamedTuple):
    """Conversion of weights: `codes` returns a number below 65536 for each, `decimal` the JSON number of a code."""

    codes: Callable[[npt.NDArray[np.floating[Any]]], npt.NDArray[np.integer[Any]]]
    decimal: Callable[[int], str]


def shortest_decimal(code: int) -> str:
    """Return the shortest decimal that a rank_features field keeps as `code`.

    Both ends of the range are float32 values of that code, so any rounding of a parser stays inside.
    """
    lowest = np.array([code << DROPPED_BITS], dtype=np.uint32)
    low, high = (float(edge.view(np.float32)[0]) for edge in (lowest, lowest | ((1 << DROPPED_BITS) - 1)))
    return shortest_between(low, high)


def shortest_between(lowest: float, highest: float) -> str:
    """Return the shortest decimal from `lowest` to `highest` (above zero, inclusive), if possible without exponent."""
    low, low_divisor = lowest.as_integer_ratio()
    high, high_divisor = highest.as_integer_ratio()
    power = len(str(high)) - len(str(high_divisor)) + 1
    while True:
        # With integers: the least multiple of 10^power that is not below `lowest`.
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
    opening: bytes  # after the fields of the document, if the operation has any
    end: bytes
    without: bytes  # instead of opening and end if the document has no vector


def _operation_text(operation: str, field: str) -> _OperationText:
    name = encode_basestring(field).encode()
    if operation == "index":
        return _OperationText("index", b'{"index":{"_id":%b}}\n', name + b":{", b"}}\n", b"}\n")
    # Without retry_on_conflict, a request that is delivered twice causes 409 for some documents.
    action = b'{"update":{"_id":%b,"retry_on_conflict":3}}\n'
    if operation == "overwrite":
        return _OperationText("update", action, b'{"doc":{%b:[{' % name, b"}]}}\n", b'{"doc":{%b:[]}}\n' % name)
    # An empty update would keep the vector of the index.
    remove = b'{"script":{"source":"ctx._source.remove(params.f)","params":{"f":%b}}}\n' % name
    if operation == "update":
        return _OperationText("update", action, b'{"doc":{%b:{' % name, b"}}}\n", remove)
    # A partial document is merged, so a vector in _source would keep its old tokens.
    script = b'{"script":{"source":"ctx._source[params.f]=params.v","params":{"f":%b,"v":{' % name
    return _OperationText("update", action, script, b"}}}}\n", remove)


class BodyWriter:
    """Writes documents with their vectors in one field.

    Args:
        keys: the JSON key of each token id; None if an id has no token.
        operation: "index" writes complete documents. "update" adds the vector to existing documents without one in
            their `_source`; "replace" also to those that may have one, by a script of OpenSearch, "overwrite" by an
            array, which Elasticsearch stores like an object and does not merge.
        empty_field: a document without terms has an empty object; otherwise it lacks the field.
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
        self._spelling = spelling
        self._text = _operation_text(operation, field)
        self._without = self._text.opening + self._text.end if empty_field else self._text.without
        self._no_token = np.array([key is None for key in keys], dtype=np.bool_)
        self._keys = _arrow([encode_basestring(key or "").encode() + b":" for key in keys])
        self._decimals: list[bytes] = []
        self._places = np.full(_CODES, -1, dtype=np.int32)  # indexes of codes in that list, or -1
        self._join_pieces()

    def requests(
        self, parts: Iterable[ShardPart], *, shard: int = 0, max_bytes: int | Callable[[], int] = MAX_BYTES
    ) -> Iterator[BulkRequest]:
        """Yield the documents in requests of at most MAX_DOCUMENTS and `max_bytes`; a larger one has its own request.

        `max_bytes` may be a function that is called before each request. preflight.py checks documents; this raises
        only a `RunError` for a token id without a token, whose weight would otherwise be of the token "".
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
        """Yield layouts of the part's documents, within the limits of a slice."""
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
        """Return the pieces of each document: head, (key, decimal)*, the last decimal together with the end."""
        if (wrong := self._no_token[vectors.token_ids]).any():
            damage = f"a weight for token id {vectors.token_ids[wrong.argmax()]}, which vocab.json does not have"
            raise RunError(f"The run has {damage}. It is damaged: encode it again.")
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
        """Return the part of a document before its terms, or all of it without terms."""
        action = self._text.action % encode_basestring(doc_id).encode()
        opening = self._text.opening if terms else self._without
        if self._text.operation == "update":
            return action + opening
        # A line break between the parts of a JSON object would end the operation.
        object_start = carried.strip().replace("\n", " ").encode()[:-1].rstrip()
        comma = b"" if object_start == b"{" or opening == self._text.without else b","
        return b"%b%b%b%b" % (action, object_start, comma, opening)

    def _spell(self, codes: npt.NDArray[np.integer[Any]]) -> None:
        """Add the decimals of new codes to the pieces."""
        if missing := np.unique(codes[self._places[codes] < 0]).tolist():
            self._places[missing] = np.arange(len(missing)) + len(self._decimals)
            self._decimals += [self._spelling.decimal(code).encode() for code in missing]
            self._join_pieces()

    def _join_pieces(self) -> None:
        """Join keys, decimals before another key, and decimals before the end of a document."""
        inner = [decimal + b"," for decimal in self._decimals]
        last = [decimal + self._text.end for decimal in self._decimals]
        self._pieces: pa.Array[Any] = pa.concat_arrays([self._keys, _arrow([*inner, *last])])
        self._lengths = np.diff(np.frombuffer(self._pieces.buffers()[1], dtype=np.int32)[: len(self._pieces) + 1])


class _Layout(NamedTuple):
    """Documents as numbers of pieces in `table`: document i has `pieces[borders[i]:borders[i + 1]]`."""

    table: pa.Array[Any]
    pieces: npt.NDArray[np.int32]
    borders: npt.NDArray[np.int64]
    offsets: npt.NDArray[np.int64]
    rows: npt.NDArray[np.uint64]
    doc_ids: Sequence[str]

    def fitting(self, start: int, max_bytes: int, max_documents: int) -> int:
        """Return the end of the documents from `start` on within both limits."""
        end = int(np.searchsorted(self.offsets, self.offsets[start] + max_bytes, side="right")) - 1
        return max(start, min(end, start + max_documents))

    def written(self, start: int, end: int) -> BulkRequest:
        """Return the documents from `start` to `end`."""
        pieces = self.pieces[self.borders[start] : self.borders[end]]
        gathered = self.table.take(pa.Array.from_buffers(pa.int32(), len(pieces), [None, pa.py_buffer(pieces)]))
        # The buffer of an Arrow array contains its values one after another.
        borders = self.offsets[start : end + 1] - self.offsets[start]
        body = gathered.buffers()[2].slice(0, int(borders[-1])).to_pybytes()
        return BulkRequest(body, borders, self.rows[start:end], self.doc_ids[start:end])


def _arrow(values: Sequence[bytes]) -> pa.Array[Any]:
    """Return an Arrow array. `pa.array` would import pandas for a list, if installed: 40 MB of memory."""
    offsets = _borders(list(map(len, values))).astype(np.int32)
    buffers = [None, pa.py_buffer(offsets), pa.py_buffer(b"".join(values))]
    return pa.Array.from_buffers(pa.binary(), len(values), buffers)


def delete_requests(doc_ids: Iterable[str]) -> Iterator[BulkRequest]:
    """Yield requests that delete documents; shards and rows are 0."""
    for some in batched(doc_ids, MAX_DOCUMENTS):
        bodies = [b'{"delete":{"_id":%b}}\n' % encode_basestring(doc_id).encode() for doc_id in some]
        borders = _borders(list(map(len, bodies)))
        yield BulkRequest(b"".join(bodies), borders, np.zeros(len(some), np.uint64), some, operation="delete")


def _borders(sizes: npt.ArrayLike) -> npt.NDArray[np.int64]:
    """Return the offsets of documents of these sizes, and the end of the last."""
    return np.concatenate(([0], np.cumsum(sizes, dtype=np.int64)))
