"""Exact search compared with a plain loop."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import numpy as np
import pytest

from sparse_ingest.errors import UsageError
from sparse_ingest.models.compiled import compiled_or_none
from sparse_ingest.models.dot_products import Postings, query_token_mask
from sparse_ingest.records import SparseRows
from sparse_ingest.searching.best_rows import MOST_ROWS, BestRows
from sparse_ingest.searching.exact import ExactHits, QueryVector, search_exact, search_postings


@pytest.fixture(params=["compiled", "numpy"], autouse=True)
def computed(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """With llvmlite, and without it."""
    if request.param == "numpy":
        monkeypatch.setitem(sys.modules, "llvmlite", None)
    compiled_or_none.cache_clear()
    function = compiled_or_none("define void @nothing() {\n  ret void\n}", "nothing")
    assert (function is None) == (request.param == "numpy")
    yield
    compiled_or_none.cache_clear()


def csr(rows: list[dict[int, float]], ids: list[str] | None = None, ids_type=np.uint16, weights_type=np.float32):
    pairs = [sorted(row.items()) for row in rows]
    return SparseRows(
        ids or [str(number) for number in range(len(rows))],
        np.cumsum([0, *map(len, pairs)], dtype=np.int64),
        np.array([token for row in pairs for token, _ in row], dtype=ids_type),
        np.array([weight for row in pairs for _, weight in row], dtype=weights_type),
    )


def query(weights: dict[int, float]) -> QueryVector:
    return QueryVector(np.array(list(weights), dtype=np.uint32), np.array(list(weights.values()), dtype=np.float32))


def plain(parts: list[SparseRows], query_weights: QueryVector, k: int) -> list[tuple[str, int, np.float32]]:
    wanted = dict(zip(query_weights.token_ids.tolist(), query_weights.weights, strict=True))
    hits, position = [], 0
    for part in parts:
        for index, doc_id in enumerate(part.doc_ids):
            token_ids, weights = part.row(index)
            products = [
                np.float32(wanted[token]) * np.float32(weight)
                for token, weight in zip(token_ids.tolist(), weights, strict=True)
                if token in wanted
            ]
            if products:
                hits.append((doc_id, position, np.float32(sum(float(product) for product in products))))
            position += 1
    return sorted(hits, key=lambda hit: (-hit[2], hit[1]))[:k]


def found(parts, query_weights: QueryVector, k: int) -> list[tuple[str, int, np.float32]]:
    # One query is never compiled.
    one, two, other = (
        listed(hits) for hits in search_exact(parts, [query_weights] * 2, k) + search_exact(parts, [query_weights], k)
    )
    assert one == two == other
    return one


def listed(hits: ExactHits) -> list[tuple[str, int, np.float32]]:
    assert (hits.positions.dtype, hits.scores.dtype) == (np.int64, np.float32)
    return list(zip(hits.doc_ids, hits.positions.tolist(), hits.scores, strict=True))


@pytest.mark.parametrize("weights_type", [np.float16, np.float32])
@pytest.mark.parametrize("ids_type", [np.uint16, np.uint32])
def test_exact_search_matches_a_plain_loop_bit_for_bit(ids_type, weights_type) -> None:
    random = np.random.default_rng(5)
    parts = []
    for size in (0, 40, 1, 0, 64):
        rows = [
            dict(zip(random.choice(300, random.integers(0, 60), replace=False).tolist(),
                     random.gamma(1.0, 1.0, 60).astype(weights_type), strict=False))
            for _ in range(size)
        ]  # fmt: skip
        parts.append(csr(rows, [f"{size}-{number}" for number in range(size)], ids_type, weights_type))
    queries = [
        query(dict(zip(random.choice(400, 12, replace=False).tolist(), random.gamma(1.0, 2.0, 12) - less, strict=True)))
        for less in [0] * 15 + [2] * 15
    ]
    for k in (1, 7, 60, 1000):  # 60: more than the first part has
        for query_weights, hits in zip(queries, search_exact(parts, queries, k), strict=True):
            assert listed(hits) == plain(parts, query_weights, k)


@pytest.mark.parametrize("weights_type", [np.float16, np.float32])
@pytest.mark.parametrize("ids_type", [np.uint16, np.uint32])
def test_compiled_postings_are_those_of_numpy(ids_type, weights_type) -> None:
    random = np.random.default_rng(6)
    rows = [
        dict.fromkeys(random.choice(60, random.integers(0, 30), replace=False).tolist(), random.gamma(1.0))
        for _ in range(50)
    ]
    part = csr([{}, *rows, {}], None, ids_type, weights_type)
    for token_ids in ([], [0], [3, 5, 40], [59], [70_000], range(60)):
        mask = query_token_mask(np.array(token_ids, np.uint32))
        one, two = (Postings.of(part, mask, compiled=compiled) for compiled in (False, True))
        for left, right in zip(one, two, strict=True):
            np.testing.assert_array_equal(left, right, strict=isinstance(left, np.ndarray))


def test_equal_scores_keep_the_order_of_rows_within_and_across_parts() -> None:
    parts = [csr([{1: 1.0}] * 5, list("abcde")), csr([{1: 1.0}, {1: 2.0}, {1: 1.0}], list("xyz"))]
    for k in range(1, 9):
        assert "".join(doc_id for doc_id, _, _ in found(parts, query({1: 1.0}), k)) == "yabcdexz"[:k]


def test_rows_without_a_query_term_are_no_hits_also_between_empty_rows() -> None:
    parts = [csr([{}, {2: 1.0}, {}, {1: 1.0}, {}], list("abcde"))]
    assert found(parts, query({1: 0.5}), 10) == [("d", 3, np.float32(0.5))]


def test_a_product_too_small_for_float32_is_still_a_hit() -> None:
    for weight in (1e-30, -1e-30):
        [(doc_id, position, score)] = found([csr([{2: 1.0}, {1: 1e-30}])], query({1: weight}), 10)
        assert (doc_id, position, score, np.signbit(score)) == ("1", 1, 0, False)


def test_products_are_added_in_the_order_of_the_query() -> None:
    part = csr([{1: 1.0, 2: 1.0, 3: 1.0}])
    assert found([part], query({1: 1.0, 2: 1e20, 3: -1e20}), 10) == [("0", 0, np.float32(0))]
    assert found([part], query({3: -1e20, 2: 1e20, 1: 1.0}), 10) == [("0", 0, np.float32(1))]


def test_queries_of_other_types_are_converted() -> None:
    other = QueryVector(np.array([3, 1], np.int64), np.array([0.1, 2.0], np.float64))  # type: ignore[arg-type]
    part = csr([{1: 1.0, 3: 1.0}])
    assert found([part], other, 10) == found([part], query({3: 0.1, 1: 2.0}), 10)


def test_no_query_terms_no_parts_or_unknown_ids_find_nothing() -> None:
    part = csr([{1: 1.0}])
    assert found([part], query({}), 10) == []
    assert found([], query({1: 1.0}), 10) == []
    assert found([part], query({70_000: 1.0}), 10) == []
    assert search_exact([part], [], 10) == []
    assert found([part], query({1: 1.0}), 0) == []
    assert [listed(hits) for hits in search_exact([part], [query({}), query({2: 1.0}), query({1: 2.0})], 10)] == [
        [], [], [("0", 0, np.float32(2))],
    ]  # fmt: skip


def test_hits_keep_their_ids_when_better_rows_replace_most_of_them() -> None:
    parts = [
        csr([{1: 64.0 * part + row} for row in range(1, 65)], [f"{part}-{row}" for row in range(64)])
        for part in range(5)
    ]
    for k in (1, 2, 300):
        expected = [(f"{position // 64}-{position % 64}", position, position + 1) for position in range(319, -1, -1)]
        assert found(parts, query({1: 1.0}), k) == expected[:k]


def test_ids_of_replaced_rows_are_forgotten() -> None:
    best = BestRows([query({1: 1.0})], 1, compiled=True)
    ids: dict[int, str] = {}
    for position in range(4):
        best.make_room(position + 1)
        postings = Postings.of(csr([{1: float(position + 1)}]), np.ones(3, np.bool_), compiled=True)
        ids = best.without_replaced(ids | best.add(postings, [str(position)], position, range(1)))
        assert len(ids) <= 2
    assert ids[3] == "3"


@pytest.mark.parametrize("weight", [np.nan, np.inf, -np.inf, 0.0])
def test_a_weight_not_above_zero_is_refused(weight: float) -> None:
    with pytest.raises(UsageError, match='The query weight of "x" is .*; expected a number above zero within float32'):
        QueryVector.of({"x": weight, "y": 1.0}, {"x": 0, "y": 1})
    with pytest.raises(UsageError, match="The query has the token 5; expected a string"):
        QueryVector.of({5: 1.0}, {})  # type: ignore[dict-item]


def test_more_rows_than_positions_are_refused() -> None:
    best = BestRows([query({1: 1.0})], 1, compiled=True)
    best.make_room(MOST_ROWS)
    with pytest.raises(UsageError, match="4,294,967,296"):
        best.make_room(MOST_ROWS + 1)


def test_the_stream_is_read_once_and_one_part_at_a_time() -> None:
    alive = 0

    def stream():
        nonlocal alive
        for number in range(3):
            alive += 1
            yield csr([{1: float(number + 1)}], [str(number)])

    hits = search_exact(stream(), [query({1: 1.0}), query({1: 2.0})], 2)
    assert alive == 3
    assert [hit.doc_ids for hit in hits] == [["2", "1"], ["2", "1"]]


def test_a_token_that_postings_lack_raises_and_reads_no_other_memory() -> None:
    postings = Postings.of(csr([{1: 2.0}]), np.ones(3, dtype=np.bool_))
    with pytest.raises(IndexError):
        search_postings([(postings, ["0"])], [query({4_000_000: 1.0})], 3, compiled=True)
