"""What OpenSearch does with sparse_vector fields: facts that the loader and verify rely on."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from sparse_ingest.cluster import indexes, seismic
from sparse_ingest.cluster.client import Client, ResponseError
from sparse_ingest.cluster.preflight import PreflightReport
from sparse_ingest.cluster.reading import StoredReader
from sparse_ingest.cluster.scores import stored_bytes, stored_weights, weight_codes
from sparse_ingest.cluster.search_bodies import Engine, seismic_body
from sparse_ingest.errors import PipelineError, UsageError
from sparse_ingest.searching.index_search import search_index

CEILING, CEILING_SEARCH = 2.5, 16.0


def create(client: Client, name: str, **parameters: float) -> None:
    known = {"quantization_ceiling_ingest": CEILING, "quantization_ceiling_search": CEILING_SEARCH}
    method = {"name": "seismic", "parameters": known | parameters}
    properties = {"sparse": {"type": "sparse_vector", "method": method}}
    settings = {"index": {"sparse": True, "number_of_replicas": 0}}
    client.call("PUT", f"/{name}", {"settings": settings, "mappings": {"dynamic": False, "properties": properties}})


def put(client: Client, index: str, documents: dict[str, str]) -> dict[str, int]:
    """Index raw JSON sources. Return the status of each."""
    lines = "".join(f'{{"index":{{"_id":{json.dumps(doc_id)}}}}}\n{source}\n' for doc_id, source in documents.items())
    answer = client.call("POST", f"/{index}/_bulk", lines.encode(), params={"refresh": "true"})
    return {item["index"]["_id"]: item["index"]["status"] for item in answer["items"]}


def reader(client: Client, index: str) -> StoredReader:
    return StoredReader(client, index, "sparse", 1024, ceiling_search=CEILING_SEARCH)


def spread(count: int) -> np.ndarray:
    """Weights at and next to every byte boundary, random ones, and some above the ceiling."""
    rng = np.random.default_rng(3)
    borders = ((np.arange(1, 255) - 0.5) * CEILING / 255).astype(np.float32)
    around = np.concatenate([np.nextafter(borders, np.float32(0)), borders, np.nextafter(borders, np.float32(9))])
    random = rng.gamma(1.2, 0.6, count).astype(np.float32) + np.float32(1e-4)
    return np.concatenate([around, random, np.array([CEILING, 3.0, 17.5, 1e30, 1.1754944e-38], np.float32)])


def source_of(weights: np.ndarray, decimals: list[str] | None = None) -> str:
    decimals = decimals or [str(weight) for weight in weights]
    terms = ",".join(f'"{key}":{decimal}' for key, decimal in enumerate(decimals))
    return f'{{"sparse":{{{terms}}}}}'


@pytest.mark.parametrize(("threshold", "rule"), [(1, "byte"), (1000, "feature")])
def test_large_segments_keep_bytes_and_small_ones_nine_bits(
    client: Client, index_name: str, threshold: int, rule: str
) -> None:
    create(client, index_name, approximate_threshold=threshold)
    weights = spread(400)
    assert put(client, index_name, {"a": source_of(weights)}) == {"a": 201}
    keys = [str(key) for key in range(len(weights))]
    found = reader(client, index_name).weights({"a": keys})["a"]
    stored = [found[key] for key in keys]
    if rule == "byte":
        assert {type(one) for one in stored} == {np.uint8}
        np.testing.assert_array_equal(stored, stored_bytes(weights, CEILING))
    else:
        assert {type(one) for one in stored} == {np.float32}
        np.testing.assert_array_equal(stored, stored_weights(weights))


@pytest.mark.parametrize("threshold", [1, 1000])
def test_short_decimals_are_stored_as_the_same_byte_and_nine_bits(
    client: Client, index_name: str, threshold: int
) -> None:
    create(client, index_name, approximate_threshold=threshold)
    weights = spread(300)
    spelling = seismic.ByteCodes(CEILING)
    decimals = [spelling.decimal(int(code)) for code in spelling.codes(weights)]
    assert sum(map(len, decimals)) < 0.7 * sum(len(str(weight)) for weight in weights)
    put(client, index_name, {"a": source_of(weights, decimals)})
    keys = [str(key) for key in range(len(weights))]
    found = reader(client, index_name).weights({"a": keys})["a"]
    expected = stored_bytes(weights, CEILING) if threshold == 1 else stored_weights(weights)
    np.testing.assert_array_equal([found[key] for key in keys], expected)


def test_codes_distinguish_every_pair_of_byte_and_nine_bits() -> None:
    bits = np.random.default_rng(0).integers(0x00800000, 0x7F800000, 20_000, dtype=np.uint32)
    weights = np.concatenate([bits.view(np.float32), spread(20_000)])
    spelling = seismic.ByteCodes(CEILING)
    pairs = np.stack([weight_codes(weights), stored_bytes(weights, CEILING).astype(np.uint32)])
    codes = spelling.codes(weights)
    assert codes.max() < 1 << 16
    assert len(np.unique(codes)) == len(np.unique(pairs, axis=1).T)
    some = np.unique(codes)[::97]
    written = np.array([spelling.decimal(int(code)) for code in some]).astype(np.float64).astype(np.float32)
    np.testing.assert_array_equal(spelling.codes(written), some)


@pytest.mark.parametrize("threshold", [1, 1000])
def test_sums_reveal_an_unexpected_weight(client: Client, index_name: str, threshold: int) -> None:
    create(client, index_name, approximate_threshold=threshold)
    put(client, index_name, {"a": '{"sparse":{"1":0.5,"7":1.25}}', "b": '{"sparse":{"7":0.25}}'})
    of_bytes = ["a", "b"] if threshold == 1 else []
    sums = reader(client, index_name).sums(["a", "b"], [str(key) for key in range(2000)], of_bytes=of_bytes)
    kept = np.array([[0.5, 1.25], [0, 0.25]], dtype=np.float32)
    expected = stored_bytes(kept, CEILING).sum(axis=1) if threshold == 1 else kept.sum(axis=1)
    assert [sums["a"].tolist(), sums["b"].tolist()] == [[expected[0], 0], [expected[1], 0]]


def test_an_empty_vector_is_refused_and_a_missing_field_is_accepted(client: Client, index_name: str) -> None:
    """This is why the loader omits the field of an empty vector."""
    create(client, index_name)
    statuses = put(client, index_name, {"empty": '{"sparse":{}}', "full": '{"sparse":{"1":1}}', "none": "{}"})
    assert sorted(statuses.values()) == [201, 201, 400]
    assert statuses["none"] == 201


@pytest.mark.parametrize("terms", ['{"word":1}', '{"-1":1}', '{"1":0}', '{"1":1e-40}', '{"1":1,"1":2}'])
def test_keys_are_whole_numbers_and_weights_positive_normal_numbers(
    client: Client, index_name: str, terms: str
) -> None:
    create(client, index_name)
    assert put(client, index_name, {"a": f'{{"sparse":{terms}}}'}) == {"a": 400}


def test_method_parameters_cannot_be_changed_later(client: Client, index_name: str) -> None:
    """This is why the threshold is chosen before the index is created."""
    create(client, index_name, approximate_threshold=5)
    method = {"name": "seismic", "parameters": {"approximate_threshold": 6}}
    with pytest.raises(ResponseError, match="Cannot update parameter"):
        client.call(
            "PUT", f"/{index_name}/_mapping", {"properties": {"sparse": {"type": "sparse_vector", "method": method}}}
        )


def test_warming_up_an_index_works_and_a_deleted_one_gives_a_message(client: Client, index_name: str) -> None:
    create(client, index_name, approximate_threshold=1)
    put(client, index_name, {"a": '{"sparse":{"1":0.5}}'})
    index = indexes.find_index(client, index_name)
    assert index is not None
    assert seismic.warm_up(client, index) is None
    message = seismic.warm_up(client, index._replace(name=f"{index_name}-gone"))
    assert message is not None
    assert "could not be warmed up" in message


@pytest.mark.parametrize("threshold", [1, 1000])
def test_scores_and_terms_follow_the_storage_of_the_segment(client: Client, index_name: str, threshold: int) -> None:
    create(client, index_name, approximate_threshold=threshold)
    put(client, index_name, {"a": '{"sparse":{"1":0.7,"2":1.3,"9":4.0}}', "b": '{"sparse":{"2":0.3}}'})
    query = {"one": 2.2, "two": 1.1, "unknown": 5.0}
    keys = {"one": "1", "two": "2"}
    engine = Engine("seismic", kind="sparse_vector", keys=keys, seismic={"heap_factor": 1.2})
    hits = search_index(client, index_name, query, size=5, engine=engine)
    assert [hit.doc_id for hit in hits] == ["a", "b"]
    assert [term.token for term in hits[0].terms] == ["one", "two"]
    kept = np.array([0.7, 1.3], dtype=np.float32)
    if threshold == 1:
        stored = stored_bytes(kept, CEILING) * CEILING / 255
        weights = stored_bytes(np.array([2.2, 1.1]), CEILING_SEARCH) * CEILING_SEARCH / 255
    else:
        stored, weights = stored_weights(kept).astype(np.float64), np.array([2.2, 1.1])
    assert [term.document_weight for term in hits[0].terms] == pytest.approx(stored.tolist(), rel=1e-6)
    assert hits[0].score == pytest.approx(float(weights @ stored), rel=1e-6)
    assert sum(term.contribution for term in hits[0].terms) == pytest.approx(hits[0].score, rel=1e-6)


def test_one_segment_gives_more_than_ten_hits(client: Client, index_name: str) -> None:
    """The server's default for `k` is 10."""
    create(client, index_name, approximate_threshold=1)
    put(client, index_name, {f"d{number}": f'{{"sparse":{{"1":{1 + number / 64}}}}}' for number in range(40)})
    engine = Engine("seismic", kind="sparse_vector", keys={"one": "1"})
    assert len(search_index(client, index_name, {"one": 1.0}, size=30, engine=engine)) == 30


