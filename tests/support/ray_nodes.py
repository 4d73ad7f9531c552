"""A Ray cluster of several nodes on this machine."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psutil
import pytest
from ray.cluster_utils import Cluster as RayCluster

STORE = 100_000_000  # bytes
IMPORTS = {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "RAY_USAGE_STATS_ENABLED": "0"}


class Cluster:
    """A head without CPUs, and two nodes with one CPU each."""

    def __init__(self) -> None:
        head = {"num_cpus": 0, "include_dashboard": False, "object_store_memory": STORE}
        self._cluster = RayCluster(initialize_head=True, head_node_args=head)
        self.nodes = [self._cluster.add_node(num_cpus=1, object_store_memory=STORE, wait=False) for _ in range(2)]
        self._cluster.wait_for_nodes()
        self.address = self._cluster.address

    def process(self, kind: str, node: Any = None) -> psutil.Process:
        """Return the process of the head, or of a node."""
        return psutil.Process((node or self._cluster.head_node).all_processes[kind][0].process.pid)

    def shutdown(self) -> None:
        self._cluster.shutdown()


@contextmanager
def two_nodes() -> Iterator[Cluster]:
    """Start a cluster whose processes find the same packages as this one, and end it after the block."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in IMPORTS.items():
            patch.setenv(name, value)
        cluster = Cluster()
        try:
            yield cluster
        finally:
            cluster.shutdown()
