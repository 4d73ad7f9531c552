"""Options of `verify`: one frozen dataclass for the command line and the Python API."""

from __future__ import annotations

from dataclasses import dataclass

from sparse_ingest.executors.options import RayOptions
from sparse_ingest.pipeline import option

SAMPLE = 200


@dataclass(frozen=True)
class VerifyOptions(RayOptions):
    """Options of `verify`; the inherited ones compare shards in tasks of Ray.

    `sample` is the number of documents whose weights are compared, spread evenly over the run; None: all.
    """

    sample: int | None = SAMPLE
    field: str | None = option(None, "Name of the sparse field  [default: from the index's _meta]")
