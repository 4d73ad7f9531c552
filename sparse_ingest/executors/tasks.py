"""Run steps in tasks of Ray. Only this file imports what needs Ray, and only when a step asks for it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

from sparse_ingest.errors import needs_extra
from sparse_ingest.executors.options import RayOptions
from sparse_ingest.reporting import Reporter


@contextmanager
def tasks_of_ray(options: RayOptions, *, does: str, kept: str, reporter: Reporter) -> Iterator[Callable[..., None]]:
    """Connect to Ray for the block; yield the function that runs a step in its tasks (`run_on` in ray.py).

    For messages, `does` says what a worker does to its shards, such as "makes", and `kept` what a stop leaves and what
    to do next, as two sentences.
    """
    with needs_extra("ray", "--executor ray"):
        from sparse_ingest.executors.ray import run_on
        from sparse_ingest.executors.ray_cluster import connected

    with connected(options, reporter) as pool:
        yield partial(run_on, pool, does, kept, reporter)
