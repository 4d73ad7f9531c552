"""Query weights of texts, and the model and field of an index or run."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from support.indexes import fill
from support.runs import make_run
from support.tables import TOKENS, write_table

from sparse_ingest.cluster.client import Client, Connection, connect
from sparse_ingest.cluster.indexes import need_index
from sparse_ingest.cluster.stamps import Stamp
from sparse_ingest.errors import ClusterError, MissingExtraError, RunError, UsageError
from sparse_ingest.models import query_encoders
from sparse_ingest.models.query_encoders import query_encoder
from sparse_ingest.pipeline import IndexSettings, ModelSettings, Pipeline, QuerySettings
from sparse_ingest.queries.weight_table import QueryWeights, WeightTable
from sparse_ingest.records import Query
from sparse_ingest.runs.run import open_run
from sparse_ingest.searching.index_search import search_index
from sparse_ingest.searching.pipelines import pipeline_of_index, pipeline_of_run
from sparse_ingest.searching.query import many_query_weights, query_weights
from sparse_ingest.searching.search import open_index


@pytest.fixture(scope="module")
def client(opensearch_url: str) -> Client:
    return connect(Connection(url=opensearch_url))


def test_a_checkpoint_with_a_weight_table_needs_no_model(tmp_path: Path) -> None:
    write_table(tmp_path)
    encoder = query_encoder(ModelSettings(document=str(tmp_path)))
    assert isinstance(encoder, WeightTable)
    assert encoder.encode(["river catch"]) == [{"catch": 2.5, "river": 1.0}]
    missing = query_encoder(ModelSettings(document="nowhere", query=str(tmp_path), missing_idf_weight=3.0))
    assert missing.encode(["river catch"]) == [{"river": 3.0, "catch": 2.5}]


def test_weigh_prunes_and_reports_an_empty_query(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_table(tmp_path)
    pipeline = Pipeline(ModelSettings(document=str(tmp_path)), query=QuerySettings(top_k=1))
    assert query_weights("catch an exception", pipeline) == {"except": 4.75}
    assert not caplog.records
    with caplog.at_level(logging.WARNING):
        assert query_weights(TOKENS[2], pipeline) == {}
    assert "it cannot have hits" in caplog.text
    assert query_weights("catch an exception", tmp_path)["except"] == 4.75
    with pytest.raises(UsageError, match="The query is empty"):
        query_weights(" \n", pipeline)


def test_many_queries_keep_their_order_and_empty_ones_are_reported_at_the_end(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_table(tmp_path)
    pipeline = Pipeline(ModelSettings(document=str(tmp_path)), query=QuerySettings(top_k=1))
    texts = ["catch an exception", "zebra", "river", "", "catch"]
    queries = (Query(f"q{place}", text) for place, text in enumerate(texts))
    weighed = list(many_query_weights(queries, pipeline, batch=2))
    assert weighed == [("q0", {"except": 4.75}), ("q1", {}), ("q2", {"river": 1.0}), ("q3", {}), ("q4", {"catch": 2.5})]
    assert "2 of 5 queries have no token with a weight, such as 'q1'" in caplog.text


def test_the_query_prompt_is_prepended_to_a_table_query(tmp_path: Path) -> None:
    write_table(tmp_path)
    encoder = query_encoder(ModelSettings(document=str(tmp_path), query_prompt="catch "))
    assert encoder.encode(["exception"]) == [{"except": 4.75, "##ion": 2.5, "catch": 2.5}]


class FixedWeights:
    """A query encoder that always returns the same weights."""

    def encode(self, texts: Sequence[str]) -> list[QueryWeights]:
        return [{"river": 2.0} for _ in texts]


def _write_masked_lm(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps({"architectures": ["BertForMaskedLM"], "model_type": "bert"}))
    (folder / "model.safetensors").write_bytes(b"")


@pytest.mark.parametrize("with_table_and_modules", [False, True])
def test_a_checkpoint_that_declares_no_weight_table_is_a_masked_lm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, with_table_and_modules: bool
) -> None:
    _write_masked_lm(tmp_path)
    if with_table_and_modules:
        write_table(tmp_path)
        types = ("sentence_transformers.models.Transformer", "sentence_transformers.models.SpladePooling")
        modules = [{"idx": place, "path": "", "type": kind} for place, kind in enumerate(types)]
        (tmp_path / "modules.json").write_text(json.dumps(modules))
    monkeypatch.setattr(query_encoders, "build_query_encoder", lambda checkpoint, settings: FixedWeights())
    assert query_weights("any", Pipeline(ModelSettings(document=str(tmp_path)))) == {"river": 2.0}


def test_a_masked_lm_without_torch_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _write_masked_lm(tmp_path)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"sparse-ingest\[encode\]"):
        query_encoder(ModelSettings(document=str(tmp_path)))


def test_a_missing_model_is_a_usage_error() -> None:
    with pytest.raises(UsageError, match="--model or --pipeline"):
        query_encoder(ModelSettings())


def test_the_model_of_a_run_is_used_unless_another_is_given(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", model="made-by-hand")
    assert pipeline_of_run(Pipeline(), run).model == ModelSettings(document="made-by-hand")
    other = Pipeline(ModelSettings(document="other"))
    assert pipeline_of_run(other, run, force=True).model.document == "other"
    asked = Pipeline(ModelSettings(missing_idf_weight=1.0), query=QuerySettings(top_k=3))
    merged = pipeline_of_run(asked, run)
    assert merged.model == ModelSettings(document="made-by-hand", missing_idf_weight=1.0)
    assert merged.query.top_k == 3


def test_a_run_without_a_model_gives_one_message(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    manifest = json.loads((run.path / "manifest.json").read_text())
    (run.path / "manifest.json").write_text(json.dumps({**manifest, "model": {}}))
    with pytest.raises(RunError, match="--model or --pipeline"):
        pipeline_of_run(Pipeline(), open_run(run.path))


def test_model_and_field_of_an_index_are_read_from_its_mapping(client: Client, index_name: str) -> None:
    model = {"document": "made-by-hand", "activation": "log1p_relu", "sha256": "0" * 64, "family": "x"}
    meta = {"sparse_ingest": Stamp(model, "0" * 64, "vector", "1" * 64).as_meta()}
    fields = {
        "vector": {"type": "sparse_vector", "method": {"name": "seismic"}},
        "sparse": {"type": "rank_features"},
        "tag": {"type": "keyword"},
    }
    body = {"settings": {"index": {"sparse": True}}, "mappings": {"_meta": meta, "properties": fields}}
    client.call("PUT", f"/{index_name}", body)
    found = pipeline_of_index(Pipeline(), need_index(client, index_name, ""), index_name)
    assert found.model == ModelSettings(document="made-by-hand", activation="log1p_relu")
    assert (found.index.field, found.index.kind) == ("vector", "sparse_vector")
    asked = Pipeline(ModelSettings(document="other"))
    assert pipeline_of_index(asked, need_index(client, index_name, ""), index_name, force=True).model == asked.model
    for field, said in (("nowhere", "no field 'nowhere'"), ("tag", "the field 'tag' as keyword")):
        wrong = Pipeline(index=IndexSettings(field=field))
        with pytest.raises(ClusterError, match=rf"has {said}; .* is 'vector': pass --set index\.field=vector"):
            pipeline_of_index(wrong, need_index(client, index_name, ""), index_name)


def test_an_index_without_a_stamp_needs_a_model(tmp_path: Path, client: Client, index_name: str) -> None:
    fill(client, index_name, make_run(tmp_path / "run"), shards=1)
    with pytest.raises(ClusterError, match=r"was not loaded by sparse-ingest.*--model or --pipeline"):
        pipeline_of_index(Pipeline(), need_index(client, index_name, ""), index_name)
    asked = Pipeline(ModelSettings(document="other"))
    assert pipeline_of_index(asked, need_index(client, index_name, ""), index_name) == replace(
        asked, index=IndexSettings(field="sparse")
    )


def test_a_missing_index_gets_advice(client: Client, opensearch_url: str, index_name: str) -> None:
    with pytest.raises(ClusterError, match=f"[Nn]o index or alias '{index_name}' at .*sparse-ingest load"):
        open_index(index_name, url=opensearch_url)
    with pytest.raises(ClusterError, match=f"No index or alias '{index_name}' at .*sparse-ingest load"):
        search_index(client, index_name, {"river": 1.0}, size=1)
