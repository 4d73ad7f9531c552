"""The parts of a shard: source rows in, row groups with their vectors out, everything counted.

Rows are read a window at a time, at most one row group or 32 MB of text, so memory grows neither with the corpus nor
with the shard. Three threads read windows, tokenize them and compute their vectors, each at most one window ahead
(stages.py); the caller's thread prunes and writes. Standard input is read, encoded and written without threads.
Finished windows are stored, and read by the next process after an interruption (spool.py).

A document becomes one row; its vector is computed, or copied from another run (`--reuse`) or from an earlier equal text
(`--dedup-text encode-once`, equal_texts.py). With `overflow = "passages"` it becomes one row per window, DOC#0, DOC#1,
...: the field `parent` has the id of the document, title and kept fields are repeated, and the text is the piece that
the window reads. Characters between two tokens belong to the piece before, so without overlap the pieces join to the
text.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
from msgspec.structs import replace

from sparse_ingest.checkpoints.inspect import dense_warning
from sparse_ingest.corpora.sources import Cursor, bad_document
from sparse_ingest.encoding.counts import OF_ROWS, Counts, OfRows, WindowCounts
from sparse_ingest.encoding.equal_texts import Copies, Kept
from sparse_ingest.encoding.options import EncodeOptions
from sparse_ingest.encoding.spool import Finished, Spool
from sparse_ingest.encoding.stages import Ahead, Stages, Stopped
from sparse_ingest.encoding.windows import (
    Passage,
    TooLarge,
    Window,
    count_tokens,
    passage_groups,
    passage_part,
    reused,
    too_large,
    too_long_id,
)
from sparse_ingest.errors import Interrupted, RunError
from sparse_ingest.pipeline import EncodeSettings
from sparse_ingest.pruning import prune
from sparse_ingest.records import Document, SourceRow, SparseRows
from sparse_ingest.reporting import Reporter
from sparse_ingest.runs.files import SkippedRow
from sparse_ingest.runs.shards import PART_ROWS, ShardPart, store_weights, text_hash
from sparse_ingest.storage.places import Place

if TYPE_CHECKING:
    from sparse_ingest.models.documents import DocumentEncoder, Encoded, EncodedPassage
    from sparse_ingest.runs.reuse import OldVectors

T = TypeVar("T")
WINDOW_BYTES = 32 << 20  # of text in one row group


class _Source(NamedTuple):
    """The rows of a window, and the hash of all rows of the shard up to them; None for the last window of a shard."""

    rows: list[tuple[SourceRow, Document]]
    hashed: str | None


class _Input(NamedTuple):
    """A window to compute, or a finished one; `key` is its name in the spool, None if it is not to be stored."""

    key: str | None
    window: Window | Finished


class _Work(NamedTuple):
    """A window in progress; `stopped` is set when the parts of its shard are no longer needed."""

    counts: WindowCounts
    copies: Copies | None
    stopped: Event


Finish = Callable[[], tuple[ShardPart, OfRows]]  # prunes the vectors of a part; with what its rows add to the counts


class _Step(NamedTuple):
    """A part of a window, None if it has none; after the last part `end` has the counts of the window.

    `key` is None for a window that is not stored, `is_new` is false for one that an earlier process has stored.
    """

    finish: Finish | None
    end: WindowCounts | None
    key: str | None
    is_new: bool


@dataclass(frozen=True)
class ShardMaker:
    """Encodes the row groups of shards, one shard after another.

    `old` has the vectors of another run to reuse. `copies_folder` is for the vectors of equal texts; None: each text is
    computed.
    """

    encoder: DocumentEncoder
    settings: EncodeSettings
    options: EncodeOptions
    reporter: Reporter
    stages: Stages
    old: OldVectors | None = None
    copies_folder: Path | None = None
    _density_checked: Event = field(default_factory=Event)

    def parts(self, cursor: Cursor, shard_rows: int, counts: Counts, spool: Spool) -> Generator[ShardPart, None, None]:
        """Yield the row groups of the shard at the cursor, which is after the shard at the end.

        The stage `write` must be busy; its clock stops while this waits. Close it before you move the cursor.

        Raises:
            BudgetLowered: the shard must be encoded again, with smaller batches.
            Interrupted: a stop was requested, and the last window is stored.
        """
        with ExitStack() as stack:
            copies = stack.enter_context(closing(Copies(self.copies_folder))) if self.copies_folder else None
            stopped = Event()

            def ahead(items: Iterable[T]) -> Iterable[T]:
                # Ctrl-C interrupts a read of standard input, which may block forever, in the main thread only.
                return stack.enter_context(closing(Ahead(items))) if cursor.rereadable else items

            read = ahead(self.stages.making("read", self._read(cursor, shard_rows, counts, stopped)))
            inputs = ahead(map(partial(self._prepare, spool), read))
            steps = ahead(self._compute(inputs, copies, stopped))
            stack.callback(stopped.set)
            yield from self._finish(self.stages.waiting("write", steps), counts, spool)

    def _read(self, cursor: Cursor, shard_rows: int, counts: Counts, stopped: Event) -> Iterator[_Source]:
        """Yield the rows of a shard in windows that fit one row group. Refuse or record bad rows."""
        window: list[tuple[SourceRow, Document]] = []
        size = seen = before = 0
        for row in cursor.take(shard_rows):
            if stopped.is_set():
                raise Stopped
            seen += 1
            counts.input_rows.add(row)
            if row.document is None:
                self._refuse_or_skip(row, counts)
            else:
                window.append((replace(row, document=None), row.document))
                size += len(row.document.text) + len(row.document.fields)
            if seen == PART_ROWS or size >= WINDOW_BYTES:
                before += seen
                yield _Source(window, counts.input_rows.hexdigest() if before < shard_rows else None)
                window, size, seen = [], 0, 0
        if seen:
            yield _Source(window, None)

    def _prepare(self, spool: Spool, source: _Source) -> _Input:
        """Tokenize the texts of a window, unless an earlier process has finished it."""
        with self.stages.busy("tokenise"):
            rows, key = [row for row, _ in source.rows], None
            if source.hashed:
                encoder, old = self.encoder, self.old
                known = (old.run_id, len(old)) if old else None
                how = encoder.device.type, encoder.batch_tokens, self.options.on_bad_document, known
                key = spool.key(*how, PART_ROWS, WINDOW_BYTES, source.hashed)
                if finished := spool.find(key, rows):
                    self.reporter.earlier(len(rows))
                    return _Input(key, finished)
            return _Input(key, self._tokenize(rows, [document for _, document in source.rows]))

    def _tokenize(self, rows: list[SourceRow], documents: list[Document]) -> Window:
        texts = [document.text for document in documents]
        if self.settings.overflow == "truncate":
            tokens: list[Any] = self.encoder.tokenize(texts)
        else:
            tokens = self.encoder.cut(texts, places=self.settings.overflow == "passages")
        return Window(rows, documents, [text_hash(text) for text in texts], tokens)

    def _refuse_or_skip(self, row: SourceRow, counts: Counts | WindowCounts) -> None:
        if self.options.on_bad_document == "fail":
            raise bad_document(row)
        counts.skipped.append(SkippedRow(row.row, row.file, row.line, row.reason or ""))

    def _compute(self, inputs: Iterable[_Input], copies: Copies | None, stopped: Event) -> Iterator[_Step]:
        for key, window in inputs:
            yield from self.stages.making("encode", self._steps(key, window, _Work(WindowCounts(), copies, stopped)))
            del window

    def _steps(self, key: str | None, window: Window | Finished, work: _Work) -> Iterator[_Step]:
        """Yield the parts of a window, each after the next one is known, so that the last one has the counts."""
        if isinstance(window, Window):
            parts, counts, is_new = self._fitting(window, work), work.counts, True
        else:
            parts, counts, is_new = _again(window, work.copies), window.counts, False
        finish = next(parts, None)
        for following in parts:
            yield _Step(finish, None, key, is_new)
            finish = following
        yield _Step(finish, counts, key, is_new)

    def _finish(self, steps: Iterable[_Step], counts: Counts, spool: Spool) -> Iterator[ShardPart]:
        """Yield the finished parts. Count and store them, and raise `Interrupted` on request after a stored window."""
        for finish, end, key, is_new in steps:
            part = None
            if finish:
                part, of_rows = finish()
                counts.of_rows(part.rows, of_rows)
                if key and is_new:
                    spool.add(part, of_rows)
            if end:
                counts.add(end)
                if key and is_new:
                    spool.finish(key, end)
            if part:
                yield counts.part(part)
            if end and key:
                stop_if_requested(self.reporter, spool.run.path)

    def _fitting(self, window: Window, work: _Work) -> Iterator[Finish]:
        """Yield the parts of a window; a document that does not fit into memory even alone is a bad document."""
        passages = self.settings.overflow == "passages"
        if passages:
            window = self._with_short_ids(window, work.counts)
        while window.rows:
            yielded = False
            try:
                for part in self._passages(window, work) if passages else self._documents(window, work):
                    yielded = True
                    yield part
                return
            except TooLarge as large:
                if yielded:
                    raise RunError(
                        f"A document does not fit: {large.reason}. Encode with a smaller --max-length."
                    ) from large
                is_large = np.array([document.text == large.text for document in window.documents])
                for row in window.take(np.flatnonzero(is_large)).rows:
                    self._refuse_or_skip(replace(row, reason=large.reason), work.counts)
                window = window.take(np.flatnonzero(~is_large))

    def _documents(self, window: Window, work: _Work) -> Iterator[Finish]:
        """Yield one part, a row for each document; vectors of known texts are not computed."""
        known, old = np.zeros(len(window.rows), dtype=np.bool_), None
        if self.old:
            known, old = self.old.find(window.hashes)
        new = window.take(np.flatnonzero(~known)) if known.any() else window
        if work.copies is None:
            computed: Encoded | Kept = self._computed(new, work, len(window.rows))
            copied = int(known.sum())
        else:
            computed = self._once(new, work.copies, work, len(window.rows))
            copied = int(known.sum() + computed.of_rows["deduplicated"].sum())
        if copied:
            self.reporter.advance(copied)
        yield partial(self._part, window, known, old, computed)

    def _part(
        self, window: Window, known: npt.NDArray[np.bool_], old: SparseRows | None, computed: Encoded | Kept
    ) -> tuple[ShardPart, OfRows]:
        """Return the rows of a window: old vectors where `known`, computed vectors otherwise."""
        kept = computed if isinstance(computed, Kept) else self._kept(computed)
        if old is not None:
            places = np.empty(len(known), dtype=np.int64)
            places[known] = np.arange(known.sum())
            places[~known] = known.sum() + np.arange((~known).sum())
            kept = reused(window.take(np.flatnonzero(known)), old).with_more(kept).take(places)
        numbers = np.array([row.row for row in window.rows], dtype=np.uint64)
        vectors = kept.vectors._replace(doc_ids=[document.id for document in window.documents])
        fields = [document.fields for document in window.documents]
        return ShardPart(numbers, window.hashes, vectors, fields), kept.of_rows

    def _once(self, window: Window, copies: Copies, work: _Work, rows: int) -> Kept:
        """Return the vectors of texts; each different text is computed once per shard."""
        new: dict[bytes, int] = {}  # the first place of each new text
        for place, (one, number) in enumerate(zip(window.hashes, copies.find(window.hashes).tolist(), strict=True)):
            if number < 0:
                new.setdefault(one, place)
        first = np.fromiter(new.values(), dtype=np.int64, count=len(new))
        copies.add(list(new), self._kept(self._computed(window.take(first), work, rows)))
        kept = copies.take(copies.find(window.hashes))
        kept.of_rows["deduplicated"] = 1
        kept.of_rows["deduplicated"][first] = 0
        return kept

    def _computed(self, window: Window, work: _Work, rows: int) -> Encoded:
        """Return the vectors of texts; with the copied ones they are `rows`."""
        tokens, encoded = window.tokens, partial(self._encoded, work.stopped)
        self.reporter.plan(rows, count_tokens(tokens))
        with too_large(window):
            if self.settings.overflow == "truncate":
                vectors = self.encoder.encode_tokens(tokens, encoded)
            else:
                vectors = self.encoder.encode_windows(tokens, encoded)
        work.counts.without_token += vectors.without_token
        return vectors

    def _encoded(self, stopped: Event, documents: int, tokens: int) -> None:
        """Report a batch. Raise `Stopped` if the shard is abandoned."""
        if stopped.is_set():
            raise Stopped
        self.reporter.advance(documents, tokens=tokens, detail=self.stages.slowest())

    def _kept(self, encoded: Encoded) -> Kept:
        vectors, underflow = self._stored(encoded.vectors)
        of_rows = np.zeros(len(underflow), OF_ROWS)
        of_rows["truncated"], of_rows["windows"] = encoded.truncated_of, encoded.windows_of
        of_rows["underflow"] = underflow
        return Kept(vectors, of_rows)

    def _with_short_ids(self, window: Window, counts: WindowCounts) -> Window:
        """Return the documents whose passages have valid ids; the others are bad documents."""
        fitting = []
        for place, (row, document, cut) in enumerate(zip(window.rows, window.documents, window.tokens, strict=True)):
            if reason := too_long_id(document.id, cut.windows - 1):
                self._refuse_or_skip(replace(row, reason=reason), counts)
            else:
                fitting.append(place)
        return window.take(np.array(fitting, dtype=np.int64))

    def _passages(self, window: Window, work: _Work) -> Iterator[Finish]:
        """Yield parts with one row for each window of each document."""
        self.reporter.plan(len(window.tokens), count_tokens(window.tokens))
        limits = {"max_rows": PART_ROWS, "max_bytes": WINDOW_BYTES}
        passages = self._encoded_passages(window, work)
        for group in passage_groups(window, passages, carry_text=not self.options.no_text, **limits):
            yield partial(self._passage_part, group)

    def _encoded_passages(self, window: Window, work: _Work) -> Iterator[EncodedPassage]:
        passages = self.encoder.encode_passages(window.tokens, partial(self._encoded, work.stopped))
        while True:
            with too_large(window):
                passage = next(passages, None)
            if passage is None:
                return
            work.counts.without_token += passage.without_token
            yield passage

    def _passage_part(self, group: list[Passage]) -> tuple[ShardPart, OfRows]:
        part = passage_part(group)
        vectors, underflow = self._stored(part.vectors)
        of_rows = np.zeros(len(group), OF_ROWS)
        of_rows["windows"], of_rows["underflow"] = 1, underflow
        return part._replace(vectors=vectors), of_rows

    def _stored(self, vectors: SparseRows) -> tuple[SparseRows, npt.NDArray[np.int64]]:
        """Return the vectors pruned and in the run's type of weights, and the number of underflows of each."""
        settings = self.settings
        if not self._density_checked.is_set():
            self._density_checked.set()
            if warning := dense_warning(len(vectors.token_ids), len(vectors.doc_ids)):
                self.reporter.warn(warning)
        vectors = prune(vectors, **settings.rules)
        try:
            stored = store_weights(vectors, settings.weights)
        except ValueError as error:
            advice = "Encode with --weights float32, and with --dtype float32 if that is not enough."
            raise RunError(f"Weights cannot be stored: {error}. {advice}") from error
        return stored, np.diff(vectors.indptr) - np.diff(stored.indptr)


def stop_if_requested(reporter: Reporter, run: Place) -> None:
    """Raise `Interrupted` if a stop was requested."""
    if reporter.stop_requested():
        raise Interrupted(
            f"Stopped on request; {run} keeps the finished shards and windows. Run the same command again to continue."
        )


def _again(window: Finished, copies: Copies | None) -> Iterator[Finish]:
    """Yield the parts of a window that an earlier process has finished, and keep the vectors of its new texts."""
    for part, of_rows in window.parts:
        if copies is not None:
            new = np.flatnonzero((of_rows["deduplicated"] == 0) & (of_rows["reused"] == 0))
            hashes = [part.text_hashes[place] for place in new.tolist()]
            copies.add(hashes, Kept(part.vectors.take(new), of_rows[new]))
        yield partial(_pair, part, of_rows)


def _pair(part: ShardPart, of_rows: OfRows) -> tuple[ShardPart, OfRows]:
    return part, of_rows
