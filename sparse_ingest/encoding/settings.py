"""What is decided and refused before anything is read or made.

In: a pipeline and the command line's choices. Out: the checkpoint, the pipeline with every setting it decides, and the
identity of the run.
"""

from __future__ import annotations

from dataclasses import asdict
from importlib.util import find_spec
from typing import Any

from sparse_ingest.checkpoints.layouts import Checkpoint, read_checkpoint
from sparse_ingest.checkpoints.settings import document_identity, resolve_pipeline
from sparse_ingest.corpora.sources import Corpus
from sparse_ingest.encoding.options import EncodeOptions
from sparse_ingest.errors import MissingExtraError, PipelineError, UsageError
from sparse_ingest.pipeline import EncodeSettings, Pipeline, refuse_lone_stride
from sparse_ingest.records import PARENT
from sparse_ingest.runs.manifest import identity_of
from sparse_ingest.storage.places import Place

_FIRST_RULES = ("top_k", "max_ratio", "min_weight")


def resolve(pipeline: Pipeline) -> tuple[Checkpoint, Pipeline]:
    """The checkpoint, and the pipeline with every setting that it decides."""
    # Looked for, not imported: a run that is complete needs no torch.
    if not (find_spec("torch") and find_spec("transformers")):
        raise MissingExtraError("encode", "Encoding")
    model = pipeline.model
    if model.document is None:
        raise PipelineError("No model: name one with --model, or [model] document in the pipeline file.")
    refuse_lone_stride(pipeline.encode)
    checkpoint = read_checkpoint(model.document, model.revision, code=model.trust_remote_code)
    return checkpoint, resolve_pipeline(pipeline, checkpoint)


def refuse_clashes(corpus: Corpus, settings: EncodeSettings, *, reuse: Place | None, copies: bool, out: Place) -> None:
    """Refuse what passages and copied vectors do not go with."""
    passages = settings.overflow == "passages"
    if passages and PARENT in corpus.fields.keep:
        raise UsageError(
            f'--keep {PARENT}: with overflow = "passages" the field "{PARENT}" names the document of each passage. '
            f"Leave out --keep {PARENT}, or give the column another name."
        )
    for name, does, given in (
        ("--reuse", "finds vectors by the texts", reuse),
        ("--dedup-text", "copies the vectors", copies),
    ):
        if passages and given:
            raise UsageError(
                f'{name} {does} of documents, and overflow = "passages" makes several of each. Leave out {name}.'
            )
    if reuse and reuse.resolve() == out.resolve():
        raise UsageError(f"--reuse {reuse} is the run that --out makes. Name an older one.")


def run_identity(
    corpus: Corpus, checkpoint: Checkpoint, *, pipeline: Pipeline, options: EncodeOptions, dtype: str
) -> tuple[str, dict[str, Any]]:
    """Everything that changes a byte of a shard, behind its hash."""
    encode = pipeline.encode
    # Rules newer than the first releases are part of it only where they are used.
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
        # Texts that are computed share other batches. Left out, as earlier releases did, where each one is.
        **({"dedup_text": options.dedup_text} if options.dedup_text != "off" else {}),
    })  # fmt: skip
