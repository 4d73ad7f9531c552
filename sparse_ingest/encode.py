"""The verb `encode`: a corpus and a checkpoint in, a run folder out.

Each shard is a fixed range of source rows. A process takes the shards in order, skips those that are done (after
hashing their rows again) or held by another process, and makes the rest; any number of processes may do this on one
run folder, and each may be killed at any instant. Within a shard, rows flow in windows of one row group, so memory
does not grow with the corpus or the shard.
"""

from __future__ import annotations

import hashlib
import platform
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from functools import cached_property
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol

import numpy as np

from sparse_ingest.checkpoints.layouts import Checkpoint, read_checkpoint
from sparse_ingest.checkpoints.settings import document_identity, model_record, resolve_pipeline
from sparse_ingest.corpora.cursor import Cursor
from sparse_ingest.corpora.documents import shown
from sparse_ingest.corpora.files import Corpus, Position, bad_document
from sparse_ingest.errors import CorpusError, Interrupted, MissingExtraError, PipelineError, RunError
from sparse_ingest.pipeline import Pipeline
from sparse_ingest.pruning import prune
from sparse_ingest.records import Document, SourceRow, SparseRows
from sparse_ingest.runs.identity import canonical_json
from sparse_ingest.runs.ids import find_duplicates, remove_rows
from sparse_ingest.runs.manifest import (
    FORMAT,
    SHARD_ROWS,
    Manifest,
    Run,
    SkippedRow,
    create_or_open_run,
    has_manifest,
    identity_of,
    open_run,
    part_name,
    refuse_differences,
    refuse_strangers,
)
from sparse_ingest.runs.shards import (
    PART_ROWS,
    ShardPart,
    shard_schema,
    store_weights,
    text_hash,
    write_shard,
)

if TYPE_CHECKING:
    from sparse_ingest.models.documents import DocumentEncoder

WINDOW_BYTES = 32 << 20  # text of one row group at most, so that very long documents do not fill the memory
WAIT_S = 1.0  # between looks at shards that other processes hold


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


@dataclass(frozen=True)
class EncodeOptions:
    """What is chosen at the command line and is no part of a pipeline file."""

    device: str = "auto"
    shard_rows: int = SHARD_ROWS
    limit: int | None = None
    on_bad_document: Literal["fail", "skip"] = "fail"
    trust_corpus: bool = False


class EncodeReport(NamedTuple):
    """What a finished run holds, summed over its shards, and where it lies."""

    run: Path
    run_id: str
    shards: int
    rows: int
    terms: int
    empty: int
    truncated: int
    skipped: int
    underflow: int


@dataclass
class _Counts:
    """What one shard's record in done/ counts, summed while its parts are made."""

    rows: int = 0
    nnz: int = 0
    empty: int = 0
    truncated: int = 0
    underflow: int = 0
    without_token: int = 0
    skipped: list[SkippedRow] = field(default_factory=list)
    input_sha256: Any = field(default_factory=hashlib.sha256)
    seconds: dict[str, float] = field(default_factory=lambda: {"read": 0.0, "encode": 0.0, "write": 0.0})


def encode(
    corpus: Corpus,
    out: Path,
    *,
    pipeline: Pipeline,
    options: EncodeOptions,
    progress: Progress,
    stopping: Callable[[], bool] = lambda: False,
) -> EncodeReport:
    """Encode a corpus into a run folder, or finish a run that was begun.

    `stopping` is asked between shards; when it says yes, what is done stays and `Interrupted` is raised.

    Raises:
        RunError: the folder holds a run of another identity, or the corpus changed since.
        CorpusError: a bad document (unless these are skipped), or an id that stands twice.
    """
    job = _Job(corpus, out, pipeline, options, progress)
    job.first_pass(stopping)
    return job.finish(stopping)


