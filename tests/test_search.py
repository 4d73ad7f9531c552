"""The verb: the same query asked of an index and of a run folder gives the same bits."""

from __future__ import annotations

import json
import logging
import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from made_runs import DOCUMENTS, NASTY_TOKENS, make_run
from made_tables import TOKENS, write_table

from sparse_ingest.errors import ClusterError, MissingExtraError, RunError, UsageError
from sparse_ingest.load import load
from sparse_ingest.opensearch.client import Client, Connection, connect
from sparse_ingest.opensearch.indexes import Stamp
from sparse_ingest.opensearch.requests import bm25_body, explained_terms, rank_feature_body
from sparse_ingest.pipeline import IndexSettings, ModelSettings, Pipeline, QuerySettings
from sparse_ingest.queries.protocol import QueryWeights, query_weights
from sparse_ingest.queries.weight_table import WeightTable
from sparse_ingest.query import pipeline_of_index, pipeline_of_run, prune_query, query_encoder, weigh
from sparse_ingest.runs.manifest import Run, open_run
from sparse_ingest.runs.shards import read_shard
from sparse_ingest.search import Hit, TermShare, search_index, search_run, snippet

WORDS = [f"word{number}" for number in range(150)] + list(NASTY_TOKENS)


def random_documents(count: int) -> dict[str, dict[str, float]]:
    random = np.random.default_rng(11)
    return {
        f"doc-{number}": {
            # A few exact halves, so that there are ties; else weights as a model makes them.
            WORDS[place]: float(random.choice([0.5, 1.0])) if number % 9 == 0 else float(random.gamma(2.0, 0.4) + 1e-4)
            for place in random.choice(len(WORDS), random.integers(0, 40), replace=False)
        }
        for number in range(count)
    }


def random_queries(count: int) -> list[QueryWeights]:
    random = np.random.default_rng(12)
    return [
        query_weights(
            (WORDS[place], float(random.gamma(2.0, 1.0)))
            for place in random.choice(len(WORDS), random.integers(1, 25), replace=False)
        )
        for _ in range(count)
    ]


@pytest.fixture(scope="module")
def client(opensearch_url: str) -> Client:
    return connect(Connection(url=opensearch_url))


def fill(client: Client, index: str, run: Run, meta: dict[str, Any] | None = None, shards: int = 2) -> None:
    """Index the documents of a run as they are, weight by weight, with no loader in between."""
    body = {
        "settings": {"number_of_shards": shards, "number_of_replicas": 0},
        "mappings": {
            "dynamic": False,
            "properties": {
                "sparse": {"type": "rank_features"},
                "title": {"type": "text"},
                "text": {"type": "text"},
            },
        }
        | ({"_meta": meta} if meta else {}),
    }
    client.call("PUT", f"/{index}", body)
    vocabulary = run.vocabulary()
    lines: list[str] = []
    for shard in run.done_shards():
        for part in read_shard(run.shard_path(shard)):
            for number, doc_id in enumerate(part.vectors.doc_ids):
                token_ids, weights = part.vectors.row(number)
                vector = {vocabulary[token]: float(weight) for token, weight in zip(token_ids, weights, strict=True)}
                lines += [json.dumps({"index": {"_id": doc_id}})]
                lines += [json.dumps({**json.loads(part.fields[number]), "sparse": vector})]
    answer = client.call("POST", f"/{index}/_bulk", ("\n".join(lines) + "\n").encode(), params={"refresh": "true"})
    assert not answer["errors"]


def bits(score: float) -> bytes:
    return np.float32(score).tobytes()


def by_score(hits: list[tuple[str, float]]) -> dict[bytes, set[str]]:
    groups = defaultdict(set)
    for doc_id, score in hits:
        groups[bits(score)].add(doc_id)
    return dict(groups)


def assert_same_hits(first: list[tuple[str, float]], second: list[tuple[str, float]], size: int) -> None:
    """Equal scores in equal order, bit for bit; ties are sets, and where k cuts a tie any of its documents will do."""
    assert [bits(score) for _, score in first] == [bits(score) for _, score in second]
    one, other = by_score(first), by_score(second)
    if len(first) == size:
        del one[bits(first[-1][1])], other[bits(second[-1][1])]
    assert one == other