def test_unknown_seismic_settings_are_refused() -> None:
    with pytest.raises(UsageError, match="has a key 'n'; known are heap_factor, k, top_n"):
        seismic_body({"1": 1.0}, field="sparse", size=3, settings={"n": 5})


def report_of(weights: np.ndarray, documents: int) -> PreflightReport:
    codes = np.bincount(weight_codes(weights), minlength=1 << 16)
    return PreflightReport(documents, len(weights), codes, np.arange(len(weights)))


def body(**parameters: object) -> dict[str, object]:
    method = {"name": "seismic", "parameters": parameters}
    properties = {"sparse": {"type": "sparse_vector", "method": method}}
    return {"settings": {"index": {"number_of_shards": 2}}, "mappings": {"properties": properties}}


def fitted_parameters(body: dict[str, object], report: PreflightReport) -> dict[str, Any]:
    """Return the effective parameters: fitted ones, and the server's defaults for the rest."""
    fitted, _ = seismic.fit(body, "sparse", report)
    return seismic.parameters_of(fitted["mappings"]["properties"]["sparse"])


def test_the_ceiling_with_the_smallest_error_is_chosen() -> None:
    weights = np.random.default_rng(0).gamma(1.2, 0.6, 100_000).astype(np.float32)
    ceiling = fitted_parameters(body(), report_of(weights, 1000))["quantization_ceiling_ingest"]

    def error(ceiling: float) -> float:
        return float(((stored_bytes(weights, ceiling) * ceiling / 255 - weights) ** 2).sum())

    best = min(np.geomspace(1, weights.max(), 200), key=error)
    assert error(ceiling) < 1.02 * error(best)
    assert error(ceiling) < error(3.0)  # the server's default