class _Job:
    """One process's work on one run folder."""

    def __init__(
        self, corpus: Corpus, out: Path, pipeline: Pipeline, options: EncodeOptions, progress: Progress
    ) -> None:
        self.options = options
        self.progress = progress
        self.cursor = Cursor(corpus, options.limit)
        self.starts: list[Position] = []  # of each shard, as the first pass finds them
        checkpoint, pipeline = _resolve(pipeline)
        self.model, self.settings = pipeline.model, pipeline.encode
        self.run, self._build_encoder = _open(corpus, out, checkpoint, pipeline, options, self.cursor)
        self.schema = shard_schema(len(self.run.vocabulary()), self.settings.weights)

    @cached_property
    def encoder(self) -> DocumentEncoder:
        """Built when the first shard is made: a run that is complete needs no model."""
        encoder = self._build_encoder()
        self.progress.note(
            f"Encoding with {self.model.document} on {encoder.device} in {self.run.manifest.identity['dtype']}, "
            f"at most {self.model.max_length} tokens a document."
        )
        return encoder

    def first_pass(self, stopping: Callable[[], bool]) -> None:
        """Walk the whole corpus once: check the shards that are done, make those that nobody else holds."""
        while self.cursor.peek(1):
            shard = len(self.starts)
            self.starts.append(self.cursor.position)
            if done := self.run.done(shard):
                self._pass_over(shard, done)
            elif not self._try_shard(shard):
                _drain(self.cursor.take(self.options.shard_rows))
            _stop_if(stopping, self.run)
        if (made := len(self.run.done_shards())) > len(self.starts):
            raise RunError(
                f"The corpus changed: it ends after {self.cursor.position.row} rows, but {self.run.path} has {made} "
                f"shards of {self.options.shard_rows}. Encode into a new folder."
            )

    def finish(self, stopping: Callable[[], bool]) -> EncodeReport:
        """Check ids over all shards and declare the run complete; a second process waits for the first."""
        self._make_missing(stopping)
        while not self.run.complete():
            with self.run.lock("complete") as held:
                # Asked again under the lock: its last holder may have died while it replaced a shard.
                if held and not self._missing() and not self.run.complete():
                    self._refuse_or_drop_duplicates()
                    self.run.sweep()
                    self.run.mark_complete(_totals(self.run))
                elif not held:
                    time.sleep(WAIT_S)
                    _stop_if(stopping, self.run)
            self._make_missing(stopping)
        return EncodeReport(self.run.path, self.run.manifest.run_id, **_counted(self.run.complete() or {}))

    def _missing(self) -> list[int]:
        return sorted(set(range(len(self.starts))).difference(self.run.done_shards()))

    def _make_missing(self, stopping: Callable[[], bool]) -> None:
        """Wait for the shards that others hold, and make those whose holder died."""
        while missing := self._missing():
            for shard in missing:
                self.cursor.jump(self.starts[shard])
                if self._try_shard(shard):
                    break
            else:
                time.sleep(WAIT_S)
            _stop_if(stopping, self.run)

    def _pass_over(self, shard: int, done: dict[str, Any]) -> None:
        """Skip a finished shard; unless the corpus is trusted, its rows must be those that were encoded."""
        if self.options.trust_corpus:
            self.cursor.jump(Position(*done["next"]))
        else:
            digest = hashlib.sha256()
            for row in self.cursor.take(self.options.shard_rows):
                _hash_row(digest, row)
            if digest.hexdigest() != done["input_sha256"]:
                raise RunError(
                    f"The corpus changed: rows {done['first_row']} to {self.cursor.position.row - 1} are not those "
                    f"that {part_name(shard)} of {self.run.path} was made from. Encode into a new folder."
                )
        self.progress.earlier(done["rows"] + done["skipped"])
        self.progress.read(self.cursor.position.row, self.cursor.share)

    def _try_shard(self, shard: int) -> bool:
        """Make a shard, whose rows the cursor is at, unless another process holds or has made it; whether it did."""
        with self.run.lock(part_name(shard)) as held:
            if not held or self.run.done(shard):
                return False
            # A run that was complete and lost a shard is checked for duplicates again.
            self.run.unmark_complete()
            self._make_shard(shard)
            return True

    def _make_shard(self, shard: int) -> None:
        began = time.monotonic()
        first_row, counts = self.cursor.position.row, _Counts()
        sha256 = write_shard(
            self._parts(counts),
            scratch=self.run.scratch_path(f"{part_name(shard)}.parquet"),
            target=self.run.shard_path(shard),
            schema=self.schema,
        )
        self.run.write_skipped(shard, counts.skipped)
        known = counts.seconds["read"] + counts.seconds["encode"]
        counts.seconds["write"] = time.monotonic() - began - known
        self.run.mark_done(shard, {
            "first_row": first_row,
            "rows": counts.rows,
            "nnz": counts.nnz,
            "empty": counts.empty,
            "truncated": counts.truncated,
            "skipped": len(counts.skipped),
            "underflow": counts.underflow,
            "without_token": counts.without_token,
            "sha256": sha256,
            "input_sha256": counts.input_sha256.hexdigest(),
            "next": list(self.cursor.position),
            "versions": _versions(),
            "device": str(self.encoder.device),
            "host": platform.node(),
            "batch_tokens": self.encoder.batch_tokens,
            "seconds": {stage: round(seconds, 3) for stage, seconds in counts.seconds.items()},
        })  # fmt: skip

    def _parts(self, counts: _Counts) -> Iterator[ShardPart]:
        """The row groups of the shard at the source's position."""
        rows = self.cursor.take(self.options.shard_rows)
        while True:
            began = time.monotonic()
            window = self._window(rows, counts)
            counts.seconds["read"] += time.monotonic() - began
            if window is None:
                return
            self.progress.read(self.cursor.position.row, self.cursor.share)
            if window:
                began = time.monotonic()
                part = self._encode_window(window, counts)
                counts.seconds["encode"] += time.monotonic() - began
                yield part

    def _window(self, rows: Iterator[SourceRow], counts: _Counts) -> list[tuple[int, Document]] | None:
        """The next rows that fit one row group; None at the shard's end. Bad ones are refused or noted."""
        window: list[tuple[int, Document]] = []
        size, seen = 0, 0
        for row in rows:
            seen += 1
            _hash_row(counts.input_sha256, row)
            if row.document is None:
                if self.options.on_bad_document == "fail":
                    raise bad_document(row)
                counts.skipped.append(SkippedRow(row.row, row.file, row.line, row.reason or ""))
            else:
                window.append((row.row, row.document))
                size += len(row.document.text) + len(row.document.fields)
            if seen == PART_ROWS or size >= WINDOW_BYTES:
                break
        return window if seen else None

    def _encode_window(self, window: list[tuple[int, Document]], counts: _Counts) -> ShardPart:
        documents = [document for _, document in window]
        encoded = self.encoder.encode([document.text for document in documents], self.progress.encoded)
        vectors = SparseRows(
            [document.id for document in documents], encoded.indptr, encoded.token_ids, encoded.weights
        )
        settings = self.settings
        vectors = prune(vectors, top_k=settings.top_k, max_ratio=settings.max_ratio, min_weight=settings.min_weight)
        try:
            vectors, underflow = store_weights(vectors, settings.weights)
        except ValueError as error:
            advice = "Encode with --weights float32, and with --dtype float32 if that is not enough."
            raise RunError(f"Weights cannot be kept: {error}. {advice}") from error
        counts.rows += len(documents)
        counts.nnz += len(vectors.weights)
        counts.empty += int(np.count_nonzero(np.diff(vectors.indptr) == 0))
        counts.truncated += encoded.truncated
        counts.underflow += underflow
        counts.without_token += encoded.without_token
        return ShardPart(
            np.array([row for row, _ in window], dtype=np.uint64),
            [text_hash(document.text) for document in documents],
            vectors,
            [document.fields for document in documents],
        )

    def _refuse_or_drop_duplicates(self) -> None:
        """An id that stands in two shards stops the run, or with `skip` the later row leaves its shard."""
        duplicates = find_duplicates(self.run)
        if self.options.on_bad_document == "fail":
            if one := next(duplicates, None):
                (file, line), (again, later) = self._places([one.first, one.again])
                raise CorpusError(
                    f"The id {shown(one.doc_id)} stands twice: {file} line {line} and {again} line {later}. "
                    "Remove one, or leave later ones out with --on-bad-document skip."
                )
            return
        found = list(duplicates)
        firsts = self._places([duplicate.first for duplicate in found])
        agains = self._places([duplicate.again for duplicate in found])
        leaving: dict[int, dict[int, SkippedRow]] = {}
        for duplicate, first, (file, line) in zip(found, firsts, agains, strict=True):
            shard, row = duplicate.again
            reason = f"duplicate id {shown(duplicate.doc_id)}: first at {first[0]} line {first[1]}"
            leaving.setdefault(shard, {})[row] = SkippedRow(row, file, line, reason)
        for shard, rows in sorted(leaving.items()):
            # Held, so that a process which comes now waits for the shard instead of making it anew meanwhile.
            while True:
                with self.run.lock(part_name(shard)) as held:
                    if held:
                        remove_rows(self.run, shard, rows)
                        break
                time.sleep(WAIT_S)

    def _places(self, positions: list[tuple[int, int]]) -> list[tuple[str, int]]:
        """File and line of source rows, given with their shards; each shard is read again once."""
        wanted: dict[int, set[int]] = {}
        for shard, row in positions:
            wanted.setdefault(shard, set()).add(row)
        places: dict[int, tuple[str, int]] = {}
        for shard, rows in sorted(wanted.items()):
            places.update(self.cursor.places(self.starts[shard], rows))
        if missing := sorted(row for _, row in positions if row not in places):
            raise RunError(f"The corpus changed: it has no row {missing[0]} any more. Encode into a new folder.")
        return [places[row] for _, row in positions]


