"""Options of `--executor ray`: one frozen dataclass for the command line and the Python API."""

from __future__ import annotations

from dataclasses import dataclass

from sparse_ingest.pipeline import option


@dataclass(frozen=True)
class RayOptions:
    """Where Ray runs, and what a worker needs. Without an address, a Ray on this machine is started and ended."""

    address: str | None = option(
        None, "Ray cluster to use: auto, or HOST:PORT  [default: a new Ray on this machine]", metavar="ADDRESS"
    )
    workers: int | None = option(
        None, "Tasks that run at the same time  [default: one for each GPU; without GPUs one for each node]"
    )
    worker_cpus: int | None = option(None, "CPUs of a worker  [default: those of a node, divided by its workers]")
    worker_gpus: int | None = option(None, "GPUs of a worker  [default: 1 if the cluster has any]")
    accelerator: str | None = option(
        None, "Type of GPU that a worker needs, as Ray names it, such as H100", metavar="NAME"
    )
