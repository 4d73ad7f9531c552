"""The parts of a shard for `encode`: source rows in, row groups with their vectors out, everything counted.

Rows are taken a window at a time, as many as fit one row group or 32 MB of text, so that memory grows neither with the
corpus nor with the shard. A document becomes one row; with `overflow = "passages"` it becomes one row per window:
ids DOC#0, DOC#1, ... (also where there is one only), a field `parent` with the id of the document, title and kept
fields repeated, and of the text the piece that the window reads, so that storage does not multiply. The title is read
as the beginning of the text, by the windows that reach it. Characters between two tokens belong to the piece before:
without overlap (`window_stride` as large as a window) the pieces put together are the text.

Not covered: which rows make a shard, and its files (encode.py).
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from sparse_ingest.corpora.cursor import Cursor
from sparse_ingest.corpora.documents import MAX_ID_BYTES, shown
from sparse_ingest.corpora.files import bad_document
from sparse_ingest.errors import RunError
from sparse_ingest.pipeline import EncodeSettings
from sparse_ingest.pruning import prune
from sparse_ingest.records import Document, SourceRow, SparseRows
from sparse_ingest.runs.identity import canonical_json
from sparse_ingest.runs.manifest import SkippedRow
from sparse_ingest.runs.shards import PART_ROWS, ShardPart, store_weights, text_hash

if TYPE_CHECKING:
    from sparse_ingest.models.documents import DocumentEncoder
    from sparse_ingest.runs.reuse import OldVectors

WINDOW_BYTES = 32 << 20  # text of one row group at most, so that very long documents do not fill the memory
PARENT = "parent"  # the field of a passage that names its document
T = TypeVar("T")


class Progress(Protocol):
    """What `encode` tells about its progress."""

    def note(self, message: str) -> None:
        """Say one sentence."""

    def read(self, rows: int, share: float | None) -> None:
        """`rows` of the corpus have been read, which is `share` of it (None: unknown)."""

    def earlier(self, rows: int) -> None:
        """`rows` were encoded before."""

    def encoded(self, documents: int, tokens: int) -> None:
        """A batch is done."""


@dataclass
class Counts:
    """What one shard's record in done/ counts, summed while its parts are made.

    `windows` are those that its documents were read in, one each where none was too long. Of the `reused` documents
    `underflow` and `without_token` are not known; all else counts them too.
    """

    rows: int = 0
    nnz: int = 0
    empty: int = 0
    truncated: int = 0
    windows: int = 0
    reused: int = 0
    underflow: int = 0
    without_token: int = 0
    skipped: list[SkippedRow] = field(default_factory=list)
    input_sha256: Any = field(default_factory=hashlib.sha256)
    seconds: dict[str, float] = field(default_factory=lambda: {"read": 0.0, "encode": 0.0, "write": 0.0})

    def record(self) -> dict[str, Any]:
        """The counts as done/ keeps them."""
        names = ("rows", "nnz", "empty", "truncated", "windows", "reused", "underflow", "without_token")
        return {
            **{name: getattr(self, name) for name in names},
            "skipped": len(self.skipped),
            "input_sha256": self.input_sha256.hexdigest(),
            "seconds": {stage: round(seconds, 3) for stage, seconds in self.seconds.items()},
        }


@dataclass
class PartMaker:
    """Makes the parts of shards, one shard after the other.

    `carry_text` says whether the documents' fields hold title and text. The encoder, and the old vectors where some are
    reused, are built when they are first needed.
    """

    settings: EncodeSettings
    carry_text: bool
    on_bad_document: Literal["fail", "skip"]
    progress: Progress
    build_encoder: Callable[[], DocumentEncoder]
    open_old: Callable[[], OldVectors] | None = None

    @cached_property
    def encoder(self) -> DocumentEncoder:
        """Built when the first shard is made: a run that is complete needs no model."""
        return self.build_encoder()

    @cached_property
    def _old(self) -> OldVectors | None:
        return self.open_old() if self.open_old else None

    def parts(self, cursor: Cursor, shard_rows: int, counts: Counts) -> Iterator[ShardPart]:
        """The row groups of the shard at the cursor's position."""
        windows = self._windows(cursor.take(shard_rows), counts)
        for window in _timed(windows, counts.seconds, "read"):
            self.progress.read(cursor.position.row, cursor.share)
            if window:
                encode = self._passages if self.settings.overflow == "passages" else self._documents
                yield from _timed(encode(window, counts), counts.seconds, "encode")

    def _windows(self, rows: Iterator[SourceRow], counts: Counts) -> Iterator[list[tuple[SourceRow, Document]]]:
        """The rows of a shard in windows that fit one row group. Bad ones are refused or noted."""
        window: list[tuple[SourceRow, Document]] = []
        size, seen = 0, 0
        for row in rows:
            seen += 1
            hash_row(counts.input_sha256, row)
            if row.document is None:
                self._refuse_or_skip(row, counts)
            else:
                window.append((row._replace(document=None), row.document))
                size += len(row.document.text) + len(row.document.fields)
            if seen == PART_ROWS or size >= WINDOW_BYTES:
                yield window
                window, size, seen = [], 0, 0
        if seen:
            yield window

    def _refuse_or_skip(self, row: SourceRow, counts: Counts) -> None:
        if self.on_bad_document == "fail":
            raise bad_document(row)
        counts.skipped.append(SkippedRow(row.row, row.file, row.line, row.reason or ""))

    def _documents(self, window: list[tuple[SourceRow, Document]], counts: Counts) -> Iterator[ShardPart]:
        """One row for each document; vectors of texts that are known already are not computed."""
        documents = [document for _, document in window]
        hashes = [text_hash(document.text) for document in documents]
        known, old = np.zeros(len(documents), dtype=np.bool_), None
        if self._old:
            known, old = self._old.find(hashes)
        whole = self.settings.overflow == "windows"
        encode = self.encoder.encode_windows if whole else self.encoder.encode
        texts = [document.text for document, there in zip(documents, known, strict=True) if not there]
        encoded = encode(texts, self.progress.encoded)
        counts.truncated += encoded.truncated
        counts.windows += encoded.windows
        counts.without_token += encoded.without_token
        vectors = self._kept(SparseRows(texts, encoded.indptr, encoded.token_ids, encoded.weights), counts)
        if old is not None and known.any():
            vectors = _merged(known, old, vectors)
            texts = [document.text for document, there in zip(documents, known, strict=True) if there]
            longer, windows = self.encoder.count(texts, whole=whole)
            counts.truncated += 0 if whole else longer
            counts.windows += windows
            counts.reused += len(texts)
            self.progress.earlier(len(texts))
        vectors = vectors._replace(doc_ids=[document.id for document in documents])
        fields = [document.fields for document in documents]
        yield _counted(ShardPart(_rows_of(window), hashes, vectors, fields), counts)

    def _passages(self, window: list[tuple[SourceRow, Document]], counts: Counts) -> Iterator[ShardPart]:
        """One row for each window of each document, in row groups of bounded size."""
        cuts = self.encoder.cut([document.text for _, document in window])
        fitting = []
        for place, ((row, document), cut) in enumerate(zip(window, cuts, strict=True)):
            if reason := _too_long(document.id, cut.windows - 1):
                self._refuse_or_skip(row._replace(reason=reason), counts)
            else:
                fitting.append(place)
        window, cuts = [window[place] for place in fitting], [cuts[place] for place in fitting]
        group = _PassageGroup()
        for passage in self.encoder.encode_passages(cuts, self.progress.encoded):
            row, document = window[passage.text]
            if passage.number == 0:
                carried = _Carried(document, carry_text=self.carry_text)
            start, end = cuts[passage.text].span(passage.number, len(document.text))
            group.add(row.row, passage_id(document.id, passage.number), document.text[start:end], passage.row)
            group.fields.append(carried.fields(start, end))
            counts.windows += 1
            counts.without_token += passage.without_token
            group.size += len(group.fields[-1])
            if len(group.rows) == PART_ROWS or group.size >= WINDOW_BYTES:
                yield self._part_of(group, counts)
                group = _PassageGroup()
        if group.rows:
            yield self._part_of(group, counts)

    def _part_of(self, group: _PassageGroup, counts: Counts) -> ShardPart:
        indptr = np.concatenate(([0], np.cumsum([len(ids) for ids, _ in group.terms])))
        token_ids, weights = (np.concatenate(arrays) for arrays in zip(*group.terms, strict=True))
        vectors = self._kept(SparseRows(group.doc_ids, indptr, token_ids, weights), counts)
        part = ShardPart(np.array(group.rows, dtype=np.uint64), group.text_hashes, vectors, group.fields)
        return _counted(part, counts)

    def _kept(self, vectors: SparseRows, counts: Counts) -> SparseRows:
        """The vectors as the run keeps them: pruned, in the type of its weights."""
        settings = self.settings
        vectors = prune(vectors, top_k=settings.top_k, max_ratio=settings.max_ratio, min_weight=settings.min_weight)
        try:
            vectors, underflow = store_weights(vectors, settings.weights)
        except ValueError as error:
            advice = "Encode with --weights float32, and with --dtype float32 if that is not enough."
            raise RunError(f"Weights cannot be kept: {error}. {advice}") from error
        counts.underflow += underflow
        return vectors