def _resolve(pipeline: Pipeline) -> tuple[Checkpoint, Pipeline]:
    """The checkpoint, and the pipeline with every setting that it decides."""
    # Looked for, not imported: a run that is complete needs no torch.
    if not (find_spec("torch") and find_spec("transformers")):
        raise MissingExtraError("encode", "Encoding")
    if pipeline.model.document is None:
        raise PipelineError("No model: name one with --model, or [model] document in the pipeline file.")
    if pipeline.encode.overflow != "truncate" or pipeline.encode.dtype == "int8":
        raise PipelineError('This release cuts long documents (overflow = "truncate") and computes no int8.')
    checkpoint = read_checkpoint(pipeline.model.document, pipeline.model.revision)
    return checkpoint, resolve_pipeline(pipeline, checkpoint)


def _open(
    corpus: Corpus,
    out: Path,
    checkpoint: Checkpoint,
    pipeline: Pipeline,
    options: EncodeOptions,
    cursor: Cursor,
) -> tuple[Run, Callable[[], DocumentEncoder]]:
    """Create the run, or open the one that is there, and a way to its encoder; refuses before a model is built."""

    def build(dtype: str) -> DocumentEncoder:
        return _build_encoder(checkpoint, pipeline, options.device, dtype)

    def identity(dtype: str) -> dict[str, Any]:
        return _identity(corpus, checkpoint, pipeline, options, dtype)

    refuse_strangers(out)
    dtype: str = pipeline.encode.dtype
    if has_manifest(out):
        run = open_run(out)
        dtype = run.manifest.identity["dtype"] if dtype == "auto" else dtype
        refuse_differences(run, identity_of(identity(dtype))[1])
        if run.has_vocabulary():
            return run, lambda: build(dtype)
    auto: dict[str, Any] = {}
    if dtype == "auto":
        dtype, auto = _choose_dtype(build, options.device, cursor)
    encoder = build(dtype)
    run_id, content = identity_of(identity(dtype))
    manifest = Manifest(FORMAT, run_id, content, options.shard_rows, model_record(checkpoint, pipeline.model), auto)
    return create_or_open_run(out, manifest, encoder.vocabulary), lambda: encoder


