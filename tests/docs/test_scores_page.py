"""docs/how-it-works/scores.md: each number on the page is what a server returns."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from support.tables import write_table

from sparse_ingest.cluster.client import Client
from sparse_ingest.cluster.hybrid_bodies import hybrid_body
from sparse_ingest.cluster.search_bodies import Engine
from sparse_ingest.pipeline import ModelSettings, Pipeline
from sparse_ingest.records import Query
from sparse_ingest.searching.index_search import rank_index, rank_words, search_index
from sparse_ingest.searching.query import query_weights

PAGE = Path(__file__).parents[2] / "docs" / "how-it-works" / "scores.md"


def check_page(*rows: str) -> None:
    page = " ".join(PAGE.read_text().split())
    for row in rows:
        assert row in page, f"docs/how-it-works/scores.md should say: {row}"


def fill(client: Client, index: str, documents: dict[str, dict[str, Any]], field: dict[str, Any] | None = None) -> None:
    properties = {"sparse": field or {"type": "rank_features"}, "text": {"type": "text"}, "title": {"type": "text"}}
    settings: dict[str, Any] = {"number_of_replicas": 0, "number_of_shards": 1}
    if field:
        settings["index"] = {"sparse": True}
    client.call("PUT", f"/{index}", {"settings": settings, "mappings": {"dynamic": False, "properties": properties}})
    lines = "".join(f'{{"index":{{"_id":"{name}"}}}}\n{json.dumps(source)}\n' for name, source in documents.items())
    assert not client.call("POST", f"/{index}/_bulk", lines.encode(), params={"refresh": "true"})["errors"]


def scores(client: Client, index: str, weights: dict[str, float], engine: Engine | None = None) -> dict[str, str]:
    [ranked] = rank_index(client, index, [("q", weights)], engine or Engine(), size=10)
    return {name: f"{score:.7g}" for name, score in zip(ranked.doc_ids, ranked.scores, strict=True)}


def test_nine_bit_weights(client: Client, index_name: str) -> None:
    fill(client, index_name, {"a": {"sparse": {"river": 1.5, "stone": 0.3}}})
    stone = scores(client, index_name, {"stone": 1.0})["a"]
    both = scores(client, index_name, {"river": 2.0, "stone": 1.0})["a"]
    check_page(f"0.3 is kept as {stone}", f"2.0 · 1.5 + 1.0 · 0.3 = 3.3 comes back as {both}")


def test_special_tokens(client: Client, index_name: str) -> None:
    fill(client, index_name, {"a": {"sparse": {"[CLS]": 0.5, "catch": 1.0}}})
    check_page(
        f"| `catch` 2.5 | {scores(client, index_name, {'catch': 2.5})['a']} |",
        f"| `catch` 2.5, `[CLS]` 1.0 | {scores(client, index_name, {'catch': 2.5, '[CLS]': 1.0})['a']} |",
    )


def test_a_weight_table_adds_no_special_tokens(tmp_path: Path) -> None:
    write_table(tmp_path)  # its idf.json has a weight for [CLS]
    assert list(query_weights("catch", Pipeline(model=ModelSettings(query=str(tmp_path))))) == ["catch"]
    check_page("A weight table (`idf.json`) adds no special token to a query.")


def test_missing_idf_weights(client: Client, index_name: str, tmp_path: Path) -> None:
    write_table(tmp_path)
    fill(client, index_name, {"a": {"sparse": {"river": 0.75, "catch": 1.0}}})
    for choice in (0.0, 1.0):
        weights = query_weights(
            "catch river", Pipeline(model=ModelSettings(query=str(tmp_path), missing_idf_weight=choice))
        )
        printed = ", ".join(f"{token} {weight:g}" for token, weight in weights.items())
        check_page(f"| `missing_idf_weight = {choice}` | {printed} | {scores(client, index_name, weights)['a']} |")


def test_two_phase(client: Client, index_name: str) -> None:
    # Ten hits: the window has 50 documents. d59 is the last of 60 by the heavy token.
    documents = {f"d{number}": {"sparse": {"river": 2.0 - number / 64, "stone": 0.25}} for number in range(60)}
    documents["d59"] = {"sparse": {"river": 1.0, "stone": 20.0}}
    fill(client, index_name, documents)
    weights = {"river": 4.0, "stone": 1.0}
    exact = scores(client, index_name, weights)
    two_phase = Engine("two-phase", two_phase={"prune_ratio": 0.4, "expansion_rate": 5.0})
    found = scores(client, index_name, weights, two_phase)
    assert "d59" in exact and "d59" not in found
    check_page(
        f"| exact | d59 {exact['d59']}, d0 {exact['d0']} |", f"| two-phase | d0 {found['d0']}, d1 {found['d1']} |"
    )


def test_seismic_scores_of_large_and_small_segments(client: Client, index_name: str) -> None:
    for name, threshold in (("bytes", 1), ("bits", 1000)):
        parameters = {"approximate_threshold": threshold, "quantization_ceiling_ingest": 3.0}
        field = {"type": "sparse_vector", "method": {"name": "seismic", "parameters": parameters}}
        fill(client, f"{index_name}-{name}", {"a": {"sparse": {"1": 1.5, "2": 0.3, "3": 5.0}}}, field)
        engine = Engine("seismic", kind="sparse_vector", keys={"one": "1", "two": "2", "three": "3"})
        printed = [
            scores(client, f"{index_name}-{name}", {token: 1.0}, engine)["a"] for token in ("one", "two", "three")
        ]
        check_page(f"| {'clusters: bytes' if name == 'bytes' else 'small segments: 9 bits'} | {' | '.join(printed)} |")


def test_query_weights_above_64(client: Client, index_name: str) -> None:
    fill(client, index_name, {"a": {"sparse": {"river": 1.5, "stone": 0.3}}})
    [hit] = search_index(client, index_name, {"river": 1000.0, "stone": 1.0}, size=1)
    sent = client.call("POST", f"/{index_name}/_search", {
        "query": {"neural_sparse": {"sparse": {"query_tokens": {"river": 1000.0 / 16, "stone": 1.0 / 16}}}}
    })["hits"]["hits"][0]["_score"]  # fmt: skip
    check_page(
        f"`river` 1000 is sent as {1000 / 16:g}", f"answers {sent:.7g}", f"prints {hit.score:.7g}, 16 times as much"
    )


def test_bm25_and_hybrid(client: Client, index_name: str) -> None:
    texts = {"a": "a river and a stone", "b": "a river", "c": "no such word"}
    vectors: dict[str, dict[str, float]] = {"a": {"river": 1.5, "stone": 0.3}, "b": {"river": 2.0}, "c": {"lamp": 1.0}}
    fill(client, index_name, {name: {"text": text, "sparse": vectors[name]} for name, text in texts.items()})
    sparse = scores(client, index_name, {"river": 1.0, "stone": 1.0})
    [words] = rank_words(client, index_name, [Query("q", "river stone")], field="sparse", size=10)
    bm25 = {name: f"{score:.7g}" for name, score in zip(words.doc_ids, words.scores, strict=True)}
    body = hybrid_body("river stone", {"river": 1.0, "stone": 1.0}, Engine(), size=10)
    answer = client.call("POST", f"/{index_name}/_search", body)
    both = {hit["_id"]: f"{hit['_score']:.7g}" for hit in answer["hits"]["hits"]}
    for name in ("a", "b"):
        check_page(f"| {name} | {sparse[name]} | {bm25[name]} | {both[name]} |")
