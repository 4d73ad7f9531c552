"""One process's work on a run: open it, encode its shards in order, check ids, and mark it as complete.

In: a corpus, the run folder, a pipeline, options. Out: a complete run; other processes may work on it at the same time.
shard_maker.py computes the content of a shard.
"""

from __future__ import annotations

import ctypes
import logging
import platform
import time
from collections import deque
from contextlib import closing, suppress
from dataclasses import replace
from functools import cached_property
from importlib.metadata import version
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from sparse_ingest.checkpoints.settings import model_record
from sparse_ingest.corpora.sources import Corpus, Cursor, Position
from sparse_ingest.encoding.counts import Counts, RowHash
from sparse_ingest.encoding.duplicates import WAIT_S, Duplicates
from sparse_ingest.encoding.estimate import Estimate
from sparse_ingest.encoding.options import EncodeOptions
from sparse_ingest.encoding.settings import refuse_clashes, resolve, run_identity
from sparse_ingest.encoding.shard_maker import ShardMaker
from sparse_ingest.encoding.stages import WALL, Stages
from sparse_ingest.errors import CorpusError, Interrupted, RunError
from sparse_ingest.executors.local import Worker
from sparse_ingest.models.memory import BudgetLowered
from sparse_ingest.pipeline import Pipeline
from sparse_ingest.reporting import SILENT, Reporter
from sparse_ingest.runs.checking import checked_shard
from sparse_ingest.runs.files import part_name
from sparse_ingest.runs.manifest import FORMAT, Manifest
from sparse_ingest.runs.reuse import OldVectors, refuse_other_settings
from sparse_ingest.runs.run import Run, create_or_open_run, existing_run, open_run, refuse_differences
from sparse_ingest.runs.shards import shard_schema, write_shard
from sparse_ingest.storage.places import Place, RemotePath, place_of

if TYPE_CHECKING:
    from sparse_ingest.models.documents import DocumentEncoder


logger = logging.getLogger(__name__)


def encode_alone(
    worker: Worker, corpus: Corpus, out: Place, pipeline: Pipeline, options: EncodeOptions, reporter: Reporter
) -> None:
    """Complete a run with one device of this process; see `encode` for what it raises."""
    job = Job(worker, corpus, out, pipeline, options, reporter)
    job.first_pass()
    job.finish()