def _choose_dtype(build: Callable[[str], DocumentEncoder], device: str, cursor: Cursor) -> tuple[str, dict[str, Any]]:
    """What `auto` stands for on the first documents of the corpus, and why."""
    from sparse_ingest.models.documents import choose_device
    from sparse_ingest.models.precision import SAMPLE, choose_dtype

    texts = [row.document.text for row in cursor.peek(SAMPLE) if row.document]
    choice = choose_dtype(build, choose_device(device), texts)
    return choice["dtype"], {"dtype": choice}


def _build_encoder(checkpoint: Checkpoint, pipeline: Pipeline, device: str, dtype: str) -> DocumentEncoder:
    from sparse_ingest.models.documents import DocumentEncoder, choose_device

    tokens = pipeline.encode.batch_tokens
    return DocumentEncoder(checkpoint, pipeline.model, device=choose_device(device), dtype=dtype, batch_tokens=tokens)


def _identity(
    corpus: Corpus, checkpoint: Checkpoint, pipeline: Pipeline, options: EncodeOptions, dtype: str
) -> dict[str, Any]:
    """Everything that changes a byte of a shard."""
    encode = asdict(pipeline.encode)
    return {
        "model": document_identity(checkpoint, pipeline.model),
        "dtype": dtype,
        **{key: encode[key] for key in ("weights", "top_k", "max_ratio", "min_weight", "overflow")},
        "fields": asdict(corpus.fields),
        "corpus": corpus.identity(),
        "limit": options.limit,
        "shard_rows": options.shard_rows,
    }


def _hash_row(digest: hashlib._Hash, row: SourceRow) -> None:
    """Add a row to the hash by which a resumed run knows that the corpus is still the same.

    Of a bad row only that it is bad: its reason is worded by a release and may hold the path of a file.
    """
    content = [row.row, None] if row.document is None else [row.row, *row.document]
    digest.update(canonical_json(content).encode() + b"\n")


def _totals(run: Run) -> dict[str, Any]:
    """The content of complete.json."""
    sums = {"terms" if name == "nnz" else name: count for name, count in run.totals().items()}
    return {**sums, "duplicates_checked": True}


def _counted(complete: dict[str, Any]) -> dict[str, int]:
    return {key: value for key, value in complete.items() if key in EncodeReport._fields}


def _versions() -> dict[str, str]:
    packages = ("sparse-ingest", "torch", "transformers", "tokenizers", "numpy", "pyarrow")
    return {"python": platform.python_version(), **{package: version(package) for package in packages}}


def _stop_if(stopping: Callable[[], bool], run: Run) -> None:
    if stopping():
        raise Interrupted(
            f"Stopped on request after a whole shard; {run.path} keeps what is done. Start again to go on."
        )


def _drain(rows: Iterable[SourceRow]) -> None:
    for _ in rows:
        pass