@dataclass
class _PassageGroup:
    """Rows of a row group that is being filled."""

    rows: list[int] = field(default_factory=list)
    doc_ids: list[str] = field(default_factory=list)
    text_hashes: list[bytes] = field(default_factory=list)
    terms: list[tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]] = field(default_factory=list)
    fields: list[str] = field(default_factory=list)
    size: int = 0

    def add(self, row: int, doc_id: str, text: str, terms: tuple[npt.NDArray[np.int32], Any]) -> None:
        self.rows.append(row)
        self.doc_ids.append(doc_id)
        self.text_hashes.append(text_hash(text))
        self.terms.append(terms)


class _Carried:
    """The fields of a document, for its passages."""

    def __init__(self, document: Document, *, carry_text: bool) -> None:
        self._fields = {**json.loads(document.fields), PARENT: document.id}
        self._text = self._fields["text"] if carry_text else None
        # What the model reads ends with the text; title and blank stand before it.
        self._before = len(document.text) - len(self._text or "")

    def fields(self, start: int, end: int) -> str:
        """The fields of the passage that reads these characters of what the model reads."""
        if self._text is not None:
            self._fields["text"] = self._text[max(0, start - self._before) : max(0, end - self._before)]
        return json.dumps(self._fields, ensure_ascii=False, separators=(",", ":"))


