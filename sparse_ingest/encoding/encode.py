"""The verb `encode`: a corpus and a checkpoint in, a run folder out.

Each shard is a fixed range of source rows. A process takes the shards in order, skips those that are done (after
hashing their rows again) or held by another process, and makes the rest; any number of processes may do this on one
run folder, and each may be killed at any instant. Not covered: what a shard holds (encoding/shard_maker.py).
"""

from __future__ import annotations

import ctypes
import platform
import time
from collections import deque
from collections.abc import Callable
from contextlib import closing, suppress
from importlib.metadata import version
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, NamedTuple

from sparse_ingest.checkpoints.settings import model_record
from sparse_ingest.corpora.cursor import Cursor
from sparse_ingest.corpora.sources import Corpus, Position
from sparse_ingest.encoding.counts import Counts
from sparse_ingest.encoding.duplicates import WAIT_S, Duplicates
from sparse_ingest.encoding.estimate import Estimate
from sparse_ingest.encoding.row_hash import RowHash
from sparse_ingest.encoding.settings import EncodeOptions as EncodeOptions
from sparse_ingest.encoding.settings import refuse_clashes, resolve, run_identity
from sparse_ingest.encoding.shard_maker import PartMaker
from sparse_ingest.encoding.shard_maker import Progress as Progress
from sparse_ingest.encoding.stages import WALL, Stages
from sparse_ingest.errors import Interrupted, RunError
from sparse_ingest.executors.local import devices_of, encode_on
from sparse_ingest.models.memory import BudgetLowered
from sparse_ingest.pipeline import Pipeline
from sparse_ingest.runs.manifest import FORMAT, Manifest
from sparse_ingest.runs.reuse import OldVectors, refuse_unlike
from sparse_ingest.runs.run import (
    Run,
    create_or_open_run,
    has_manifest,
    open_run,
    part_name,
    refuse_differences,
    refuse_strangers,
)
from sparse_ingest.runs.shards import shard_schema, write_shard
from sparse_ingest.storage.places import Place

if TYPE_CHECKING:
    from sparse_ingest.encoding.survey import CorpusSurvey
    from sparse_ingest.models.documents import DocumentEncoder


class EncodeReport(NamedTuple):
    """What a finished run holds, summed over its shards, and where it lies."""

    run: Place
    run_id: str
    shards: int
    rows: int
    terms: int
    empty: int
    truncated: int
    skipped: int
    underflow: int
    windows: int = 0
    reused: int = 0
    deduplicated: int = 0


def encode(
    corpus: Corpus,
    out: Place,
    *,
    pipeline: Pipeline,
    options: EncodeOptions,
    progress: Progress,
    stopping: Callable[[], bool] = lambda: False,
) -> EncodeReport:
    """Encode a corpus into a run folder, or finish a run that was begun.

    `stopping` is asked between shards; when it says yes, what is done stays and `Interrupted` is raised. With several
    devices each has a process of its own (executors/local.py).

    Raises:
        RunError: the folder holds a run of another identity, or the corpus changed since.
        CorpusError: a bad document (unless these are skipped), or an id that stands twice.
    """
    devices = devices_of(options.device, corpus, out, progress.note)
    if len(devices) > 1:
        encode_on(devices, out, (corpus, pipeline, options), progress, stopping)
        return _report(open_run(out))
    job = _Job(corpus, out, pipeline, options, progress)
    job.first_pass(stopping)
    return job.finish(stopping)


def dry_run(
    corpus: Corpus, *, pipeline: Pipeline, options: EncodeOptions, progress: Callable[[int, float | None], None]
) -> CorpusSurvey:
    """Read and check a whole corpus, and write nothing; where a model is named, count the tokens of a sample.

    Raises:
        CorpusError: a source cannot be read to its end.
    """
    from sparse_ingest.encoding.survey import survey

    tokenizer = None
    if pipeline.model.document is not None:
        checkpoint, pipeline = resolve(pipeline)
        from sparse_ingest.models.tokenizer import Tokenizer

        stride = pipeline.encode.window_stride
        tokenizer = Tokenizer(checkpoint.transformer, pipeline.model, window_stride=stride)
    cursor = Cursor(corpus, options.limit)
    return survey(cursor, tokenizer, shard_rows=options.shard_rows, progress=progress)


