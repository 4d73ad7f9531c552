"""One process's work on a run: open or create it, make shards, check ids, and mark it as complete.

In: a corpus, the run folder, a pipeline, options. Any process may make any shard (encode.py and executors/ divide
them); if two make the same one, the first file stays. shard_maker.py computes the content of a shard.
"""

from __future__ import annotations

import ctypes
import logging
import platform
import uuid
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import replace
from functools import cached_property
from importlib.metadata import version
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from sparse_ingest.checkpoints.settings import model_record
from sparse_ingest.corpora.sources import Corpus, Cursor, Position
from sparse_ingest.corpora.starts import Starts
from sparse_ingest.encoding.counts import Counts, RowHash
from sparse_ingest.encoding.duplicates import Duplicates
from sparse_ingest.encoding.estimate import Estimate
from sparse_ingest.encoding.options import EncodeOptions
from sparse_ingest.encoding.planner import planned, rows_of
from sparse_ingest.encoding.settings import refuse_clashes, resolve, run_identity, warn_of_unseen
from sparse_ingest.encoding.shard_maker import ShardMaker, stop_if_requested
from sparse_ingest.encoding.spool import Spool
from sparse_ingest.encoding.stages import WALL, Stages
from sparse_ingest.errors import CorpusError, RunError, counted
from sparse_ingest.executors.local import Worker
from sparse_ingest.models.memory import BudgetLowered
from sparse_ingest.pipeline import Pipeline
from sparse_ingest.reporting import Reporter
from sparse_ingest.runs.checking import checked_shard
from sparse_ingest.runs.files import part_name, summed, totals_of
from sparse_ingest.runs.manifest import FORMAT, Manifest
from sparse_ingest.runs.reuse import OldVectors, refuse_other_settings
from sparse_ingest.runs.run import Run, create_or_open_run, existing_run, open_run, refuse_differences
from sparse_ingest.runs.shards import shard_schema, write_parts
from sparse_ingest.runs.sorted_pieces import SortedPieces
from sparse_ingest.storage.places import Place, RemotePath, place_of

if TYPE_CHECKING:
    from sparse_ingest.models.documents import DocumentEncoder

