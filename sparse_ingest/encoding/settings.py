"""Settings of an encode, resolved and checked before anything is read or written.

In: a pipeline and options. Out: the checkpoint, the pipeline with every setting that the checkpoint decides, and the
identity of the run.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from sparse_ingest.checkpoints.layouts import Checkpoint, read_checkpoint
from sparse_ingest.checkpoints.settings import document_identity, refuse_lone_stride, resolve_pipeline
from sparse_ingest.corpora.sources import Corpus, Cursor
from sparse_ingest.encoding.options import EncodeOptions
from sparse_ingest.errors import PipelineError, UsageError, shown
from sparse_ingest.models.query_encoders import require_torch
from sparse_ingest.pipeline import EncodeSettings, Pipeline
from sparse_ingest.records import PARENT
from sparse_ingest.reporting import Reporter
from sparse_ingest.runs.manifest import identity_of
from sparse_ingest.storage.places import Place

_FIRST = 256  # documents
_FIRST_RULES = ("top_k", "max_ratio", "min_weight")


def resolve(pipeline: Pipeline) -> tuple[Checkpoint, Pipeline]:
    """Return the checkpoint, and the pipeline with every setting that it decides."""
    require_torch("Encoding")
    model = pipeline.model
    if model.document is None:
        raise PipelineError("No model: name one with --model, or [model] document in the pipeline file.")
    refuse_lone_stride(pipeline.encode)
    checkpoint = read_checkpoint(model.document, model.revision, code=model.trust_remote_code)
    return checkpoint, resolve_pipeline(pipeline, checkpoint)


def refuse_clashes(corpus: Corpus, settings: EncodeSettings, *, reuse: Place | None, copies: bool, out: Place) -> None:
    """Raise `UsageError` for settings that exclude passages or copied vectors."""
    passages = settings.overflow == "passages"
    if passages and PARENT in corpus.fields.keep:
        raise UsageError(
            f'--keep {PARENT}: with overflow = "passages" the field "{PARENT}" names the document of each passage. '
            f"Omit --keep {PARENT}, or rename the column."
        )
    for name, given in (("--reuse", reuse), ("--dedup-text", copies)):
        if passages and given:
            raise UsageError(
                f'{name} copies the vector of a document, but overflow = "passages" creates several. Omit {name}.'
            )
    if reuse and reuse.resolve() == out.resolve():
        raise UsageError(f"--reuse {reuse} is the same run as --out. Name an older run.")


def warn_of_unseen(cursor: Cursor, keep: Sequence[str], reporter: Reporter) -> None:
    """Warn of kept fields that none of the first documents has; JSON lines may lack them, or the name is misspelled."""
    first = [json.loads(row.document.fields) for row in cursor.peek(_FIRST if keep else 0) if row.document]
    if first and (unseen := [shown(name) for name in keep if not any(name in fields for fields in first)]):
        reporter.warn(
            f"No document of the first {len(first)} has the field {', '.join(unseen)}. Check the spelling of --keep."
        )


def run_identity(
    corpus: Corpus, checkpoint: Checkpoint, *, pipeline: Pipeline, options: EncodeOptions, dtype: str
) -> tuple[str, dict[str, Any]]:
    """Return the hash of every setting that changes a byte of a shard, and those settings."""
    encode = pipeline.encode
    # Rules newer than the first releases are included only if they are used.
    rules = {name: value for name, value in encode.rules.items() if name in _FIRST_RULES or value is not None}
    if encode.overflow != "truncate":
        rules["window_stride"] = encode.window_stride
    return identity_of({
        "model": document_identity(checkpoint, pipeline.model),
        "dtype": dtype,
        "weights": encode.weights,
        "overflow": encode.overflow,
        **rules,
        "fields": asdict(corpus.fields),
        "corpus": corpus.identity(),
        "limit": options.limit,
        "shard_rows": options.shard_rows,
        # Copied texts change the batches. Omitted if it is off, as in earlier releases.
        **({"dedup_text": options.dedup_text} if options.dedup_text != "off" else {}),
    })  # fmt: skip
