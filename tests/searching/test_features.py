"""Runs and indexes of BGE-M3's lexical weights and of a sparse autoencoder, from encoding to explanations."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.forked import command
from support.without_projection import make_autoencoder, make_bge_m3

import sparse_ingest as si
from sparse_ingest.errors import UsageError

DOCUMENTS = [
    {"_id": "river", "text": "the river and the stone"},
    {"_id": "cloud", "text": "sparse cloud " * 20 + " ".join(map(str, range(96)))},
    {"_id": "lamp", "text": "a lamp of fire"},
    {"_id": "empty", "text": ""},
]


@pytest.fixture(scope="module")
def autoencoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_autoencoder(tmp_path_factory.mktemp("csr") / "csr")


@pytest.mark.parametrize(("make", "kind"), [(make_bge_m3, "rank_features"), (make_autoencoder, "sparse_vector")])
def test_encode_load_verify_and_search(cluster_url: str, index_name: str, tmp_path: Path, make, kind: str) -> None:
    model = str(make(tmp_path / "model"))
    run = si.encode(DOCUMENTS, tmp_path / "run", model=model, device="cpu", dtype="float32")
    pipeline = si.Pipeline(index=si.IndexSettings(kind=kind))
    si.load(run, index=index_name, url=cluster_url, pipeline=pipeline)
    assert si.verify(run, index=index_name, url=cluster_url).ok
    expected = [hit.id for hit in run.search("the river", stored=True)]
    with si.open_index(index_name, url=cluster_url) as index:
        found = index.search("the river")
        assert [hit.id for hit in found] == expected and found[0].id == "river"
        [shown] = index.show("river", query="the river")
        assert shown.score == pytest.approx(found[0].score, rel=0.05)  # SEISMIC counts in 8 bits


def test_features_are_shown_without_words(autoencoder: Path, tmp_path: Path) -> None:
    model = str(autoencoder)
    run = str(tmp_path / "run")
    si.encode(DOCUMENTS, run, model=model, device="cpu", dtype="float32")
    assert json.loads((tmp_path / "run" / "vocab.json").read_text()) == [str(number) for number in range(96)]
    shown = command("show", run, "cloud")
    assert "feature " in shown.out and "expansion" not in shown.out
    [row] = json.loads(command("show", run, "cloud", "--json").out)["documents"]
    assert all(term["expansion"] is None and term["text"] == f"feature {term['token']}" for term in row["terms"])
    explained = command("search", "sparse cloud", "--run", run, "--explain")
    assert "features of an autoencoder" in explained.err and "contribution" in explained.out
    found = json.loads(command("search", "sparse cloud", "--run", run, "--json").out)["hits"]
    # Feature 7 is no 7 in the text, which is behind its beginning.
    assert next(hit for hit in found if hit["id"] == "cloud")["snippet"].startswith("sparse cloud")
    assert "features of an autoencoder" in command("search", "cloud", "--run", run, "--doc", "lamp").err
    assert "features of an autoencoder" in command("inspect", model).err + command("inspect", model).out


def test_an_autoencoder_has_no_tokens_to_count(autoencoder: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="has no tokens to count.*features of an autoencoder"):
        si.write_idf(DOCUMENTS, tmp_path / "idf.json", model=str(autoencoder))
