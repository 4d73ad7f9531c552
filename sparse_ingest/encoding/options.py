"""Options of `encode`: one frozen dataclass for the command line and the Python API."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Literal

from sparse_ingest.corpora.options import CorpusOptions
from sparse_ingest.executors.options import RayOptions
from sparse_ingest.pipeline import Dtype, EncodeSettings, Pipeline, Pruning, option
from sparse_ingest.runs.manifest import SHARD_ROWS
from sparse_ingest.storage.places import RemotePath

_OF_MODEL = ("max_length", "revision", "trust_remote_code")


@dataclass(frozen=True)
class EncodeOptions(RayOptions, CorpusOptions, Pruning):
    """Options of `encode`. If a setting of the model or the vectors is None, the pipeline's applies.

    `reuse` is not part of the run's identity: a copied vector was computed with the same settings, and may differ in
    its last bits only, because it was in another batch.
    """

    dtype: Dtype | None = option(None, "Precision of the computation  [default: the pipeline's, otherwise auto]")
    weights: Literal["float16", "float32"] | None = option(
        None, "Precision of the stored weights  [default: the pipeline's, otherwise float16]"
    )
    batch_tokens: int | None = option(None, "Padded tokens of a batch  [default: by device]")
    overflow: Literal["truncate", "windows", "passages"] | None = None
    window_stride: int | None = None
    device: str = option(
        "auto",
        "cpu, cuda (all GPUs), cuda:N, or several as cuda:0,cuda:1, one process for each; repeat a device to run two "
        "processes on it; auto: all GPUs, otherwise the CPU",
    )
    shard_rows: int = option(SHARD_ROWS, "Rows of a shard")
    allow_empty: bool = option(False, "Finish a run without documents")
    trust_corpus: bool = option(False, "Continue without hashing the rows of finished shards again")
    plan_only: bool = option(False, "Only create the run and find where its shards start")
    part: str | None = option(None, "Encode one of N equal parts of the shards, then end; I from 1 to N", metavar="I/N")
    finish: bool = option(False, "Check the shards of all parts, and complete the run")
    reuse: Path | RemotePath | str | None = option(
        None, "Copy the vectors of texts that are in this run, encoded with the same settings", metavar="OLD_RUN"
    )
    dedup_text: Literal["off", "encode-once"] = option(
        "off", "Compute one vector for equal texts of a shard; every document is kept"
    )
    max_length: int | None = option(None, "Maximum number of tokens of a document  [default: the model's]")
    revision: str | None = None
    trust_remote_code: bool = False


def with_options(pipeline: Pipeline, options: EncodeOptions) -> Pipeline:
    """Return the pipeline with the settings that the options override."""
    given = {
        entry.name: value for entry in fields(options) if (value := getattr(options, entry.name)) not in (None, False)
    }
    model = {name: value for name, value in given.items() if name in _OF_MODEL}
    encode = {name: value for name, value in given.items() if name in EncodeSettings.__dataclass_fields__}
    return replace(pipeline, model=replace(pipeline.model, **model), encode=replace(pipeline.encode, **encode))
