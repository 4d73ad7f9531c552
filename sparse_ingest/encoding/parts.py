"""The parts of a shard: source rows in, row groups with their vectors out, everything counted.

Rows are taken a window at a time, as many as fit one row group or 32 MB of text, so that memory grows neither with the
corpus nor with the shard. A document becomes one row; with `overflow = "passages"` it becomes one row for each of its
windows (passages.py). A vector is computed, or copied: from another run (`--reuse`), or from an earlier row of the
shard with the same text (`--dedup-text encode-once`, copies.py).

Not covered: which rows make a shard, and its files (encode.py).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from sparse_ingest.corpora.cursor import Cursor
from sparse_ingest.corpora.sources import bad_document
from sparse_ingest.encoding.copies import Copies, Kept, together
from sparse_ingest.encoding.counts import OF_ROWS, Counts
from sparse_ingest.encoding.passages import Carried, PassageGroup, too_long
from sparse_ingest.errors import RunError
from sparse_ingest.models.memory import DocumentTooLarge
from sparse_ingest.pipeline import EncodeSettings
from sparse_ingest.pruning import prune
from sparse_ingest.records import Document, SourceRow, SparseRows, passage_id
from sparse_ingest.runs.manifest import SkippedRow
from sparse_ingest.runs.shards import PART_ROWS, ShardPart, store_weights, text_hash

if TYPE_CHECKING:
    from sparse_ingest.models.documents import DocumentEncoder, Encoded
    from sparse_ingest.runs.reuse import OldVectors

WINDOW_BYTES = 32 << 20  # text of one row group at most, so that very long documents do not fill the memory
Window = list[tuple[SourceRow, Document]]
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
class PartMaker:
    """Makes the parts of shards, one shard after the other.

    `carry_text` says whether the documents' fields hold title and text. The encoder, and the old vectors where some are
    reused, are built when they are first needed. `copies_folder` is where vectors of equal texts wait; None: each text
    is computed.
    """

    settings: EncodeSettings
    carry_text: bool
    on_bad_document: Literal["fail", "skip"]
    progress: Progress
    build_encoder: Callable[[], DocumentEncoder]
    open_old: Callable[[], OldVectors] | None = None
    copies_folder: Callable[[], Path] | None = None

    @cached_property
    def encoder(self) -> DocumentEncoder:
        """Built when the first shard is made: a run that is complete needs no model."""
        return self.build_encoder()

    @cached_property
    def _old(self) -> OldVectors | None:
        return self.open_old() if self.open_old else None

    def parts(self, cursor: Cursor, shard_rows: int, counts: Counts) -> Iterator[ShardPart]:
        """The row groups of the shard at the cursor's position."""
        with closing(Copies(self.copies_folder())) if self.copies_folder else nullcontext() as copies:
            windows = self._windows(cursor.take(shard_rows), counts)
            for window in _timed(windows, counts.seconds, "read"):
                self.progress.read(cursor.position.row, cursor.share)
                if window:
                    parts = self._fitting(window, counts, copies)
                    yield from map(counts.part, _timed(parts, counts.seconds, "encode"))

    def _windows(self, rows: Iterator[SourceRow], counts: Counts) -> Iterator[Window]:
        """The rows of a shard in windows that fit one row group. Bad ones are refused or noted."""
        window: Window = []
        size, seen = 0, 0
        for row in rows:
            seen += 1
            counts.input_rows.add(row)
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

    def _fitting(self, window: Window, counts: Counts, copies: Copies | None) -> Iterator[ShardPart]:
        """The parts of a window; a document that does not fit into memory even alone is a bad one."""
        while window:
            given = False
            try:
                passages = self.settings.overflow == "passages"
                for part in self._passages(window, counts) if passages else self._documents(window, counts, copies):
                    given = True
                    yield part
                return
            except _TooLarge as large:
                if given:
                    raise RunError(
                        f"A document does not fit: {large.reason}. Encode with a smaller --max-length."
                    ) from large
                for row, document in window:
                    if document.text == large.text:
                        self._refuse_or_skip(row._replace(reason=large.reason), counts)
                window = [(row, document) for row, document in window if document.text != large.text]

    def _documents(self, window: Window, counts: Counts, copies: Copies | None) -> Iterator[ShardPart]:
        """One row for each document; vectors of texts that are known already are not computed."""
        documents = [document for _, document in window]
        hashes = [text_hash(document.text) for document in documents]
        texts = [document.text for document in documents]
        # Where the vector of each document comes from: a place among those of all pieces.
        places = np.full(len(documents), -1, dtype=np.int64)
        pieces: list[Kept] = []
        if self._old:
            known, old = self._old.find(hashes)
            if known.any():
                places[known] = np.arange(int(known.sum()))
                pieces.append(self._reused([text for text, there in zip(texts, known, strict=True) if there], old))
        missing = np.flatnonzero(places < 0)
        earlier = sum(len(piece.vectors.doc_ids) for piece in pieces)
        if copies is None:
            places[missing] = earlier + np.arange(len(missing))
            pieces.append(self._computed([texts[place] for place in missing], counts))
        else:
            kept = self._once([hashes[place] for place in missing], [texts[place] for place in missing], copies, counts)
            places[missing] = earlier + np.arange(len(missing))
            pieces.append(kept)
        vectors, of_rows = together(pieces).take(places)
        if copied := int(of_rows["reused"].sum() + of_rows["deduplicated"].sum()):
            self.progress.earlier(copied)
        rows = np.array([row.row for row, _ in window], dtype=np.uint64)
        for name, each in of_rows.items():
            counts.of_rows(name, rows, each)
        vectors = vectors._replace(doc_ids=[document.id for document in documents])
        yield ShardPart(rows, hashes, vectors, [document.fields for document in documents])

    def _once(self, hashes: list[bytes], texts: list[str], copies: Copies, counts: Counts) -> Kept:
        """The vectors of texts, each different one computed once in a shard."""
        new: dict[bytes, int] = {}  # where each text that the shard did not have stands first
        for place, (one, number) in enumerate(zip(hashes, copies.find(hashes).tolist(), strict=True)):
            if number < 0:
                new.setdefault(one, place)
        copies.add(list(new), self._computed([texts[place] for place in new.values()], counts))
        kept = copies.take(copies.find(hashes))
        kept.of_rows["deduplicated"][:] = 1
        kept.of_rows["deduplicated"][list(new.values())] = 0
        return kept

    def _computed(self, texts: list[str], counts: Counts) -> Kept:
        """The vectors of texts from the model."""
        whole = self.settings.overflow == "windows"
        encode = self.encoder.encode_windows if whole else self.encoder.encode
        with _too_large(texts):
            encoded = encode(texts, self.progress.encoded)
        counts.without_token += encoded.without_token
        counts.tokens += encoded.tokens
        return self._kept(encoded)

    def _reused(self, texts: list[str], vectors: SparseRows) -> Kept:
        """The vectors of texts from another run."""
        whole = self.settings.overflow == "windows"
        longer, windows = self.encoder.count(texts, whole=whole)
        of_rows = {name: np.zeros(len(texts), dtype=np.int64) for name in OF_ROWS}
        of_rows |= {"windows": windows, "reused": np.ones_like(windows)}
        if not whole:
            of_rows["truncated"] = longer
        return Kept(vectors, of_rows)

    def _kept(self, encoded: Encoded) -> Kept:
        texts = [""] * (len(encoded.indptr) - 1)
        vectors, underflow = self._stored(SparseRows(texts, encoded.indptr, encoded.token_ids, encoded.weights))
        of_rows = {name: np.zeros(len(texts), dtype=np.int64) for name in OF_ROWS}
        of_rows |= {"truncated": encoded.truncated_of, "windows": encoded.windows_of, "underflow": underflow}
        return Kept(vectors, of_rows)

    def _passages(self, window: Window, counts: Counts) -> Iterator[ShardPart]:
        """One row for each window of each document, in row groups of bounded size."""
        cuts = self.encoder.cut([document.text for _, document in window])
        fitting = []
        for place, ((row, document), cut) in enumerate(zip(window, cuts, strict=True)):
            if reason := too_long(document.id, cut.windows - 1):
                self._refuse_or_skip(row._replace(reason=reason), counts)
            else:
                fitting.append(place)
        window, cuts = [window[place] for place in fitting], [cuts[place] for place in fitting]
        group = PassageGroup()
        passages = self.encoder.encode_passages(cuts, self.progress.encoded)
        while True:
            with _too_large([document.text for _, document in window]):
                passage = next(passages, None)
            if passage is None:
                break
            row, document = window[passage.text]
            if passage.number == 0:
                carried = Carried(document, carry_text=self.carry_text)
            start, end = cuts[passage.text].span(passage.number, len(document.text))
            doc_id, text = passage_id(document.id, passage.number), document.text[start:end]
            group.add(row.row, doc_id, text, passage.row, carried.fields(start, end))
            counts.without_token += passage.without_token
            if len(group.rows) == PART_ROWS or group.size >= WINDOW_BYTES:
                yield self._part_of(group, counts)
                group = PassageGroup()
        if group.rows:
            yield self._part_of(group, counts)

    def _part_of(self, group: PassageGroup, counts: Counts) -> ShardPart:
        rows = np.array(group.rows, dtype=np.uint64)
        vectors, underflow = self._stored(group.vectors())
        counts.of_rows("windows", rows, np.ones(len(rows), dtype=np.int64))
        counts.of_rows("underflow", rows, underflow)
        return ShardPart(rows, group.text_hashes, vectors, group.fields)

    def _stored(self, vectors: SparseRows) -> tuple[SparseRows, npt.NDArray[np.int64]]:
        """The vectors as the run keeps them, pruned, in the type of its weights; and the underflow of each."""
        settings = self.settings
        vectors = prune(
            vectors,
            top_k=settings.top_k,
            max_ratio=settings.max_ratio,
            min_weight=settings.min_weight,
            alpha_mass=settings.alpha_mass,
        )
        try:
            stored, _ = store_weights(vectors, settings.weights)
        except ValueError as error:
            advice = "Encode with --weights float32, and with --dtype float32 if that is not enough."
            raise RunError(f"Weights cannot be kept: {error}. {advice}") from error
        return stored, np.diff(vectors.indptr) - np.diff(stored.indptr)


class _TooLarge(Exception):
    """A text does not fit into memory."""

    def __init__(self, text: str, reason: str) -> None:
        super().__init__(reason)
        self.text, self.reason = text, reason


@contextmanager
def _too_large(texts: Sequence[str]) -> Iterator[None]:
    """Which of the texts does not fit, by itself instead of its place."""
    try:
        yield
    except DocumentTooLarge as large:
        raise _TooLarge(texts[large.text], large.reason) from large


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
