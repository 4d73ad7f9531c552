"""Options of `--executor ray`: one frozen dataclass for the command line and the Python API."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from sparse_ingest.errors import UsageError
from sparse_ingest.pipeline import option


@dataclass(frozen=True)
class RayOptions:
    """Where Ray runs, and what a worker needs. Without an address, a Ray on this machine is started and ended."""

    executor: Literal["local", "ray"] = option(
        "local", "Work in processes of this machine, or in tasks of Ray (needs the extra ray)"
    )
    address: str | None = option(
        None, "Ray cluster to use: auto, or HOST:PORT  [default: a new Ray on this machine]", metavar="ADDRESS"
    )
    workers: int | None = option(
        None, "Tasks that run at the same time  [default: one for each node; encode: one for each GPU, if any]"
    )
    worker_cpus: int | None = option(None, "CPUs of a worker  [default: those of a node, divided by its workers]")
    worker_gpus: int | None = option(None, "GPUs of a worker  [default: 1 if the cluster has any]")
    accelerator: str | None = option(
        None, "Type of GPU that a worker needs, as Ray names it, such as H100", metavar="NAME"
    )

    def refuse_without_ray(self) -> None:
        """Raise `UsageError` if an option of Ray is set, but not the executor."""
        for name in ("address", "workers", "worker_cpus", "worker_gpus", "accelerator"):
            if self.executor != "ray" and getattr(self, name) is not None:
                raise UsageError(f"--{name.replace('_', '-')} is an option of Ray. Pass --executor ray, or omit it.")
