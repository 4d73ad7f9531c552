"""The public names: all exist, the names of 0.1.0 still work, and importing the package imports nothing heavy."""

from __future__ import annotations

import inspect
import logging
import re
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest

import sparse_ingest

# The names that 0.1.0 exported.
NAMES_OF_0_1_0 = (
    "Connection", "Document", "Engine", "FieldNames", "ModelSettings", "Pipeline", "Query", "SparseIngestError",
    "SparseRows", "bm25_body", "connect", "engine_body", "engine_of", "fit_weights", "hybrid_body", "inspect_model",
    "msearch_bytes", "msearch_lines", "neural_sparse_body", "open_corpus", "open_run", "place_of", "query_encoder",
    "rank_feature_body", "rank_index", "rank_run", "read_pipeline", "read_shard", "search_index", "search_run",
    "seismic_body", "server_side_body", "token_keys", "two_phase_body", "weigh", "weigh_many",
)  # fmt: skip
RENAMED = {"weigh": "query_weights", "weigh_many": "many_query_weights"}


def test_every_public_name_exists() -> None:
    assert sorted(set(sparse_ingest.__all__)) == sparse_ingest.__all__ == dir(sparse_ingest)
    for name in sparse_ingest.__all__:
        assert getattr(sparse_ingest, name).__name__ == name


@pytest.mark.parametrize("name", NAMES_OF_0_1_0)
def test_names_of_0_1_0_still_work(name: str) -> None:
    if name in RENAMED:
        with pytest.warns(DeprecationWarning, match=f"sparse_ingest.{name} is now {RENAMED[name]}"):
            assert getattr(sparse_ingest, name) is getattr(sparse_ingest, RENAMED[name])
    else:
        assert callable(getattr(sparse_ingest, name))


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="attribute encoder"):
        sparse_ingest.encoder  # type: ignore[attr-defined]  # noqa: B018


def public_members() -> Iterator[tuple[str, Any]]:
    """Yield every public function and class, and the public methods and properties defined in each class."""
    for name in sparse_ingest.__all__:
        public = getattr(sparse_ingest, name)
        yield name, public
        if inspect.isclass(public):
            for inner, value in vars(public).items():
                member = getattr(value, "__func__", value)
                if not inner.startswith("_") and (inspect.isfunction(member) or isinstance(member, property)):
                    yield f"{name}.{inner}", member


def test_every_public_name_has_a_docstring() -> None:
    assert [name for name, member in public_members() if not inspect.getdoc(member)] == []


def test_public_functions_document_every_argument() -> None:
    """A single argument may be explained in the text; several need an Args section."""
    undocumented = []
    for name in sparse_ingest.__all__:
        function = getattr(sparse_ingest, name)
        if inspect.isfunction(function) and len(names := inspect.signature(function).parameters) > 1:
            section = re.search(r"^Args:\n((?: .*\n?|\n)+)", inspect.getdoc(function) or "", flags=re.MULTILINE)
            known = re.findall(r"^    \**(\w+):", section[1] if section else "", flags=re.MULTILINE)
            undocumented += [f"{name}: {argument}" for argument in names if argument not in known]
            undocumented += [f"{name}: {argument} is no argument" for argument in known if argument not in names]
    assert undocumented == []


def test_importing_the_package_imports_no_heavy_library() -> None:
    code = (
        "import sys, time; began = time.perf_counter(); import sparse_ingest; sparse_ingest.read_pipeline;"
        "print([m for m in ('torch', 'opensearchpy', 'pyarrow', 'numpy', 'click') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_warnings_are_logged_and_not_printed_by_default() -> None:
    code = "import logging, sparse_ingest; logging.getLogger('sparse_ingest.searching').warning('nothing found')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("", "")
    assert any(isinstance(one, logging.NullHandler) for one in logging.getLogger("sparse_ingest").handlers)