class _Job:
    """One process's work on one run folder."""

    def __init__(
        self, corpus: Corpus, out: Place, pipeline: Pipeline, options: EncodeOptions, progress: Progress
    ) -> None:
        self.corpus, self.options, self.progress = corpus, options, progress
        self.cursor = Cursor(corpus, options.limit)
        self.starts: list[Position] = []  # of each shard, as the first pass finds them
        self.estimate = Estimate(options.limit, options.processes, progress.estimate)
        self.stages = Stages()
        self.asked = pipeline.model
        self.checkpoint, self.pipeline = resolve(pipeline)
        self.model, self.settings = self.pipeline.model, self.pipeline.encode
        refuse_clashes(corpus, self.settings, reuse=options.reuse, copies=options.dedup_text != "off", out=out)
        self.old = open_run(options.reuse) if options.reuse else None
        self.run, self._build_encoder = self._open(out)
        self.schema = shard_schema(len(self.run.vocabulary()), self.settings.weights)
        self.maker = PartMaker(
            self.settings,
            corpus.fields.carry_text,
            options.on_bad_document,
            progress,
            self._moved,
            self.stages,
            self._start_encoder,
            self._open_old if self.old else None,
            (lambda: self.run.scratch_path("copies").parent) if options.dedup_text == "encode-once" else None,
        )

    def _open(self, out: Place) -> tuple[Run, Callable[[], DocumentEncoder]]:
        """Create the run, or open the one that is there, and a way to its encoder; refuses before a model is built."""
        refuse_strangers(out)
        dtype: str = self.settings.dtype
        if has_manifest(out):
            run = open_run(out)
            dtype = run.manifest.identity["dtype"] if dtype == "auto" else dtype
            refuse_differences(run, self._identity(dtype)[1])
            if run.has_vocabulary():
                self._refuse_unlike_old(dtype)
                return run, lambda: self._encoder_of(dtype)
        auto: dict[str, Any] = {}
        encoder = None
        if dtype == "auto":
            dtype, auto, encoder = self._choose_dtype()
        self._refuse_unlike_old(dtype)
        encoder = encoder or self._encoder_of(dtype)
        run_id, identity = self._identity(dtype)
        record = model_record(self.checkpoint, self.model, self.asked)
        manifest = Manifest(FORMAT, run_id, identity, self.options.shard_rows, record, auto)
        return create_or_open_run(out, manifest, encoder.vocabulary), lambda: encoder

    def _choose_dtype(self) -> tuple[str, dict[str, Any], DocumentEncoder | None]:
        """What `auto` stands for on the first documents of the corpus, and why; its encoder, if it was the last one."""
        from sparse_ingest.models.documents import choose_device
        from sparse_ingest.models.precision import SAMPLE, candidates, choose_dtype

        texts = [row.document.text for row in self.cursor.peek(SAMPLE) if row.document]
        device = choose_device(self.options.device)
        if faster := candidates(device):
            self.progress.note(f"Trying {', else '.join(faster)} against float32 on the first documents.")
        last: dict[str, DocumentEncoder] = {}

        def build(dtype: str) -> DocumentEncoder:
            last.clear()  # before the next one takes its memory
            last[dtype] = self._encoder_of(dtype)
            return last[dtype]

        choice = choose_dtype(build, device, texts)
        return choice["dtype"], {"dtype": choice}, last.get(choice["dtype"])

    def _encoder_of(self, dtype: str) -> DocumentEncoder:
        from sparse_ingest.models.documents import DocumentEncoder, choose_device

        return DocumentEncoder(
            self.checkpoint,
            self.model,
            device=choose_device(self.options.device),
            dtype=dtype,
            batch_tokens=self.settings.batch_tokens,
            window_stride=self.settings.window_stride,
        )

    def _identity(self, dtype: str) -> tuple[str, dict[str, Any]]:
        return run_identity(self.corpus, self.checkpoint, pipeline=self.pipeline, options=self.options, dtype=dtype)

    def _refuse_unlike_old(self, dtype: str) -> None:
        if self.old:
            refuse_unlike(self.old, self._identity(dtype)[1])

    def _start_encoder(self) -> DocumentEncoder:
        from sparse_ingest.models.heads.compaction import Rules

        encoder, settings = self._build_encoder(), self.settings
        if settings.alpha_mass is None:  # which looks at the whole row
            encoder.rules = Rules(settings.top_k, settings.max_ratio, settings.min_weight)
        limit = {"truncate": "a document", "windows": "a window", "passages": "a passage"}[self.settings.overflow]
        self.progress.note(
            f"Encoding with {self.model.document} on {encoder.device} in {self.run.manifest.identity['dtype']}, "
            f"at most {self.model.max_length} tokens {limit}."
        )
        return encoder

    def _open_old(self) -> OldVectors:
        assert self.old is not None
        vectors = OldVectors(self.old, self.run.scratch_path("reuse").parent)
        self.progress.note(f"Vectors of equal texts are copied from {self.old.path}, which knows {len(vectors):,}.")
        return vectors

    def first_pass(self, stopping: Callable[[], bool]) -> None:
        """Walk the whole corpus once: check the shards that are done, make those that nobody else holds."""
        while self.cursor.peek(1):
            shard = len(self.starts)
            self.starts.append(self.cursor.position)
            if done := self.run.done(shard):
                self._pass_over(shard, done)
            elif not self._try_shard(shard):
                deque(self.cursor.take(self.options.shard_rows), maxlen=0)  # passed over
            _stop_if(stopping, self.run)
        if (made := len(self.run.done_shards())) > len(self.starts):
            raise RunError(
                f"The corpus changed: it ends after {self.cursor.position.row} rows, but {self.run.path} has {made} "
                f"shards of {self.options.shard_rows}. Encode into a new folder."
            )

    def finish(self, stopping: Callable[[], bool]) -> EncodeReport:
        """Check ids over all shards and declare the run complete; a second process waits for the first."""
        if self._missing() and "encoder" not in vars(self.maker):
            self.progress.note(
                "A process found no shard left to make, and waits for those of others. Smaller ones (--shard-rows, "
                "in a new run) would keep it busy."
            )
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
        return _report(self.run)

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
            with closing(RowHash()) as rows:
                for row in self.cursor.take(self.options.shard_rows):
                    rows.add(row)
            if rows.hexdigest() != done["input_sha256"]:
                raise RunError(
                    f"The corpus changed: rows {done['first_row']} to {self.cursor.position.row - 1} are not those "
                    f"that {part_name(shard)} of {self.run.path} was made from. Encode into a new folder."
                )
        self.progress.earlier(self.cursor.position.row - done["first_row"])
        self._moved()

    def _moved(self) -> None:
        """Tell how far the corpus has been read."""
        row, share = self.cursor.position.row, self.cursor.share
        self.estimate.read(row, share)
        self.progress.read(row, share)

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
        encoder, start = self.maker.encoder, self.cursor.position  # built before the clock starts
        self.progress.stages(self.stages.slowest)
        while True:
            before, counts = self.stages.seconds(), Counts(start.row)
            try:
                sha256 = self._write_shard(shard, counts)
                break
            except BudgetLowered as lowered:
                # From its first row again: all batches of a shard come from one budget.
                self.progress.note(str(lowered))
                if not self.cursor.rereadable:
                    raise RunError(
                        f"Memory did not suffice, and standard input cannot be read again. Encode it again with "
                        f"--batch-tokens {lowered.batch_tokens}, or from a file."
                    ) from lowered
                self.cursor.jump(start)
        self.run.write_skipped(shard, sorted(counts.skipped))
        counts.seconds.update(self.stages.since(before))
        self.run.mark_done(shard, {
            "first_row": counts.first_row,
            **counts.record(),
            "sha256": sha256,
            "next": list(self.cursor.position),
            "versions": _versions(),
            "device": str(encoder.device),
            "host": platform.node(),
            "batch_tokens": encoder.batch_tokens,
        })  # fmt: skip
        _give_back_memory()

    def _write_shard(self, shard: int, counts: Counts) -> str:
        """Write the rows at the cursor as a shard; its SHA-256."""
        scratch = self.run.scratch_path(f"{part_name(shard)}.parquet")
        with (
            self.stages.busy(WALL),
            self.stages.busy("write"),
            closing(counts.input_rows),
            closing(self.maker.parts(self.cursor, self.options.shard_rows, counts)) as parts,
        ):
            return write_shard(
                self.estimate.watch(parts, scratch, first_row=counts.first_row),
                scratch=scratch,
                target=self.run.shard_path(shard),
                schema=self.schema,
                before=self.run.refuse_lost,
            )

    def _refuse_or_drop_duplicates(self) -> None:
        """An id that stands in two shards stops the run, or with `skip` the later row leaves its shard."""
        passages = self.settings.overflow == "passages"
        duplicates = Duplicates(self.run, self.cursor, self.starts, passages=passages)
        if self.options.on_bad_document == "fail":
            duplicates.refuse()
        else:
            duplicates.leave_out()


def _totals(run: Run) -> dict[str, Any]:
    """The content of complete.json."""
    sums = {"terms" if name == "nnz" else name: count for name, count in run.totals().items()}
    return {**sums, "duplicates_checked": True}


def _report(run: Run) -> EncodeReport:
    counted = {key: value for key, value in (run.complete() or {}).items() if key in EncodeReport._fields}
    return EncodeReport(run.path, run.manifest.run_id, **counted)


def _versions() -> dict[str, str]:
    packages = ["sparse-ingest", "torch", "transformers", "tokenizers", "numpy", "pyarrow"]
    packages += [package for package in ("llvmlite", "nanotoken") if find_spec(package)]
    return {"python": platform.python_version(), **{package: version(package) for package in packages}}


def _give_back_memory() -> None:
    """Give the system what the threads of a shard have freed, which glibc keeps for each of them: 350 MB of 1,500."""
    with suppress(AttributeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


def _stop_if(stopping: Callable[[], bool], run: Run) -> None:
    if stopping():
        raise Interrupted(
            f"Stopped on request after a whole shard; {run.path} keeps what is done. Start again to go on."
        )
