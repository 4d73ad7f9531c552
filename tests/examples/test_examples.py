"""The examples run as they are printed."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import runpy
import threading
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from support.forked import command

import sparse_ingest as si

EXAMPLES = Path(__file__).parents[2] / "examples"


def run(name: str, folder: Path) -> str:
    """Run an example as a program, in this process: a new one takes 5 s to import torch."""
    with contextlib.chdir(folder), contextlib.redirect_stdout(io.StringIO()) as shown:
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    return shown.getvalue()


def test_quickstart(tmp_path: Path, opensearch_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPARSE_INGEST_URL", opensearch_url)
    shown = run("quickstart.py", tmp_path).splitlines()
    assert shown[-3] == "3 documents are in the index; verified: True"
    assert shown[-2].split()[1] == "bread"
    assert "rows=3" in shown[2]


def test_dataframe(tmp_path: Path) -> None:
    first, _, last = run("dataframe.py", tmp_path).splitlines()
    assert first.startswith("00503 Baker's yeast 0.89 ")
    assert last == "the same run: True"


def test_search_service(tmp_path: Path, opensearch_url: str, index_name: str) -> None:
    rows = [{"id": "a", "title": "Bread", "text": "bread rises with yeast"}, {"id": "b", "text": "a river of stone"}]
    si.load(si.encode(rows, tmp_path / "run", model="package:cognition/model"), index=index_name, url=opensearch_url)
    spec = importlib.util.spec_from_file_location("search_service", EXAMPLES / "search_service.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with si.open_index(index_name, url=opensearch_url) as index, module.service(index, 0) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        address = f"http://127.0.0.1:{server.server_port}/"
        try:
            with opener.open(f"{address}?q=bread+yeast&k=1", timeout=60) as answer:
                assert [hit["id"] for hit in json.load(answer)["hits"]] == ["a"]
            with pytest.raises(urllib.error.HTTPError, match="400"):
                opener.open(f"{address}?k=1", timeout=60)
        finally:
            server.shutdown()
            thread.join()


def test_every_cell_of_the_notebook_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    cells = json.loads((EXAMPLES / "notebook.ipynb").read_text())["cells"]
    scope: dict[str, object] = {}
    for cell in (cell for cell in cells if cell["cell_type"] == "code"):
        assert cell["outputs"] == []
        exec("".join(cell["source"]), scope)  # noqa: S102 - the notebook is ours
    assert command("status", tmp_path / "notebook-run", "--json").code == 0
    hits = scope["hits"]
    assert isinstance(hits, list)
    assert "break" in [hit.id for hit in hits]