class Job:
    """One process's work on one run folder. `like` is an earlier job, whose encoder and dtype are used."""

    def __init__(
        self,
        worker: Worker,
        corpus: Corpus,
        out: Place,
        pipeline: Pipeline,
        options: EncodeOptions,
        reporter: Reporter,
        like: Job | None = None,
    ) -> None:
        self.worker, self.corpus, self.options, self.reporter = worker, corpus, options, reporter
        self.cursor = Cursor(corpus, options.limit)
        self.starts: list[Position] = []  # of each shard, filled by the first pass
        self.stages = Stages()
        self.encoded = 0  # shards encoded by this process
        self.requested_model = pipeline.model
        self.checkpoint, self.pipeline = resolve(pipeline)
        self.model, self.settings = self.pipeline.model, self.pipeline.encode
        reuse = place_of(options.reuse) if options.reuse else None
        refuse_clashes(corpus, self.settings, reuse=reuse, copies=options.dedup_text != "off", out=out)
        self.old = open_run(reuse) if reuse else None
        self._encoder: DocumentEncoder | None = None
        if like:
            self._encoder = like.maker.encoder
            self.settings = replace(self.settings, dtype=like.run.manifest.identity["dtype"])
        self.run: Run = self._open(out)
        self.schema = shard_schema(len(self.run.vocabulary()), self.settings.weights)
        self.estimate = Estimate(self.cursor, options.limit, reporter if worker.number == 0 else SILENT)
        reporter.begin("documents")

    def _open(self, out: Place) -> Run:
        """Create the run, or open the existing one; one with other settings is refused before a model is built."""
        existing = existing_run(out)
        dtype: str = self.settings.dtype
        auto: dict[str, Any] = {}
        if existing:
            dtype = existing.manifest.identity["dtype"] if dtype == "auto" else dtype
            refuse_differences(existing, self._identity(dtype)[1])
        elif dtype == "auto":
            dtype, auto = self._choose_dtype()
        if self.old:
            refuse_other_settings(self.old, self._identity(dtype)[1])
        if existing and existing.has_vocabulary():
            return existing
        self._encoder = self._encoder or self._encoder_of(dtype)
        run_id, identity = self._identity(dtype)
        record = model_record(self.checkpoint, self.model, self.requested_model)
        manifest = Manifest(FORMAT, run_id, identity, self.options.shard_rows, record, auto)
        return create_or_open_run(out, manifest, self._encoder.vocabulary)

    def _choose_dtype(self) -> tuple[str, dict[str, Any]]:
        """Return the dtype that `auto` chooses on the first documents, and why; keep its encoder if it is the last."""
        from sparse_ingest.models.documents import choose_device
        from sparse_ingest.models.precision import SAMPLE, choose_dtype, faster_dtypes

        texts = [row.document.text for row in self.cursor.peek(SAMPLE) if row.document]
        device = choose_device(self.worker.device)
        if faster := faster_dtypes(device):
            self.reporter.note(f"Trying {', else '.join(faster)} against float32 on the first documents.")
        last: dict[str, DocumentEncoder] = {}

        def build(dtype: str) -> DocumentEncoder:
            last.clear()  # frees its memory for the next one
            last[dtype] = self._encoder_of(dtype)
            return last[dtype]

        choice = choose_dtype(build, device, texts)
        self._encoder = last.get(choice["dtype"])
        return choice["dtype"], {"dtype": choice}

    def _encoder_of(self, dtype: str) -> DocumentEncoder:
        from sparse_ingest.models.documents import build_document_encoder

        return build_document_encoder(self.checkpoint, self.pipeline, device=self.worker.device, dtype=dtype)

    def _identity(self, dtype: str) -> tuple[str, dict[str, Any]]:
        return run_identity(self.corpus, self.checkpoint, pipeline=self.pipeline, options=self.options, dtype=dtype)

    @cached_property
    def maker(self) -> ShardMaker:
        """Built with its encoder for the first shard: a complete run does not need a model."""
        settings, dtype = self.settings, self.run.manifest.identity["dtype"]
        encoder = self._encoder or self._encoder_of(dtype)
        # alpha_mass needs the complete row, so the device must not drop terms before it.
        if not settings.alpha_mass:
            encoder.rules = settings
        limit = {"truncate": "a document", "windows": "a window", "passages": "a passage"}[settings.overflow]
        self.reporter.note(
            f"Encoding with {self.model.document} on {encoder.device} in {dtype}, "
            f"at most {self.model.max_length} tokens {limit}."
        )
        logger.info(
            "Head: %s. Tokenizing with the library tokenizers, %d batches at a time of up to %s tokens.",
            encoder.maker.head_name,
            encoder.maker.workers,
            f"{encoder.batch_tokens:,}",
        )
        if missing := encoder.missing_packages():
            self.reporter.note(
                f"Encoding is slower without {' and '.join(missing)}: pip install 'sparse-ingest[fast]' adds a "
                "compiled head for CPUs and a fast WordPiece tokenizer."
            )
        old = None
        if self.old is not None:
            old = OldVectors(self.old, self.run.scratch_path("reuse").parent)
            self.reporter.note(f"Vectors of equal texts are copied from {self.old.path}, which has {len(old):,}.")
        copies = self.run.scratch_path("copies").parent if self.options.dedup_text == "encode-once" else None
        return ShardMaker(encoder, settings, self.options, self.reporter, self.stages, old, copies)

    def first_pass(self) -> None:
        """Read the complete corpus once: check finished shards, and encode those that no other process has locked."""
        while self.cursor.peek(1):
            shard = len(self.starts)
            self.starts.append(self.cursor.position)
            if done := self.run.done(shard):
                self._check_done(shard, done)
            elif not self._try_shard(shard):
                deque(self.cursor.take(self.options.shard_rows), maxlen=0)  # skip its rows
            self._stop_if_requested()
        for message in self.corpus.merged() if self.worker.number == 0 else ():
            self.reporter.warn(message)
        if (done_shards := len(self.run.done_shards())) > len(self.starts):
            raise RunError(
                f"The corpus changed: it ends after {self.cursor.position.row} rows, but {self.run.path} has "
                f"{done_shards} shards of {self.options.shard_rows}. Encode into a new folder."
            )

    def finish(self) -> None:
        """Check ids over all shards and mark the run as complete; other processes wait for the one that does it."""
        if self._missing() and not self.encoded:
            self.reporter.note(
                "A process found no shard left to encode and waits for other processes. Smaller shards (--shard-rows, "
                "in a new run) would keep it busy."
            )
        self._encode_missing()
        if not (self.options.allow_empty or self.run.has_documents()):
            rows = self.cursor.position.row
            found = f"all {rows:,} rows were skipped; {self.run.path / 'skipped'} lists them" if rows else "no rows"
            raise CorpusError(
                f"The corpus has no documents ({found}). Fix --corpus or the command that writes it, then run the "
                "same command again; or pass --allow-empty to finish a run without documents."
            )
        while not self.run.complete():
            with self.run.lock("complete") as held:
                # Checked again under the lock: its last holder may have died while it replaced a shard.
                if held and not self._missing() and not self.run.complete():
                    self._refuse_or_drop_duplicates()
                    self.run.sweep()
                    sums = {"terms" if name == "nnz" else name: count for name, count in self.run.totals().items()}
                    self.run.mark_complete({**sums, "duplicates_checked": True})
                elif not held:
                    time.sleep(WAIT_S)
                    self._stop_if_requested()
            self._encode_missing()

    def _missing(self) -> list[int]:
        return sorted(set(range(len(self.starts))).difference(self.run.done_shards()))

    def _encode_missing(self) -> None:
        """Wait for the shards of other processes, and encode those whose process died."""
        while missing := self._missing():
            for shard in missing:
                self.cursor.jump(self.starts[shard])
                if self._try_shard(shard):
                    break
            else:
                time.sleep(WAIT_S)
            self._stop_if_requested()

    def _check_done(self, shard: int, done: dict[str, Any]) -> None:
        """Skip a finished shard; unless the corpus is trusted, check the hashes of its file and of its source rows."""
        if self.options.trust_corpus:
            self.cursor.jump(Position(*done["next"]))
        else:
            if not isinstance(self.run.path, RemotePath):
                try:
                    checked_shard(self.run, shard)
                except RunError:
                    # Another process that finishes the run may have replaced the shard, to remove duplicates.
                    if self.run.done(shard) == done:
                        raise
            with closing(RowHash()) as hashed:
                for row in self.cursor.take(self.options.shard_rows):
                    hashed.add(row)
            if hashed.hexdigest() != done["input_sha256"]:
                raise RunError(
                    f"The corpus changed: rows {done['first_row']} to {self.cursor.position.row - 1} differ from those "
                    f"of {part_name(shard)} in {self.run.path}. Encode into a new folder."
                )
        if self.worker.processes == 1:  # otherwise another process may have reported it
            self.reporter.earlier(self.cursor.position.row - done["first_row"])
        if rows := self.cursor.expected_rows:
            self.reporter.expect(rows)

    def _try_shard(self, shard: int) -> bool:
        """Encode the shard at the cursor. Return False if another process has locked or finished it."""
        with self.run.lock(part_name(shard)) as held:
            if not held or self.run.done(shard):
                return False
            # A complete run that lost a shard is checked for duplicates again.
            self.run.unmark_complete()
            self._encode_shard(shard)
            self.encoded += 1
            return True

    def _encode_shard(self, shard: int) -> None:
        encoder, start = self.maker.encoder, self.cursor.position  # built before the clock starts
        while True:
            before, counts = self.stages.seconds(), Counts(start.row)
            try:
                sha256 = self._write_shard(shard, counts)
                break
            except BudgetLowered as lowered:
                # Restarted from its first row: all batches of a shard have one budget.
                self.reporter.note(str(lowered))
                if not self.cursor.rereadable:
                    raise RunError(
                        "Out of memory, and standard input cannot be read again. Run the command again with "
                        f"--batch-tokens {lowered.batch_tokens}, or with a file."
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
        _return_memory()

    def _write_shard(self, shard: int, counts: Counts) -> str:
        """Write the rows at the cursor as a shard, and return its SHA-256."""
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

    def _stop_if_requested(self) -> None:
        if self.reporter.stop_requested():
            raise Interrupted(
                f"Stopped on request after a complete shard; {self.run.path} keeps the finished shards. Run the same "
                "command again to continue."
            )

    def _refuse_or_drop_duplicates(self) -> None:
        """Raise `CorpusError` for an id in two shards, or with `skip` remove the later row."""
        passages = self.settings.overflow == "passages"
        duplicates = Duplicates(self.run, self.cursor, self.starts, passages=passages)
        if self.options.on_bad_document == "fail":
            duplicates.refuse()
        else:
            duplicates.skip()


def _versions() -> dict[str, str]:
    packages = ["sparse-ingest", "torch", "transformers", "tokenizers", "numpy", "pyarrow"]
    packages += [package for package in ("llvmlite", "nanotoken") if find_spec(package)]
    return {"python": platform.python_version(), **{package: version(package) for package in packages}}


def _return_memory() -> None:
    """Return to the system what the threads of a shard have freed and glibc keeps per thread: 350 of 1,500 MB."""
    with suppress(AttributeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)