logger = logging.getLogger(__name__)


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
        self._done: dict[int, dict[str, Any]] = {}  # what `finish` needs of the records that were read
        self.stages = Stages()
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
        self.estimate = Estimate(self._rows, reporter)

    def _rows(self) -> int | None:
        """Return the number of rows of the corpus, if it is known."""
        return self.starts.rows if self.corpus.rereadable else self.options.limit

    def _open(self, out: Place) -> Run:
        """Create the run, or open the existing one; one with other settings is refused before a model is built."""
        existing = existing_run(out)
        dtype: str = self.settings.dtype
        auto: dict[str, Any] = {}
        if dtype == "auto" and (known := existing or self.old):
            dtype = known.manifest.identity["dtype"]
        elif dtype == "auto":
            dtype, auto = self._choose_dtype()
        if existing:
            refuse_differences(existing, self._identity(dtype)[1])
        if self.old:
            refuse_other_settings(self.old, self._identity(dtype)[1])
        if existing and existing.has_vocabulary():
            return existing
        warn_of_unseen(self.cursor, self.corpus.fields.keep, self.reporter)
        self._encoder = self._encoder or self._encoder_of(dtype)
        record = model_record(self.checkpoint, self.model, self.requested_model)
        manifest = Manifest(FORMAT, *self._identity(dtype), self.options.shard_rows, record, auto)
        try:
            return create_or_open_run(out, manifest, self._encoder.vocabulary)
        except RunError:
            if auto and not existing and existing_run(out):  # created by another process, with another dtype
                self._encoder = None
                return self._open(out)
            raise

    def _choose_dtype(self) -> tuple[str, dict[str, Any]]:
        """Return the dtype that `auto` chooses, and why; float32 if the corpus has fewer rows than a trial."""
        from sparse_ingest.models.documents import choose_device
        from sparse_ingest.models.precision import SAMPLE, choose_dtype, faster_dtypes

        rows, projects = self.cursor.peek(SAMPLE), self.checkpoint.document.has_projection
        texts = [row.document.text for row in rows if row.document] if len(rows) == SAMPLE else []
        device = choose_device(self.worker.device)
        if texts and (faster := faster_dtypes(device, projects=projects)):
            self.reporter.note(f"Trying {', else '.join(faster)} against float32 on the first documents.")
        last: dict[str, DocumentEncoder] = {}

        def build(dtype: str) -> DocumentEncoder:
            last.clear()  # frees its memory for the next one
            return last.setdefault(dtype, self._encoder_of(dtype))

        choice = choose_dtype(build, device, texts, projects=projects)
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
                f"Encoding is slower without {' and '.join(missing)}: pip install 'sparse-ingest[fast]' adds "
                "compiled kernels for CPUs and a fast WordPiece tokenizer."
            )
        old = None
        if self.old is not None:
            old = OldVectors(self.old, self.run.scratch_path("reuse").parent)
            self.reporter.note(f"Vectors of equal texts are copied from {self.old.path}, which has {len(old):,}.")
        copies = self.run.scratch_path("copies").parent if self.options.dedup_text == "encode-once" else None
        return ShardMaker(encoder, settings, self.options, self.reporter, self.stages, old, copies)

    @cached_property
    def _versions(self) -> dict[str, str]:
        """The versions of Python and of the packages that the bytes of a shard may depend on."""
        packages = ["sparse-ingest", "torch", "transformers", "tokenizers", "numpy", "pyarrow"]
        packages += [package for package in ("llvmlite", "nanotoken") if find_spec(package)]
        return {"python": platform.python_version(), **{package: version(package) for package in packages}}

    @property
    def shards(self) -> int:
        """The number of shards of the complete run."""
        return len(self.starts.positions)

    @cached_property
    def starts(self) -> Starts:
        """Where the shards start: read from the run, or found now and stored there. Standard input has those so far."""
        if not self.corpus.rereadable:
            return Starts(0, [], [], [])
        return planned(self.run, self.corpus, self.options.limit, self.reporter)

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Lock out other processes that finish the run, and other `encode` commands that make all of its shards."""
        with self.run.lock("complete", self.reporter) as held:
            if not held:
                raise RunError(
                    f"Another process is encoding {self.run.path}. Wait until it has finished. Several processes share "
                    "a run with --plan-only, then --part I/N for each, then --finish; or with --executor ray."
                )
            yield

    def __call__(self, shards: range) -> None:
        """Make consecutive shards, in one pass over their rows; those that are done are checked."""
        for shard in shards:
            stop_if_requested(self.reporter, self.run.path)
            if self.cursor.position != self.starts.positions[shard]:
                self.cursor.jump(self.starts.begins[shard])
            self._make(shard)

    def plan(self) -> None:
        """Find where the shards start, unless the run has a plan."""
        logger.info("%d shards of %d rows.", self.shards, self.starts.rows)

    def groups(self, shards: range) -> list[range]:
        """Return the groups of some shards, whose rows are the documents of the progress."""
        self.reporter.begin("documents", rows_of(self.starts, shards))
        own = (range(max(group.start, shards.start), min(group.stop, shards.stop)) for group in self.starts.groups)
        return [group for group in own if group]

    def make(self, shards: range) -> None:
        """Make some shards, with progress."""
        for group in self.groups(shards):
            self(group)

    def make_all(self) -> None:
        """Make every shard that is not done, and check the others."""
        if self.corpus.rereadable:
            self.make(range(self.shards))
            return
        # Standard input is read once, so nothing is known of the next shard.
        self.reporter.begin("documents", self.options.limit)
        while self.cursor.peek(1):
            stop_if_requested(self.reporter, self.run.path)
            self.starts.positions.append(self.cursor.position)
            self._make(self.shards - 1)

    def _make(self, shard: int) -> None:
        """Make the shard at the cursor, or check it if it is done; the cursor is after it at the end."""
        if done := self.run.done(shard):
            self._check_done(shard, done)
            self._refuse_other_end(shard)
            self._done[shard] = summed(done)
            return
        # A complete run that lost a shard is checked for duplicates again.
        self.run.unmark_complete()
        self._encode_shard(shard)

    def _refuse_other_end(self, shard: int) -> None:
        """Raise `RunError` if the cursor, after a shard, is not where the next one starts in the plan."""
        if not self.corpus.rereadable:
            return
        if shard + 1 < self.shards:
            as_planned = self.cursor.position == self.starts.positions[shard + 1]
        else:
            as_planned = self.cursor.position.row == self.starts.rows and not self.cursor.peek(1)
        if not as_planned:
            raise RunError(
                f"The corpus changed: {part_name(shard)} of {self.run.path} ends before row "
                f"{self.cursor.position.row}, not where it ended when the shards were planned. Encode into a new "
                "folder."
            )

    def finish(self, hashes: SortedPieces | None = None) -> None:
        """Check ids over all shards, hashed in `hashes` or read here, and mark the run as complete. Hold `alone`."""
        self.warn_of_merged_rows()
        self.refuse_missing()
        documents = sum(record.get("rows", 0) for record in self._records())
        if not (self.options.allow_empty or documents):
            rows = self._row_count()
            found = f"all {rows:,} rows were skipped; {self.run.path / 'skipped'} lists them" if rows else "no rows"
            raise CorpusError(
                f"The corpus has no documents ({found}). Fix --corpus or the command that writes it, then run the "
                "same command again; or pass --allow-empty to finish a run without documents."
            )
        if self.run.complete():
            return
        duplicates = Duplicates(self.run, self.cursor, self.starts.positions, documents, hashes)
        if self.options.on_bad_document == "fail":
            duplicates.refuse()
        else:
            for shard in duplicates.skip():
                self._done.pop(shard)
        self.run.sweep()
        records = list(self._records())
        sums = {"terms" if name == "nnz" else name: count for name, count in totals_of(records).items()}
        self.run.mark_complete({**sums, "duplicates_checked": True}, records)

    def _records(self) -> Iterator[dict[str, Any]]:
        """Yield what `finish` needs of the record of each shard. Each is read once."""
        for shard in range(self.shards):
            if shard not in self._done:
                self._done[shard] = summed(self.run.need_done(shard))
            yield self._done[shard]

    def warn_of_merged_rows(self) -> None:
        """Warn where quotes may have merged rows that this process has read."""
        for message in self.corpus.merged():
            self.reporter.warn(message)

    def refuse_missing(self) -> None:
        """Raise `RunError` if a shard is missing, or the corpus has fewer shards than the run."""
        done = set(self.run.done_shards())
        if len(done) > self.shards:
            raise RunError(
                f"The corpus changed: it ends after {self._row_count()} rows, but {self.run.path} has {len(done)} "
                f"shards of {self.options.shard_rows}. Encode into a new folder."
            )
        there = {path.name for path in (self.run.path / "shards").iterdir()}
        lost = {shard for shard in done if self.run.shard_path(shard).name not in there}
        if missing := sorted({*range(self.shards)} - done | lost):
            raise RunError(
                f"{counted(len(missing), 'shard')} of {self.run.path} {'is' if len(missing) == 1 else 'are'} missing, "
                f"the first is {part_name(missing[0])}. Run the parts again, or --part 1/1, which encodes the "
                "missing ones; then --finish."
            )

    def _row_count(self) -> int:
        return self.starts.rows if self.corpus.rereadable else self.cursor.position.row

    def _check_done(self, shard: int, done: dict[str, Any]) -> None:
        """Skip a finished shard; unless the corpus is trusted, check the hashes of its file and of its source rows."""
        if self.options.trust_corpus:
            self.cursor.jump(Position(*done["next"]))
        else:
            if not isinstance(self.run.path, RemotePath):
                checked_shard(self.run, shard)
            hashed = RowHash()
            for row in self.cursor.take(self.options.shard_rows):
                hashed.add(row)
            if hashed.hexdigest() != done["input_sha256"]:
                raise RunError(
                    f"The corpus changed: rows {done['first_row']} to {self.cursor.position.row - 1} differ from those "
                    f"of {part_name(shard)} in {self.run.path}. Encode into a new folder."
                )
        self.reporter.earlier(self.cursor.position.row - done["first_row"])

    def _encode_shard(self, shard: int) -> None:
        encoder, start = self.maker.encoder, self.cursor.position  # built before the clock starts
        while True:
            before, counts, spool = self.stages.seconds(), Counts(start.row), Spool(self.run, shard, self._versions)
            try:
                sha256 = self._write_shard(shard, counts, spool)
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
        if sha256 is None:  # another process was faster
            spool.remove()
            return
        self.run.write_skipped(shard, sorted(counts.skipped))
        counts.seconds.update(self.stages.since(before))
        self.run.mark_done(shard, {
            "first_row": counts.first_row,
            **counts.record(),
            "sha256": sha256,
            "next": list(self.cursor.position),
            "versions": self._versions,
            "device": str(encoder.device),
            "host": platform.node(),
            "batch_tokens": encoder.batch_tokens,
        }, exclusive=True)  # fmt: skip
        done = self.run.done(shard) or {}
        if done.get("sha256") != sha256:
            self.run.unmark_done(shard)  # its record may not be of its file
            raise RunError(
                f"Another process wrote different bytes for {part_name(shard)} of {self.run.path}: it has another "
                "--batch-tokens, type of device or release. Use the same for all parts, and run this one again."
            )
        self._done[shard] = summed(done)
        spool.remove()
        _return_memory()

    def _write_shard(self, shard: int, counts: Counts, spool: Spool) -> str | None:
        """Write the rows at the cursor as a shard. Return its SHA-256, or None if another process has finished it."""
        scratch = self.run.scratch_path(f"{part_name(shard)}.{uuid.uuid4().hex}.parquet")
        with (
            self.stages.busy(WALL),
            self.stages.busy("write"),
            closing(spool),
            closing(self.maker.parts(self.cursor, self.options.shard_rows, counts, spool)) as parts,
        ):
            sha256 = write_parts(
                self.estimate.watch(parts, scratch, first_row=counts.first_row), scratch=scratch, schema=self.schema
            )
            self._refuse_other_end(shard)
            return sha256 if self.run.add_shard(shard, scratch, sha256) else None


def _return_memory() -> None:
    """Return to the system what the threads of a shard have freed and glibc keeps per thread: 350 of 1,500 MB."""
    with suppress(AttributeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)