def passage_id(doc_id: str, number: int) -> str:
    """The id of a passage. No two passages share one when no two documents do."""
    return f"{doc_id}#{number}"


def document_id(passage: str) -> str:
    """The id of the document that a passage is of."""
    return passage.rpartition("#")[0]


def hash_row(digest: hashlib._Hash, row: SourceRow) -> None:
    """Add a row to the hash by which a resumed run knows that the corpus is still the same.

    Of a bad row only that it is bad: its reason is worded by a release and may hold the path of a file.
    """
    content = [row.row, None] if row.document is None else [row.row, *row.document]
    digest.update(canonical_json(content).encode() + b"\n")


def _too_long(doc_id: str, last: int) -> str | None:
    """What is wrong with the id of a document's last passage, if it is longer than OpenSearch takes."""
    size = len(passage_id(doc_id, last).encode())
    if size <= MAX_ID_BYTES:
        return None
    return (
        f"the id {shown(doc_id)} has {size} bytes with the suffix #{last} of its last passage; "
        f"at most {MAX_ID_BYTES} were expected"
    )


def _rows_of(window: Sequence[tuple[SourceRow, Document]]) -> npt.NDArray[np.uint64]:
    return np.array([row.row for row, _ in window], dtype=np.uint64)


def _counted(part: ShardPart, counts: Counts) -> ShardPart:
    counts.rows += len(part.rows)
    counts.nnz += len(part.vectors.weights)
    counts.empty += int(np.count_nonzero(np.diff(part.vectors.indptr) == 0))
    return part


def _merged(known: npt.NDArray[np.bool_], old: SparseRows, new: SparseRows) -> SparseRows:
    """The rows of both, in the order that `known` says: True takes the next of the old ones."""
    both = SparseRows(
        [*old.doc_ids, *new.doc_ids],
        np.concatenate((old.indptr, new.indptr[1:] + old.indptr[-1])),
        np.concatenate((old.token_ids, new.token_ids)),
        np.concatenate((old.weights, new.weights)),
    )
    places = np.empty(len(known), dtype=np.int64)
    places[known] = np.arange(len(old.doc_ids))
    places[~known] = np.arange(len(old.doc_ids), len(both.doc_ids))
    return both.take(places)


def _timed(steps: Iterator[T], seconds: dict[str, float], stage: str) -> Iterator[T]:
    """The same values; how long each took to come is added to `seconds[stage]`."""
    while True:
        began = time.monotonic()
        try:
            step = next(steps)
        except StopIteration:
            return
        finally:
            seconds[stage] += time.monotonic() - began
        yield step
