"""One process's work on a run folder: open the run, take its shards in order, check ids, declare it complete.

In: a corpus, the run folder, a pipeline, options. Out: a complete run; other processes may work on it at the same time.
Not covered: what a shard holds (shard_maker.py).
"""

from __future__ import annotations

import ctypes
import platform
import time
from collections import deque
from contextlib import closing, suppress
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
from sparse_ingest.runs.reuse import OldVectors, refuse_unlike
from sparse_ingest.runs.run import Run, begun_run, create_or_open_run, open_run, refuse_differences
from sparse_ingest.runs.shards import shard_schema, write_shard
from sparse_ingest.storage.places import Place, RemotePath, place_of

if TYPE_CHECKING:
    from sparse_ingest.models.documents import DocumentEncoder


def encode_alone(
    worker: Worker, corpus: Corpus, out: Place, pipeline: Pipeline, options: EncodeOptions, reporter: Reporter
) -> None:
    """Complete a run with one device of this process; see `encode` for what it raises."""
    job = _Job(worker, corpus, out, pipeline, options, reporter)
    job.first_pass()
    job.finish()


class _Job:
    """One process's work on one run folder."""

    def __init__(
        self, worker: Worker, corpus: Corpus, out: Place, pipeline: Pipeline, options: EncodeOptions, reporter: Reporter
    ) -> None:
        self.worker, self.corpus, self.options, self.reporter = worker, corpus, options, reporter
        self.cursor = Cursor(corpus, options.limit)
        self.starts: list[Position] = []  # of each shard, as the first pass finds them
        self.stages = Stages()
        self.made = 0  # shards, by this process
        self.requested_model = pipeline.model
        self.checkpoint, self.pipeline = resolve(pipeline)
        self.model, self.settings = self.pipeline.model, self.pipeline.encode
        reuse = place_of(options.reuse) if options.reuse else None
        refuse_clashes(corpus, self.settings, reuse=reuse, copies=options.dedup_text != "off", out=out)
        self.old = open_run(reuse) if reuse else None
        self._encoder: DocumentEncoder | None = None  # that of the last candidate for `auto`
        self.run = self._open(out)
        self.schema = shard_schema(len(self.run.vocabulary()), self.settings.weights)
        self.estimate = Estimate(
            self.cursor, options.limit, worker.processes, reporter if worker.number == 0 else SILENT
        )
        reporter.begin("documents")

    def _open(self, out: Place) -> Run:
        """Create the run, or open the one that is there; refuses before a model is built."""
        begun = begun_run(out)
        dtype: str = self.settings.dtype
        auto: dict[str, Any] = {}
        if begun:
            dtype = begun.manifest.identity["dtype"] if dtype == "auto" else dtype
            refuse_differences(begun, self._identity(dtype)[1])
        elif dtype == "auto":
            dtype, auto = self._choose_dtype()
        if self.old:
            refuse_unlike(self.old, self._identity(dtype)[1])
        if begun and begun.has_vocabulary():
            return begun
        self._encoder = self._encoder or self._encoder_of(dtype)
        run_id, identity = self._identity(dtype)
        record = model_record(self.checkpoint, self.model, self.requested_model)
        manifest = Manifest(FORMAT, run_id, identity, self.options.shard_rows, record, auto)
        return create_or_open_run(out, manifest, self._encoder.vocabulary)

    def _choose_dtype(self) -> tuple[str, dict[str, Any]]:
        """What `auto` means on the first documents of the corpus, and why. Keeps its encoder, if built last."""
        from sparse_ingest.models.documents import choose_device
        from sparse_ingest.models.precision import SAMPLE, candidates, choose_dtype

        texts = [row.document.text for row in self.cursor.peek(SAMPLE) if row.document]
        device = choose_device(self.worker.device)
        if faster := candidates(device):
            self.reporter.note(f"Trying {', else '.join(faster)} against float32 on the first documents.")
        last: dict[str, DocumentEncoder] = {}

        def build(dtype: str) -> DocumentEncoder:
            last.clear()  # before the next one takes its memory
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
        """Built with its encoder when the first shard is made: a run that is complete needs no model."""
        settings, dtype = self.settings, self.run.manifest.identity["dtype"]
        encoder = self._encoder or self._encoder_of(dtype)
        # The device drops terms early only where no rule is left that looks at the complete row.
        if not settings.alpha_mass:
            encoder.rules = settings
        limit = {"truncate": "a document", "windows": "a window", "passages": "a passage"}[settings.overflow]
        self.reporter.note(
            f"Encoding with {self.model.document} on {encoder.device} in {dtype}, "
            f"at most {self.model.max_length} tokens {limit}."
        )
        old = None
        if self.old is not None:
            old = OldVectors(self.old, self.run.scratch_path("reuse").parent)
            self.reporter.note(f"Vectors of equal texts are copied from {self.old.path}, which knows {len(old):,}.")
        copies = self.run.scratch_path("copies").parent if self.options.dedup_text == "encode-once" else None
        return ShardMaker(encoder, settings, self.options, self.reporter, self.stages, old, copies)

    def first_pass(self) -> None:
        """Walk the whole corpus once: check the shards that are done, make those that no other process has."""
        while self.cursor.peek(1):
            shard = len(self.starts)
            self.starts.append(self.cursor.position)
            if done := self.run.done(shard):
                self._pass_over(shard, done)
            elif not self._try_shard(shard):
                deque(self.cursor.take(self.options.shard_rows), maxlen=0)  # skip its rows
            self._stop_if_requested()
        for message in self.corpus.merged() if self.worker.number == 0 else ():
            self.reporter.warn(message)
        if (made := len(self.run.done_shards())) > len(self.starts):
            raise RunError(
                f"The corpus changed: it ends after {self.cursor.position.row} rows, but {self.run.path} has {made} "
                f"shards of {self.options.shard_rows}. Encode into a new folder."
            )

    def finish(self) -> None:
        """Check ids over all shards and declare the run complete; a second process waits for the first."""
        if self._missing() and not self.made:
            self.reporter.note(
                "A process found no shard left to make, and waits for those of others. Smaller ones (--shard-rows, "
                "in a new run) would keep it busy."
            )
        self._make_missing()
        if not (self.options.allow_empty or self.run.has_documents()):
            rows = self.cursor.position.row
            found = f"all {rows:,} rows were skipped; {self.run.path / 'skipped'} lists them" if rows else "no rows"
            raise CorpusError(
                f"The corpus has no documents ({found}). Fix --corpus or the command that writes it, then start the "
                "same command again; or pass --allow-empty to finish a run without documents."
            )
        while not self.run.complete():
            with self.run.lock("complete") as held:
                # Asked again under the lock: its last holder may have died while it replaced a shard.
                if held and not self._missing() and not self.run.complete():
                    self._refuse_or_drop_duplicates()
                    self.run.sweep()
                    sums = {"terms" if name == "nnz" else name: count for name, count in self.run.totals().items()}
                    self.run.mark_complete({**sums, "duplicates_checked": True})
                elif not held:
                    time.sleep(WAIT_S)
                    self._stop_if_requested()
            self._make_missing()

    def _missing(self) -> list[int]:
        return sorted(set(range(len(self.starts))).difference(self.run.done_shards()))

    def _make_missing(self) -> None:
        """Wait for the shards that other processes have, and make those whose process died."""
        while missing := self._missing():
            for shard in missing:
                self.cursor.jump(self.starts[shard])
                if self._try_shard(shard):
                    break
            else:
                time.sleep(WAIT_S)
            self._stop_if_requested()

    def _pass_over(self, shard: int, done: dict[str, Any]) -> None:
        """Skip a finished shard; unless the corpus is trusted, its file and rows must be those that were encoded."""
        if not self.options.trust_corpus and not isinstance(self.run.path, RemotePath):
            try:
                checked_shard(self.run, shard)
            except RunError:
                # Another process that finishes the run may have replaced the shard, to remove duplicates.
                if self.run.done(shard) == done:
                    raise
        if self.options.trust_corpus:
            self.cursor.jump(Position(*done["next"]))
        else:
            with closing(RowHash()) as hashed:
                for row in self.cursor.take(self.options.shard_rows):
                    hashed.add(row)
            if hashed.hexdigest() != done["input_sha256"]:
                raise RunError(
                    f"The corpus changed: rows {done['first_row']} to {self.cursor.position.row - 1} are not those "
                    f"that {part_name(shard)} of {self.run.path} was made from. Encode into a new folder."
                )
        if self.worker.processes == 1:  # otherwise it may be the work of another process, which reported it
            self.reporter.earlier(self.cursor.position.row - done["first_row"])
        if rows := self.cursor.expected_rows:
            self.reporter.expect(rows)

    def _try_shard(self, shard: int) -> bool:
        """Encode the shard at the cursor. Return False if another process has it."""
        with self.run.lock(part_name(shard)) as held:
            if not held or self.run.done(shard):
                return False
            # A run that was complete and lost a shard is checked for duplicates again.
            self.run.unmark_complete()
            self._make_shard(shard)
            self.made += 1
            return True

    def _make_shard(self, shard: int) -> None:
        encoder, start = self.maker.encoder, self.cursor.position  # built before the clock starts
        while True:
            before, counts = self.stages.seconds(), Counts(start.row)
            try:
                sha256 = self._write_shard(shard, counts)
                break
            except BudgetLowered as lowered:
                # From its first row again: all batches of a shard come from one budget.
                self.reporter.note(str(lowered))
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

    def _stop_if_requested(self) -> None:
        if self.reporter.stop_requested():
            raise Interrupted(
                f"Stopped on request after a whole shard; {self.run.path} keeps what is done. Start again to go on."
            )

    def _refuse_or_drop_duplicates(self) -> None:
        """An id in two shards stops the run, or with `skip` the later row leaves its shard."""
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


def _give_back_memory() -> None:
    """Give the system what the threads of a shard have freed, which glibc keeps for each of them: 350 MB of 1,500."""
    with suppress(AttributeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)
