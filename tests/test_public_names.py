"""The public names are there, and importing the package brings nothing heavy."""

from __future__ import annotations

import subprocess
import sys

import sparse_ingest


def test_every_public_name_is_there():
    assert sorted(sparse_ingest._ROOM_OF) == sparse_ingest.__all__
    for name in sparse_ingest.__all__:
        assert getattr(sparse_ingest, name).__name__ == name


def test_importing_the_package_brings_nothing_heavy():
    code = (
        "import sys, sparse_ingest; sparse_ingest.read_pipeline;"
        "print([m for m in ('torch', 'opensearchpy', 'pyarrow', 'numpy') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