@pytest.mark.parametrize(("kind", "half"), [("float16", slice(25)), ("float32", slice(25, 50))])
def test_fifty_queries_score_the_same_in_index_and_run_bit_for_bit(
    tmp_path: Path, client: Client, opensearch_url: str, index_name: str, kind: Any, half: slice
) -> None:
    run = make_run(tmp_path / "run", random_documents(300), shard_rows=64, weights=kind)
    load(run.path, index=index_name, pipeline=Pipeline(), connection=Connection(url=opensearch_url))
    for number, weights in enumerate(random_queries(50)[half]):
        size = (10, 400)[number % 2]
        exact = [(hit.doc_id, hit.score) for hit in search_run(run, weights, size=size, stored=True)]
        asked = search_index(client, index_name, weights, size=size)
        assert_same_hits([(hit.doc_id, hit.score) for hit in asked], exact, size)
        undotted = {token: weight for token, weight in weights.items() if "." not in token}
        body = rank_feature_body(undotted, field="sparse", size=size)
        answer = client.call("POST", f"/{index_name}/_search", body)
        found = [(hit["_id"], hit["_score"]) for hit in answer["hits"]["hits"]]
        exact = [(hit.doc_id, hit.score) for hit in search_run(run, undotted, size=size, stored=True)]
        assert_same_hits(found, exact, size)


def test_the_terms_of_a_hit_are_those_of_its_vector_and_sum_to_the_score(
    tmp_path: Path, client: Client, index_name: str
) -> None:
    run = make_run(tmp_path / "run", random_documents(60))
    fill(client, index_name, run)
    for weights in random_queries(10):
        exact = {hit.doc_id: hit for hit in search_run(run, weights, size=100, stored=True)}
        for hit in search_index(client, index_name, weights, size=100):
            assert hit.terms == exact[hit.doc_id].terms
            assert bits(sum(term.contribution for term in hit.terms)) == bits(hit.score)
            assert [term.contribution for term in hit.terms] == sorted(
                (term.contribution for term in hit.terms), reverse=True
            )


def test_weights_above_64_give_the_true_scores(tmp_path: Path, client: Client, index_name: str) -> None:
    run = make_run(tmp_path / "run")
    fill(client, index_name, run)
    weights = query_weights([("river", 1000.0), ("stone", 0.3), ("lamp", 70.0)])
    hits = search_index(client, index_name, weights, size=10)
    exact = search_run(run, weights, size=10, stored=True)
    assert [(hit.doc_id, hit.score, hit.terms) for hit in hits] == [(hit.doc_id, hit.score, hit.terms) for hit in exact]


def test_a_query_without_weights_finds_nothing_anywhere(tmp_path: Path, client: Client, index_name: str) -> None:
    run = make_run(tmp_path / "run")
    fill(client, index_name, run)
    assert search_index(client, index_name, {}, size=10) == []
    assert search_run(run, {}, size=10) == []


def test_a_hit_of_an_index_has_the_documents_fields_without_the_vector(
    tmp_path: Path, client: Client, index_name: str
) -> None:
    fill(client, index_name, make_run(tmp_path / "run"))
    hit = search_index(client, index_name, {"lamp": 1.0}, size=1)[0]
    assert hit.fields == {"title": "Title of words", "text": "Text of words."}


def test_the_bm25_body_finds_words_of_the_text(tmp_path: Path, client: Client, index_name: str) -> None:
    fill(client, index_name, make_run(tmp_path / "run"))
    answer = client.call("POST", f"/{index_name}/_search", bm25_body("small", field="sparse", size=3))
    assert [hit["_id"] for hit in answer["hits"]["hits"]] == ["small"]
    assert "sparse" not in answer["hits"]["hits"][0]["_source"]