def test_clipped_weights_are_counted_in_the_note() -> None:
    weights = np.array([0.5] * 99_990 + [40.0] * 10, dtype=np.float32)
    fitted, note = seismic.fit(body(quantization_ceiling_ingest=3.0), "sparse", report_of(weights, 1000))
    assert fitted["mappings"]["properties"]["sparse"]["method"]["parameters"]["quantization_ceiling_ingest"] == 3.0
    assert "10 of 100000 weights (0.010%) are above it and clipped" in note


def test_seismic_is_advised_against_below_a_million_documents() -> None:
    assert seismic.advice(1_000_000) == []
    for documents, here in ((999_999, ", and the run has 999,999."), (None, " or more. For fewer")):
        [message] = seismic.advice(documents)
        assert here in message and "33 s instead of 4 s" in message


def test_parameters_in_the_body_are_kept_and_the_rest_is_fitted() -> None:
    weights = np.ones(100, dtype=np.float32)
    named = body(approximate_threshold=7, n_postings=9, cluster_ratio=0.2)
    assert fitted_parameters(named, report_of(weights, 10)) == {
        "n_postings": 9,
        "cluster_ratio": 0.2,
        "summary_prune_ratio": 0.4,
        "approximate_threshold": 7,
        "quantization_ceiling_ingest": 1.0,
        "quantization_ceiling_search": 16.0,
    }
    with pytest.raises(PipelineError, match="quantization_ceiling_ingest = 'much'"):
        seismic.fit(body(quantization_ceiling_ingest="much"), "sparse", report_of(weights, 10))
    with pytest.raises(PipelineError, match="number_of_shards = 'two'"):
        seismic.fit(body() | {"settings": {"number_of_shards": "two"}}, "sparse", report_of(weights, 10))


@pytest.mark.parametrize(("documents", "primaries"), [(1, 1), (100, 1), (100, 5), (1_000_000, 8), (10**9, 3)])
def test_only_the_merged_segment_reaches_the_threshold(documents: int, primaries: int) -> None:
    threshold = seismic.fitted_threshold(documents, primaries)
    assert 1 <= threshold <= 1_000_000
    counts = np.random.default_rng(0).multinomial(documents, [1 / primaries] * primaries, 200)
    assert threshold <= max(1, counts.min())


def test_an_id_above_32767_scores_wrongly_or_fails(client: Client, index_name: str) -> None:
    """A limit of the server. If this test fails, a release has removed it."""
    create(client, index_name, approximate_threshold=1)
    put(client, index_name, {"a": '{"sparse":{"40000":1.0}}'})
    query = {"query_tokens": {"40000": 1.0}, "method_parameters": {"k": 5}}
    try:
        hits = client.call("POST", f"/{index_name}/_search", {"query": {"neural_sparse": {"sparse": query}}})
    except ResponseError as error:
        assert error.status == 500
    else:
        assert [hit["_score"] for hit in hits["hits"]["hits"]] != [pytest.approx(1.0, rel=0.01)]
