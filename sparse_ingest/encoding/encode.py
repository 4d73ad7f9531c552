"""`encode`: a corpus and a checkpoint in, a run folder out.

Each shard is a fixed range of source rows. The start of every shard is found once (planner.py); then the shards are
made in any order by one process (job.py), by one per device (executors/local.py), in tasks of Ray (executors/ray.py),
or by any number of machines that were each given a part (`--part`). Each may be killed at any time. At the end one
process checks the ids of all shards, which with Ray are read in tasks.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparse_ingest.checkpoints.card import lost_weights
from sparse_ingest.corpora.sources import Corpus, Cursor
from sparse_ingest.encoding.duplicates import hash_in_tasks
from sparse_ingest.encoding.job import Job
from sparse_ingest.encoding.options import EncodeOptions, with_options
from sparse_ingest.encoding.planner import part_of
from sparse_ingest.encoding.settings import resolve, warn_of_unseen
from sparse_ingest.errors import RunError, UsageError, counted
from sparse_ingest.executors.local import Worker, run_on_devices
from sparse_ingest.executors.tasks import tasks_of_ray
from sparse_ingest.pipeline import ModelSettings, Pipeline, options_from, pipeline_of
from sparse_ingest.records import field_path, is_within
from sparse_ingest.reporting import Reporter, reporter_of
from sparse_ingest.runs.files import has_manifest
from sparse_ingest.runs.run import Run, open_run
from sparse_ingest.storage.durable import naming
from sparse_ingest.storage.places import Place, place_of

if TYPE_CHECKING:
    from sparse_ingest.encoding.survey import CorpusSurvey


def encode(
    corpus: object,
    out: Place | str,
    *,
    model: str | Path | ModelSettings | None = None,
    pipeline: Pipeline | str | Path | None = None,
    options: EncodeOptions | None = None,
    progress: Reporter | bool = False,
    **settings: object,
) -> Run:
    """Encode a corpus into a run folder, or finish an interrupted run.

    Args:
        corpus: What `--corpus` takes (a string, a path, or a list of them), or rows in memory: any iterable of
            mappings, a pandas or polars DataFrame, an Arrow table or reader, or a `datasets` Dataset.
        out: The run folder, or an address such as s3://bucket/prefix.
        model: Hub id, folder, or package:NAME/PATH.
        pipeline: A `Pipeline`, a pipeline file or the name of a packaged one; may replace `model`.
        options: All options in one object, instead of single keywords.
        progress: True for a tqdm bar, or a `Reporter`; silent by default.
        **settings: Fields of `EncodeOptions`, such as `top_k=200` or `shard_rows=8192`.

    Returns:
        The run; `.report` has its counts. It is complete, unless `plan_only` or `part` is given.

    Raises:
        UsageError: options that exclude each other, or neither `model` nor `pipeline`.
        RunError: the folder has a run with other settings, or another process works on it, or the corpus has changed.
        CorpusError: a bad document (unless bad documents are skipped), or a duplicate id.
        Interrupted: the reporter requested a stop; finished shards and windows are kept.
    """
    chosen = options_from(EncodeOptions, options, settings, "encode")
    full, place, reporter = with_options(pipeline_of(model, pipeline), chosen), place_of(out), reporter_of(progress)
    source = _opened(corpus, full, chosen, reporter)
    _refuse_clashing_steps(chosen, source)
    chosen.refuse_without_ray()
    on_ray = chosen.executor == "ray"
    if on_ray:
        chosen = _for_ray(chosen, source)
    devices = [chosen.device] if on_ray else _devices(chosen.device, source, place, reporter)
    arguments = source, place, full, chosen
    if chosen.finish and not has_manifest(place):
        raise RunError(f"{place} is not a run. Check --out; a shared run starts with --plan-only.")
    with naming(place, Path(tempfile.gettempdir())):
        if on_ray:
            _in_processes([], arguments, reporter)
        elif len(devices) == 1 or chosen.plan_only or chosen.finish:
            _in_this_process(Job(Worker(devices[0]), *arguments, reporter), chosen)
        else:
            _in_processes(devices, arguments, reporter)
    run = open_run(place)
    if chosen.plan_only or chosen.part:
        return run
    if dropped := run.report.without_token:
        reporter.warn(lost_weights(dropped, run.vocabulary()))
    return run


def _refuse_clashing_steps(options: EncodeOptions, corpus: Corpus) -> None:
    """Raise `UsageError` for two steps of a shared run, or for one with Ray or standard input."""
    flags = {"--plan-only": options.plan_only, "--part": options.part, "--finish": options.finish}
    given = [flag for flag, value in flags.items() if value]
    if len(given) > 1:
        raise UsageError(f"{' and '.join(given)} are different steps. Run one after the other.")
    if given and options.executor == "ray":
        raise UsageError(
            "--executor ray encodes all shards and finishes the run. Omit --plan-only, --part and --finish."
        )
    if given and not corpus.rereadable:
        raise UsageError(f"{given[0]}: standard input cannot be divided into parts. Pass the corpus as a file.")


def _in_this_process(job: Job, options: EncodeOptions) -> None:
    """Complete a run, or do one step of a shared one."""
    if options.plan_only:
        job.plan()
        job.warn_of_merged_rows()
    elif options.part:
        job.make(_shards_of(job, options.part))
    else:
        with job.alone():
            if options.finish:
                job.refuse_missing()
            job.make_all()
            job.finish()


def _shards_of(job: Job, part: str) -> range:
    """Return the shards of a part, with a note if it has none."""
    if not (shards := part_of(part, job.starts)):
        job.reporter.note(f"--part {part} has no shard: the run has {counted(job.shards, 'shard')}.")
    return shards


def _for_ray(options: EncodeOptions, corpus: Corpus) -> EncodeOptions:
    """Return the options for workers of Ray. Raise `UsageError` for those that exclude it."""
    if not corpus.rereadable:
        raise UsageError("--executor ray: only one process can read standard input. Pass the corpus as a file.")
    if options.device not in ("auto", "cpu"):
        raise UsageError(f"--device {options.device}: Ray assigns GPUs to workers. Omit it, or set --worker-gpus.")
    return replace(options, worker_gpus=0) if options.device == "cpu" else options


def _in_processes(
    devices: Sequence[str], arguments: tuple[Corpus, Place, Pipeline, EncodeOptions], reporter: Reporter
) -> None:
    """Complete a run, or make a part of it, with other processes on devices or in tasks of Ray.

    This process has no model.
    """
    out, options = arguments[1], arguments[3]
    with ExitStack() as stack:
        opened: list[Job] = []

        def groups() -> list[range]:
            # The first process has created the run.
            opened.append(job := Job(Worker(options.device), *arguments, reporter))
            if not options.part:
                stack.enter_context(job.alone())
            return job.groups(_shards_of(job, options.part) if options.part else range(job.shards))

        hashes = None
        if devices:
            run_on_devices(devices, Job, arguments, groups, out=out, reporter=reporter)
        else:
            kept = f"{out} keeps what is finished. Run the same command again to continue."
            with tasks_of_ray(options, does="makes", kept=kept, reporter=reporter) as run_on:
                run_on(Job, arguments, groups)
                if not opened[0].run.complete():
                    hashes = hash_in_tasks(run_on, opened[0].run)
        if not options.part:
            opened[0].finish(hashes)


def dry_run(
    corpus: object,
    *,
    model: str | Path | ModelSettings | None = None,
    pipeline: Pipeline | str | Path | None = None,
    options: EncodeOptions | None = None,
    progress: Reporter | bool = False,
    **settings: object,
) -> CorpusSurvey:
    """Read and check a complete corpus without a run; with a model, encode a sample and predict size and time of a run.

    Args:
        corpus: As for `encode`.
        model: The model that encodes the sample.
        pipeline: As for `encode`, instead of `model`.
        options: All options in one object, instead of single keywords.
        progress: True for a tqdm bar, or a `Reporter`; silent by default.
        **settings: Fields of `EncodeOptions`.

    Raises:
        UsageError: options that exclude each other.
        CorpusError: a source cannot be read to its end.
    """
    from sparse_ingest.encoding.survey import survey

    chosen = options_from(EncodeOptions, options, settings, "dry_run")
    full, tokenizer = with_options(pipeline_of(model, pipeline), chosen), None
    if full.model.document is not None:
        checkpoint, resolved = resolve(full)
        from sparse_ingest.models.tokenizer import Tokenizer

        stride = resolved.encode.window_stride
        tokenizer = Tokenizer(checkpoint.transformer, resolved.model, window_stride=stride)
    reporter = reporter_of(progress)
    source = _opened(corpus, full, chosen, reporter)
    how: dict[str, Any] = {"shard_rows": chosen.shard_rows, "overflow": full.encode.overflow, "reporter": reporter}
    cursor = Cursor(source, chosen.limit)
    warn_of_unseen(cursor, source.fields.keep, reporter)
    found, sample = survey(cursor, tokenizer, **how)
    for message in source.merged():
        reporter.warn(message)
    if found.tokens:
        from sparse_ingest.encoding.trial import predict

        totals = found.documents, found.documents * found.tokens["read"]
        found.prediction = predict(sample, source, full, chosen, totals=totals, reporter=reporter)
    return found


def _opened(corpus: object, pipeline: Pipeline, options: EncodeOptions, reporter: Reporter) -> Corpus:
    """Open the corpus. Refuse a kept field that clashes with the sparse field, as clusters would refuse documents."""
    found, sparse = options.open(corpus), pipeline.index.field
    for name in found.fields.keep:
        if is_within(field_path(name), sparse):
            raise UsageError(
                f"--keep {name}: {sparse!r} is the sparse field of the index. Omit it, or name another sparse field in "
                'the pipeline file: field = "vector" in [index]; then load with the same file, or --field vector.'
            )
    for message in found.notes:
        reporter.note(message)
    return found


def _devices(named: str, corpus: Corpus, out: Place, reporter: Reporter) -> list[str]:
    """Return the devices that `--device` names, or one if several cannot be used.

    Raise `UsageError` if a device is unknown or missing, or several devices are named for standard input.
    """
    several = "," in named
    # A complete run and a single named device do not need torch; a missing torch is reported by the job.
    if not (several or named in ("auto", "cuda")) or not find_spec("torch"):
        return [named]
    if not several and has_manifest(out) and open_run(out).complete():
        return [named]
    from sparse_ingest.models.documents import choose_devices

    devices = choose_devices(named)
    if len(devices) > 1 and not corpus.rereadable:
        if several:
            raise UsageError(
                f"--device {named}: only one process can read standard input, and each device has its own. Name one "
                "device, or pass the corpus as a file."
            )
        reporter.note(f"Only one process can read standard input: encoding on {devices[0]} of {len(devices)} GPUs.")
        return devices[:1]
    return devices