def test_a_rank_feature_query_cannot_find_a_token_with_a_dot(tmp_path: Path, client: Client, index_name: str) -> None:
    """Why rank_feature_body refuses such tokens: the server would answer, and leave them out of the score."""
    fill(client, index_name, make_run(tmp_path / "run"))
    for token in ("a.b", ".", "b."):
        clause = {"rank_feature": {"field": f"sparse.{token}", "linear": {}, "boost": 1.0}}
        assert client.call("POST", f"/{index_name}/_search", {"query": clause})["hits"]["hits"] == []
        assert search_index(client, index_name, {token: 1.0}, size=1)[0].doc_id == "nasty"


class WithoutNeuralSearch:
    """A cluster without the plugin: the client of a real one, except that it does not know the query."""

    def __init__(self, client: Client) -> None:
        self.client = client

    def call(self, method: str, path: str, body: Any = None) -> Any:
        if "neural_sparse" in json.dumps(body):
            body = {"query": {"not_known_here": {}}}
            with pytest.raises(ClusterError) as error:
                self.client.call(method, path, body)
            raise ClusterError(str(error.value).replace("not_known_here", "neural_sparse"))
        return self.client.call(method, path, body)


def test_without_the_plugin_the_scores_are_the_same_and_lost_tokens_are_told(
    tmp_path: Path, client: Client, index_name: str, caplog: pytest.LogCaptureFixture
) -> None:
    run = make_run(tmp_path / "run")
    fill(client, index_name, run)
    without: Any = WithoutNeuralSearch(client)
    weights = {"river": 1.5, "##ing": 0.3}
    assert search_index(without, index_name, weights, size=5) == search_index(client, index_name, weights, size=5)
    assert "plugin" not in caplog.text
    hits = search_index(without, index_name, {**weights, "a.b": 9.0}, size=5)
    assert hits == search_index(client, index_name, weights, size=5)
    assert "'a.b'" in caplog.text


