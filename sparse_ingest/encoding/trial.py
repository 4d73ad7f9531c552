"""`encode --dry-run --model M`: encode a sample of the corpus, and predict tokens, terms, bytes and time of the run.

In: documents sampled over the complete corpus. Out: a `Prediction`. A small part warms the model up and shows how many
documents fit into the trial; those are encoded as one shard into a temporary run folder. Not included: starting,
downloads, and copied vectors (`--reuse`, `--dedup-text`).
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory

from sparse_ingest.checkpoints.checks import read_config
from sparse_ingest.cluster.index_size import IndexSize
from sparse_ingest.corpora.sources import START, Corpus, Position
from sparse_ingest.corpora.starts import Starts
from sparse_ingest.encoding.job import Job
from sparse_ingest.encoding.options import EncodeOptions
from sparse_ingest.executors.local import Worker
from sparse_ingest.pipeline import Pipeline
from sparse_ingest.records import Document, SourceRow
from sparse_ingest.reporting import Reporter, SilentReporter
from sparse_ingest.runs.checking import shard_parts

TRIAL_S = 20.0
_WARM_DOCUMENTS = 32


BENCHMARK_MACHINE = "2 cores of an AMD EPYC with AVX512, without AMX (docs/benchmarks.md)"
VOCABULARY = 30_522  # tokens of the models measured there
# Tokens per second of models of these shapes (layers, width), from benchmarks/README.md, with a dtype that the trial of
# `--dtype auto` accepted for all of them.
MEASURED_DTYPE, MEASURED = "int8-bfloat16", {(2, 128): 110_532, (4, 256): 42_324, (6, 768): 6_640, (12, 768): 2_716}


@dataclass(frozen=True)
class Prediction:
    """A run predicted from `sampled` documents; `index_bytes` is one merged index without replicas.

    `others` has the time on other devices; None if it was not measured.
    """

    sampled: int
    tokens: int
    terms: int
    run_bytes: int
    index_bytes: int
    seconds: float
    tokens_per_second: float
    device: str
    dtype: str
    others: list[dict[str, object]] = field(default_factory=list)


def predict(
    documents: Sequence[Document],
    corpus: Corpus,
    pipeline: Pipeline,
    options: EncodeOptions,
    *,
    totals: tuple[int, float],
    reporter: Reporter,
) -> Prediction:
    """Encode as many documents of a random sample as fit into `TRIAL_S`, and predict a run of the corpus.

    `totals` has the number of documents of the corpus, and of the tokens that the model reads.
    """
    from sparse_ingest.models.documents import choose_devices

    devices = choose_devices(options.device)
    options = replace(options, limit=None, on_bad_document="skip", reuse=None, dedup_text="off")
    reporter.note(f"Encoding a sample of at most {len(documents):,} documents, for about {TRIAL_S:.0f} s.")
    with TemporaryDirectory() as folder:

        def encoded(some: Sequence[Document], count: int, meter: _Meter, like: Job | None = None) -> Job:
            """Encode the first `count` documents; the choice of `--dtype auto` reads more of them."""
            fields = replace(corpus.fields, keep=())  # of long documents they are omitted
            sample, changed = _Sampled((), fields, documents=tuple(some)), replace(options, shard_rows=count)
            job = Job(Worker(devices[0]), sample, Path(folder) / str(count), pipeline, changed, meter, like)
            starts = [START, *(Position(0, row, row + 1, row) for row in range(count, len(some), count))]
            job.starts = Starts(len(some), starts, starts, [range(shard, shard + 1) for shard in range(len(starts))])
            job.make(range(1))
            return job

        meter = _Meter(reporter)
        job = encoded(documents, _WARM_DOCUMENTS, meter)
        speed = _WARM_DOCUMENTS / max((job.run.done(0) or {})["seconds"]["wall"], 1e-3)
        count = max(_WARM_DOCUMENTS, min(len(documents), int(speed * TRIAL_S)))
        if count > _WARM_DOCUMENTS:
            meter = _Meter()
            job = encoded(documents[-count:], count, meter, job)
        return _prediction(job, meter, min(count, len(documents)), totals, len(devices))


def _prediction(job: Job, meter: _Meter, sampled: int, totals: tuple[int, float], devices: int) -> Prediction:
    (documents, tokens), encoder = totals, job.maker.encoder
    done = job.run.done(0) or {}
    scale = documents / max(1, sampled - done["skipped"])
    index = IndexSize()
    for part in shard_parts(job.run, 0):
        index.add(part)
    files = {path: path.stat().st_size for path in Path(str(job.run.path)).rglob("*") if path.is_file()}
    shard = sum(size for path, size in files.items() if path.suffix == ".parquet")
    stages = [done["seconds"][stage] * scale for stage in ("tokenise", "write")]
    computing = tokens / meter.tokens_per_second(encoder.maker.workers)
    # The threads of a CPU compute; a GPU computes while they read and write.
    is_cpu = encoder.device.type == "cpu"
    seconds = (computing + sum(stages) if is_cpu else max(computing, *stages)) / devices
    return Prediction(
        sampled=sampled,
        tokens=round(tokens),
        terms=round(done["nnz"] * scale),
        run_bytes=round(shard * scale) + sum(files.values()) - shard,
        index_bytes=round(index.bytes(scale)),
        seconds=round(seconds, 1),
        tokens_per_second=round(tokens / max(seconds, 1e-9), 1),
        device=str(encoder.device),
        dtype=str(job.run.manifest.identity["dtype"]),
        others=_others(job, tokens, is_cpu=is_cpu),
    )


def _others(job: Job, tokens: float, *, is_cpu: bool) -> list[dict[str, object]]:
    """Return the time on other devices; `seconds` is None where a model of this shape is not measured."""
    config = read_config(job.checkpoint.transformer)
    shape = config.get("num_hidden_layers", config.get("n_layers")), config.get("hidden_size", config.get("dim"))
    like_measured = abs(len(job.run.vocabulary()) - VOCABULARY) < VOCABULARY / 30
    # A damaged config may have a list there, so it is compared and not looked up.
    found = next((speed for key, speed in MEASURED.items() if key == shape), None) if like_measured else None
    seconds, dtype = (round(tokens / found, 1), MEASURED_DTYPE) if found else (None, None)
    benchmark: dict[str, object] = {"device": BENCHMARK_MACHINE, "dtype": dtype, "seconds": seconds}
    return [benchmark, {"device": "a GPU", "dtype": None, "seconds": None}] if is_cpu else [benchmark]


@dataclass(frozen=True)
class _Sampled(Corpus):
    """A corpus of some documents of another one."""

    documents: tuple[Document, ...] = ()

    def rows(self, start: Position = START) -> Iterator[tuple[SourceRow, Position]]:
        for row, document in enumerate(self.documents[start.row :], start.row):
            yield SourceRow(row, "sample", row + 1, document, None, "row"), Position(0, row + 1, row + 2, row + 1)


class _Meter(SilentReporter):
    """Measures the speed of batches; forwards notes and warnings, if it has a reporter."""

    def __init__(self, reporter: Reporter | None = None) -> None:
        self._reporter = reporter
        self._began = 0.0
        self._marks: list[tuple[float, int]] = []  # time, tokens so far

    def plan(self, count: int, tokens: int) -> None:
        self._began = self._began or time.monotonic()

    def advance(self, count: int, *, tokens: int = 0, detail: str = "") -> None:
        self._marks.append((time.monotonic(), tokens + (self._marks[-1][1] if self._marks else 0)))

    def note(self, message: str) -> None:
        if self._reporter:
            self._reporter.note(message)

    def tokens_per_second(self, workers: int) -> float:
        """Return the speed with all workers busy: batches after the last complete round are omitted."""
        if not (batches := len(self._marks)):  # texts without tokens
            return math.inf
        now, tokens = self._marks[batches // workers * workers - 1]  # the last one if there is no complete round
        return tokens / max(now - self._began, 1e-9) * max(1.0, workers / max(1, batches))
