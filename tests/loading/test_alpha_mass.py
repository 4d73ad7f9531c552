"""alpha_mass pruning through encode, load and verify."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.loads import into, stamped
from support.reporters import Recorder
from support.runs import make_run

from sparse_ingest.cluster.client import Client, Connection
from sparse_ingest.cluster.journal import open_journal
from sparse_ingest.errors import ClusterError
from sparse_ingest.pipeline import Pipeline, override
from sparse_ingest.searching.index_search import search_index
from sparse_ingest.verification.verify import verify

DOCUMENTS = {"three": {"river": 3.0, "stone": 2.0, "lamp": 1.0}, "one": {"lamp": 1.0}, "none": {}}


def test_load_prunes_by_alpha_mass_and_counts_empty_documents(tmp_path: Path, client: Client, index_name: str) -> None:
    run, recorder = make_run(tmp_path / "run", DOCUMENTS), Recorder()
    report = into(client, index_name, run, alpha_mass=0.9, progress=recorder)
    assert (report.acknowledged, report.refused) == (3, 0)
    assert any("Pruning leaves 1 document without a term" in note for note in recorder.notes)
    assert stamped(client, index_name).pruning == {"top_k": None, "max_ratio": None, "alpha_mass": 0.9}
    [hit] = search_index(client, index_name, {"river": 1.0, "stone": 1.0, "lamp": 1.0}, size=10)
    assert (hit.doc_id, [term.token for term in hit.terms]) == ("three", ["river", "stone"])
    assert verify(run.path, index=index_name, connection=Connection(client.address), sample=None).ok
    assert into(client, index_name, run, alpha_mass=0.9).loaded_shards == 0
    with pytest.raises(ClusterError, match="was loaded pruned by alpha_mass 0.9, this load is unpruned.*--alpha-mass"):
        into(client, index_name, run)


def test_without_alpha_mass_stamp_and_journal_match_older_releases(
    tmp_path: Path, client: Client, index_name: str
) -> None:
    run = make_run(tmp_path / "run", DOCUMENTS)
    report = into(client, index_name, run, top_k=2)
    assert stamped(client, index_name).pruning == {"top_k": 2, "max_ratio": None}
    [line] = open_journal(run, client.cluster_uuid, report.uuid).finished().values()
    assert line["rules"] == {"pruning": {"top_k": 2, "max_ratio": None}}


def test_a_pipeline_accepts_alpha_mass_between_0_and_1() -> None:
    assert override(Pipeline(), ["encode.alpha_mass=0.9"]).encode.alpha_mass == 0.9
