"""The example for mteb runs offline, and mteb's figure is the one that `evaluate` computes of the same scores."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import pytest
from support.checkpoints import PACKAGED

from sparse_ingest.evaluation.measures import measure
from sparse_ingest.models.encoder import SparseEncoder

# Looked for, not imported: importing it takes ten seconds.
pytestmark = pytest.mark.skipif(find_spec("mteb") is None, reason="mteb is not installed")
EXAMPLES = Path(__file__).parents[2] / "examples"
RUN = "import json, mteb_task as task; task.main(); print(json.dumps([task.DOCUMENTS, task.QUERIES, task.RELEVANCE]))"


class Ranked(NamedTuple):
    query_id: str
    doc_ids: list[str]
    scores: list[float]


@pytest.mark.slow
def test_it_prints_the_ndcg_that_evaluate_computes(tmp_path: Path) -> None:
    offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "MTEB_CACHE": str(tmp_path)}
    environment = {**os.environ, **offline, "PYTHONPATH": os.pathsep.join([str(EXAMPLES), *sys.path])}
    command = [sys.executable, "-c", RUN]
    answer = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment, cwd=tmp_path)
    assert answer.returncode == 0, answer.stderr
    printed, content = answer.stdout.splitlines()
    texts, queries, relevance = json.loads(content)
    encoder = SparseEncoder(PACKAGED)
    documents = encoder.encode_document([f"{title} {text}" for title, text in texts.values()])
    scores = encoder.similarity(encoder.encode_query(list(queries.values())), documents).tolist()
    ranked = [Ranked(query, list(texts), row) for query, row in zip(queries, scores, strict=True)]
    expected = measure(ranked, relevance, ["nDCG@10"]).mean["nDCG@10"]
    assert printed == f"nDCG@10 of {PACKAGED}: {expected:.4f}" and 0.5 < expected < 1