def test_a_run_is_searched_with_its_own_weights_unless_told_otherwise(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", {"a": {"river": 1.2345, "stone": 0.5}}, weights="float32")
    [own] = search_run(run, {"river": 2.0}, size=10)
    [kept] = search_run(run, {"river": 2.0}, size=10, stored=True)
    weight = float(np.float32(1.2345))
    assert own == Hit(
        1, 2 * weight, "a", {"title": "Title of a", "text": "Text of a."}, [TermShare("river", 2.0, weight, 2 * weight)]
    )
    assert kept.score < own.score


def test_hits_of_many_shards_bring_their_own_fields_and_ties_keep_source_order(tmp_path: Path) -> None:
    documents = {str(number): {"river": 1.0 + number % 2} for number in range(10)}
    run = make_run(tmp_path / "run", documents, shard_rows=3)
    hits = search_run(run, {"river": 1.0}, size=7)
    assert [hit.doc_id for hit in hits] == ["1", "3", "5", "7", "9", "0", "2"]
    assert [hit.fields["title"] for hit in hits] == [f"Title of {hit.doc_id}" for hit in hits]
    assert [hit.rank for hit in hits] == [1, 2, 3, 4, 5, 6, 7]


def test_an_unfinished_run_is_searched_and_said_to_be_unfinished(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = make_run(tmp_path / "run", complete=False)
    assert search_run(run, {"river": 1.0}, size=1)
    assert "unfinished" in caplog.text


def test_tokens_of_another_vocabulary_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = make_run(tmp_path / "run")
    assert search_run(run, {"zebra": 1.0, "river": 0.5}, size=1)[0].terms[0].token == "river"
    assert "'zebra'" in caplog.text


def test_pruning_a_query_keeps_the_heaviest_and_breaks_ties_by_token_string() -> None:
    weights = query_weights([("d", 4.0), ("b", 1.0), ("a", 1.0), ("c", 2.0), ("e", 0.5)])
    assert list(prune_query(weights, QuerySettings())) == ["d", "c", "a", "b", "e"]
    assert list(prune_query(weights, QuerySettings(top_k=3))) == ["d", "c", "a"]
    assert list(prune_query(weights, QuerySettings(max_ratio=0.25))) == ["d", "c", "a", "b"]
    assert list(prune_query(weights, QuerySettings(top_k=1, max_ratio=0.5))) == ["d"]
    assert prune_query({}, QuerySettings(top_k=1, max_ratio=0.5)) == {}


def test_a_checkpoint_with_a_table_is_asked_without_a_model(tmp_path: Path) -> None:
    write_table(tmp_path)
    encoder = query_encoder(ModelSettings(document=str(tmp_path)))
    assert isinstance(encoder, WeightTable)
    assert encoder.encode(["river catch"]) == [{"catch": 2.5, "river": 1.0}]
    missing = query_encoder(ModelSettings(document="nowhere", query=str(tmp_path), missing_idf_weight=3.0))
    assert missing.encode(["river catch"]) == [{"river": 3.0, "catch": 2.5}]


def test_weigh_prunes_and_tells_of_an_empty_query(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_table(tmp_path)
    pipeline = Pipeline(ModelSettings(document=str(tmp_path)), query=QuerySettings(top_k=1))
    assert weigh("catch an exception", pipeline) == {"except": 4.75}
    assert not caplog.records
    with caplog.at_level(logging.WARNING):
        assert weigh(TOKENS[2], pipeline) == {}
    assert "nothing can be found" in caplog.text


def test_the_query_prompt_stands_before_the_text_of_a_table_query(tmp_path: Path) -> None:
    write_table(tmp_path)
    encoder = query_encoder(ModelSettings(document=str(tmp_path), query_prompt="catch "))
    assert encoder.encode(["exception"]) == [{"except": 4.75, "##ion": 2.5, "catch": 2.5}]


class FixedWeights:
    """A query encoder that knows one answer."""

    def encode(self, texts: Sequence[str]) -> list[QueryWeights]:
        return [{"river": 2.0} for _ in texts]


def _write_masked_lm(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps({"architectures": ["BertForMaskedLM"], "model_type": "bert"}))
    (folder / "model.safetensors").write_bytes(b"")


@pytest.mark.parametrize("with_table_and_modules", [False, True])
def test_a_checkpoint_without_a_table_of_its_own_declaring_is_a_masked_lm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, with_table_and_modules: bool
) -> None:
    _write_masked_lm(tmp_path)
    if with_table_and_modules:
        write_table(tmp_path)
        types = ("sentence_transformers.models.Transformer", "sentence_transformers.models.SpladePooling")
        modules = [{"idx": place, "path": "", "type": kind} for place, kind in enumerate(types)]
        (tmp_path / "modules.json").write_text(json.dumps(modules))
    queries = ModuleType("sparse_ingest.models.queries")
    monkeypatch.setattr(queries, "build_query_encoder", lambda checkpoint, settings: FixedWeights(), raising=False)
    monkeypatch.setitem(sys.modules, "sparse_ingest.models.queries", queries)
    assert weigh("any", Pipeline(ModelSettings(document=str(tmp_path)))) == {"river": 2.0}


def test_a_masked_lm_without_torch_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _write_masked_lm(tmp_path)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"sparse-ingest\[encode\]"):
        query_encoder(ModelSettings(document=str(tmp_path)))


def test_no_model_at_all_is_a_usage_error() -> None:
    with pytest.raises(UsageError, match="--model or --pipeline"):
        query_encoder(ModelSettings())


def test_the_model_of_a_run_is_used_unless_another_is_asked_for(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", model="made-by-hand")
    assert pipeline_of_run(Pipeline(), run).model == ModelSettings(document="made-by-hand")
    other = Pipeline(ModelSettings(document="other"))
    assert pipeline_of_run(other, run).model.document == "other"
    asked = Pipeline(ModelSettings(missing_idf_weight=1.0), query=QuerySettings(top_k=3))
    merged = pipeline_of_run(asked, run)
    assert merged.model == ModelSettings(document="made-by-hand", missing_idf_weight=1.0)
    assert merged.query.top_k == 3


def test_a_run_that_names_no_model_is_one_sentence(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    manifest = json.loads((run.path / "manifest.json").read_text())
    (run.path / "manifest.json").write_text(json.dumps({**manifest, "model": {}}))
    with pytest.raises(RunError, match="--model or --pipeline"):
        pipeline_of_run(Pipeline(), open_run(run.path))


def test_model_and_field_of_an_index_are_read_from_its_mapping(tmp_path: Path, client: Client, index_name: str) -> None:
    model = {"document": "made-by-hand", "activation": "log1p_relu", "sha256": "0" * 64, "family": "x"}
    meta = {"sparse_ingest": Stamp(model, "0" * 64, "vector", "1" * 64).as_meta()}
    fill(client, index_name, make_run(tmp_path / "run"), meta, shards=1)
    found = pipeline_of_index(Pipeline(), client, index_name)
    assert found.model == ModelSettings(document="made-by-hand", activation="log1p_relu")
    assert found.index.field == "vector"
    asked = Pipeline(ModelSettings(document="other"), index=IndexSettings(field="mine"))
    assert pipeline_of_index(asked, client, index_name) == asked


def test_an_index_without_our_stamp_needs_a_model(tmp_path: Path, client: Client, index_name: str) -> None:
    fill(client, index_name, make_run(tmp_path / "run"), shards=1)
    with pytest.raises(ClusterError, match=r"was not loaded by sparse-ingest.*--model or --pipeline"):
        pipeline_of_index(Pipeline(), client, index_name)
    asked = Pipeline(ModelSettings(document="other"))
    assert pipeline_of_index(asked, client, index_name) == replace(asked, index=IndexSettings(field="sparse"))


def test_an_index_that_is_not_there_is_one_sentence(client: Client, index_name: str) -> None:
    with pytest.raises(ClusterError, match=index_name):
        pipeline_of_index(Pipeline(), client, index_name)
    with pytest.raises(ClusterError, match=index_name):
        search_index(client, index_name, {"river": 1.0}, size=1)


def hit_of(text: str, *tokens: str) -> Hit:
    return Hit(1, 1.0, "a", {"text": text}, [TermShare(token, 1.0, 1.0, 1.0) for token in tokens])


def test_a_snippet_folds_whitespace_and_shows_the_place_of_the_heaviest_term_that_is_there() -> None:
    text = "filler words " * 40 + "the\n\n  Exception   is caught " + "more words " * 40
    shown = snippet(hit_of(text, "absent", "##ing", "except", "filler"))
    assert "the Exception is caught" in shown
    assert shown.startswith("…") and shown.endswith("…")
    assert 150 <= len(shown) <= 185


def test_a_snippet_prefers_the_whole_word_and_begins_at_the_start_without_any() -> None:
    text = "anchor " * 60 + "an end"
    assert snippet(hit_of(text, "an")).endswith("an end")
    assert snippet(hit_of(text, "zebra")).startswith("anchor anchor")
    assert snippet(hit_of("short  text", "zebra")) == "short text"
    assert snippet(Hit(1, 1.0, "a", {}, [])) == ""


def test_a_snippet_of_a_text_without_spaces_still_shows_the_term() -> None:
    shown = snippet(hit_of("、".join(["長い文"] * 100) + "、川、" + "、".join(["長い文"] * 100), "川"))
    assert "川" in shown and len(shown) <= 185


def test_every_made_document_can_be_found_by_each_of_its_tokens(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    for doc_id, terms in DOCUMENTS.items():
        for token in terms:
            assert doc_id in [hit.doc_id for hit in search_run(run, {token: 1.0}, size=10)]


def test_an_explanation_names_every_nasty_token(tmp_path: Path, client: Client, index_name: str) -> None:
    fill(client, index_name, make_run(tmp_path / "run"), shards=1)
    weights = dict.fromkeys(NASTY_TOKENS, 1.0)
    hit = next(hit for hit in search_index(client, index_name, weights, size=5) if hit.doc_id == "nasty")
    assert {term.token for term in hit.terms} == set(NASTY_TOKENS)
    assert list(explained_terms({"description": "sum of:", "details": []}, "sparse")) == []


def test_more_tokens_than_the_cluster_allows_are_refused_before_they_are_sent(
    tmp_path: Path, client: Client, index_name: str
) -> None:
    fill(client, index_name, make_run(tmp_path / "run"), shards=1)
    with pytest.raises(UsageError, match="query.top_k=1024"):
        search_index(client, index_name, {str(number): 1.0 for number in range(1025)}, size=1)
    assert search_index(client, index_name, {"river": 1.0, **{str(n): 1.0 for n in range(1023)}}, size=1)
