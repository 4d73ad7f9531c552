"""Search refuses a model that differs from the stored one, whatever its name, and accepts the same one."""

from __future__ import annotations

import json
import shutil
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from support.indexes import fill
from support.runs import make_run
from support.tables import TOKENS, write_table

from sparse_ingest.checkpoints.locate import fingerprint
from sparse_ingest.cluster.client import Connection, connect
from sparse_ingest.cluster.indexes import need_index
from sparse_ingest.cluster.stamps import Stamp, vocabulary_hash
from sparse_ingest.errors import ClusterError, RunError
from sparse_ingest.pipeline import ModelSettings, Pipeline
from sparse_ingest.runs.run import Run, open_run
from sparse_ingest.searching.pipelines import other_model, pipeline_of_index, pipeline_of_run

HASH = vocabulary_hash(TOKENS)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_table(tmp_path / "model")


def copy_of(model: Path, name: str, **weights: float) -> Path:
    """Copy the model to another path, optionally with changed weights."""
    other = model.parent / name
    shutil.copytree(model, other)
    if weights:
        (other / "idf.json").write_text(json.dumps({**json.loads((other / "idf.json").read_text()), **weights}))
    return other


def record_of(model: Path, **more: Any) -> dict[str, Any]:
    return {"document": str(model), "sha256": fingerprint(model), **more}


def requested(**settings: Any) -> ModelSettings:
    return ModelSettings(**{name: str(value) for name, value in settings.items()})


def test_the_same_bytes_under_another_name_are_the_same_model(model: Path) -> None:
    copied = copy_of(model, "copied")
    assert other_model(requested(document=copied), record_of(model), HASH) is None
    assert other_model(requested(document=model), record_of(model, document="on/hub", revision="a" * 40), HASH) is None
    assert other_model(requested(query=copied), record_of(model), HASH) is None


def test_other_weights_of_the_same_vocabulary_are_another_model(model: Path) -> None:
    other = copy_of(model, "retrained", river=9.0)
    said = other_model(requested(document=other), record_of(model), HASH)
    assert said is not None
    assert str(model) in said and str(other) in said
    assert fingerprint(model)[:12] in said and fingerprint(other)[:12] in said
    assert "its files differ" in said and "--force" in said


def test_another_vocabulary_is_reported(model: Path) -> None:
    other = copy_of(model, "retrained", river=9.0)
    assert "its vocabulary differs" in str(other_model(requested(document=other), record_of(model), "0" * 64))
    assert "its files differ" in str(other_model(requested(document=other), record_of(model), lambda: TOKENS))


def test_changed_files_in_the_same_folder_are_another_model(model: Path) -> None:
    before = record_of(model)
    (model / "idf.json").write_text('{"river": 2.0}')
    assert other_model(requested(document=model), before, HASH) is not None


def test_the_query_models_are_compared(model: Path) -> None:
    """Both models of a pair are stored; queries use the second."""
    queries = copy_of(model, "queries", river=9.0)
    record = record_of(model, query=str(queries), query_side={"sha256": fingerprint(queries)})
    assert other_model(requested(document=model, query=queries), record, HASH) is None
    assert other_model(requested(query=copy_of(queries, "queries-2")), record, HASH) is None
    said = other_model(requested(document=model), record, HASH)
    assert said is not None and str(queries) in said


def test_nothing_is_compared_if_only_one_side_has_a_model_record(model: Path) -> None:
    assert other_model(ModelSettings(missing_idf_weight=1.0), record_of(model), HASH) is None
    assert other_model(requested(document=model), {}, HASH) is None


def test_a_run_and_an_index_refuse_another_model_unless_forced(
    model: Path, opensearch_url: str, index_name: str
) -> None:
    other = copy_of(model, "retrained", river=9.0)
    run = _run_of(model)
    client = connect(Connection(opensearch_url))
    stamp = Stamp(run.manifest.model, vocabulary_hash(run.vocabulary()), "sparse", run.manifest.run_id)
    fill(client, index_name, run, {"sparse_ingest": stamp.as_meta()}, shards=1)
    for same in (
        Pipeline(),
        Pipeline(requested(document=model)),
        Pipeline(requested(document=copy_of(model, "copied"))),
    ):
        assert pipeline_of_run(same, run).model.document is not None
        assert pipeline_of_index(same, need_index(client, index_name, ""), index_name).model.document is not None
    wanted = Pipeline(requested(document=other))
    with pytest.raises(RunError, match="was encoded with another model.*its files differ") as of_run:
        pipeline_of_run(wanted, run)
    with pytest.raises(ClusterError, match="was loaded with another model.*its files differ") as of_index:
        pipeline_of_index(wanted, need_index(client, index_name, ""), index_name)
    assert of_run.value.exit_code == of_index.value.exit_code == 1
    assert pipeline_of_run(wanted, run, force=True).model.document == str(other)
    assert pipeline_of_index(wanted, need_index(client, index_name, ""), index_name, force=True).model.document == str(
        other
    )


def _run_of(model: Path) -> Run:
    """Write a run with the model record that `encode` would write."""
    run = make_run(model.parent / "run", {"a": {"river": 1.0}}, model=str(model), vocabulary=TOKENS)
    manifest = json.loads((run.path / "manifest.json").read_text())
    assert manifest["model"]["sha256"] == sha256(str(model).encode()).hexdigest()  # make_run hashes the name only
    (run.path / "manifest.json").write_text(json.dumps({**manifest, "model": record_of(model)}))
    return open_run(run.path)
