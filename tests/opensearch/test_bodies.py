"""Bulk requests: bytes that mean exactly the rows they are made of."""

from __future__ import annotations

import json
from fractions import Fraction

import numpy as np
import pytest
from made_runs import DOCUMENTS, NASTY_TOKENS, VOCABULARY, make_run

from sparse_ingest.errors import PipelineError, RunError
from sparse_ingest.opensearch.bodies import BodyWriter, BulkRequest, bulk_requests, refuse_clash, shortest_decimal
from sparse_ingest.opensearch.scores import stored_weights, weight_codes
from sparse_ingest.records import SparseRows
from sparse_ingest.runs.shards import read_shard


def rows(weights: list[float], token_ids: list[int], doc_ids: tuple[str, ...] = ("a",)) -> SparseRows:
    indptr = np.array([0, *[len(weights)] * len(doc_ids)], dtype=np.int64)
    return SparseRows(doc_ids, indptr, np.array(token_ids, dtype=np.uint32), np.array(weights, dtype=np.float32))


@pytest.mark.parametrize("weights", ["float16", "float32"])
def test_operations_parse_back_to_the_rows(tmp_path, weights) -> None:
    run = make_run(tmp_path / "run", shard_rows=100, weights=weights)
    (part,) = read_shard(run.shard_path(0))
    found = {}
    for operation in BodyWriter(run.vocabulary(), "sparse").operations(part.vectors, part.fields):
        action, source, end = operation.split(b"\n")
        assert end == b""
        found[json.loads(action)["index"]["_id"]] = json.loads(source)
    assert found.keys() == DOCUMENTS.keys()
    for place, (doc_id, source) in enumerate(found.items()):
        token_ids, kept = part.vectors.row(place)
        assert list(source["sparse"]) == [run.vocabulary()[token_id] for token_id in token_ids]
        written = np.array(list(source["sparse"].values()), dtype=np.float32)
        np.testing.assert_array_equal(stored_weights(written), stored_weights(kept))
        assert source["title"] == f"Title of {doc_id}"


def test_the_bytes_are_these() -> None:
    vectors = SparseRows(
        ['a"b', "c"], np.array([0, 2, 2]), np.array([0, 1], dtype=np.uint16), np.array([1.5, 0.1], dtype=np.float16)
    )
    operations = BodyWriter(['"', "é"], "s").operations(vectors, ['{"title":"x"}', "{}"])
    assert b"".join(operations).decode() == (
        '{"index":{"_id":"a\\"b"}}\n{"title":"x","s":{"\\"":1.5,"é":0.1}}\n{"index":{"_id":"c"}}\n{"s":{}}\n'
    )


def test_fields_with_line_breaks_between_their_parts_stay_one_line() -> None:
    (operation,) = BodyWriter(["t"], "s").operations(rows([1], [0]), ['{\n "title": "x\\ny"\n}\n'])
    assert operation.count(b"\n") == 2
    assert json.loads(operation.split(b"\n")[1]) == {"title": "x\ny", "s": {"t": 1}}


def test_every_value_the_index_can_keep_has_a_decimal_off_the_borders() -> None:
    codes = np.arange(256, 0xFF00, dtype=np.uint32)
    decimals = [shortest_decimal(int(code)) for code in codes]
    # However it is parsed: straight to float32 or by way of double.
    by_double = np.array([float(decimal) for decimal in decimals]).astype(np.float32)
    straight = np.array(decimals).astype(np.float32)
    np.testing.assert_array_equal(weight_codes(by_double), codes)
    np.testing.assert_array_equal(weight_codes(straight), codes)
    lows = (codes << 15).view(np.float32)
    highs = ((codes << 15) | 0x7FFF).astype(np.uint32).view(np.float32)
    for low, decimal, high in zip(lows[::97], decimals[::97], highs[::97], strict=True):
        assert Fraction(float(low)) <= Fraction(decimal) <= Fraction(float(high))
    assert all(json.loads(decimal) > 0 for decimal in decimals)


def test_decimals_are_short() -> None:
    halves = np.arange(0x1400, 0x4800, dtype=np.uint16).view(np.float16)  # 0.00098 to 8
    lengths = [len(shortest_decimal(int(code))) for code in np.unique(weight_codes(halves))]
    assert max(lengths) <= 7
    assert sum(lengths) / len(lengths) < 6


def test_requests_stay_below_both_limits() -> None:
    documents = [(row, str(row), b"x" * 100) for row in range(10)]
    by_bytes = list(bulk_requests(documents, max_bytes=250))
    assert [len(request.documents) for request in by_bytes] == [2] * 5
    assert all(len(request.body) <= 250 for request in by_bytes)
    assert [len(request.documents) for request in bulk_requests(documents, max_documents=4)] == [4, 4, 2]
    assert [document for request in by_bytes for document in request.documents] == [(r, str(r)) for r in range(10)]


def test_a_document_above_the_limit_goes_alone() -> None:
    documents = [(0, "a", b"x"), (1, "b", b"x" * 99), (2, "c", b"x")]
    assert [len(request.documents) for request in bulk_requests(documents, max_bytes=50)] == [1, 1, 1]


def test_part_keeps_documents_and_operations_together() -> None:
    request = BulkRequest([b"a", b"b", b"c"], [(0, "a"), (1, "b"), (2, "c")])
    assert request.part([0, 2]) == BulkRequest([b"a", b"c"], [(0, "a"), (2, "c")])


@pytest.mark.parametrize("field", ["sparse", "dünn", 'a"b'])
@pytest.mark.parametrize("ascii_only", [True, False])
def test_a_carried_field_of_the_same_name_is_refused(field: str, ascii_only: bool) -> None:
    with pytest.raises(PipelineError, match="also the name of the sparse field"):
        refuse_clash(json.dumps({"text": "x", field: 1}, ensure_ascii=ascii_only), field)


def test_the_field_name_inside_a_text_is_no_clash() -> None:
    refuse_clash(json.dumps({"text": 'say "sparse": it is', "more": {"sparse": 1}}), "sparse")


def test_a_weight_for_an_id_without_token_is_a_damaged_run() -> None:
    missing = VOCABULARY.index(None)
    with pytest.raises(RunError, match=f"token id {missing}, which is no token"):
        list(BodyWriter(VOCABULARY, "s").operations(rows([1], [missing]), ["{}"]))


@pytest.mark.parametrize("weight", [0.0, -1.0, 1e-40, np.nan, np.inf])
def test_a_weight_that_no_index_takes_is_a_damaged_run(weight: float) -> None:
    with pytest.raises(RunError, match="The run is damaged"):
        list(BodyWriter(VOCABULARY, "s").operations(rows([weight], [0]), ["{}"]))


def test_a_token_id_beyond_the_vocabulary_is_a_damaged_run() -> None:
    with pytest.raises(RunError, match=f"vocab.json has {len(NASTY_TOKENS)} tokens"):
        list(BodyWriter(NASTY_TOKENS, "s").operations(rows([1], [900]), ["{}"]))
