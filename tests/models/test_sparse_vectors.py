"""Sparse vectors in memory: reading, conversion, similarity, and refused input."""

from __future__ import annotations

import sys
import tracemalloc

import numpy as np
import pytest

from sparse_ingest.errors import MissingExtraError, UsageError
from sparse_ingest.models.sparse_vectors import SparseVectors, similarity
from sparse_ingest.records import SparseRows
from sparse_ingest.searching.exact import QueryVector, search_exact

VOCABULARY = ("the", "river", None, "stone", "lamp")
ROWS = [{"river": 2.0, "the": 0.5}, {}, {"lamp": 1.5, "stone": 1.5, "the": 3.0}]


@pytest.fixture
def vectors() -> SparseVectors:
    return SparseVectors.from_dicts(ROWS, VOCABULARY)


def random_vectors(rows: int, terms: int, width: int, seed: int) -> SparseVectors:
    """Return rows with `terms` different tokens each."""
    generator = np.random.default_rng(seed)
    token_ids = np.sort(np.argsort(generator.random((rows, width)), axis=1)[:, :terms], axis=1)
    weights = generator.uniform(0.01, 4, rows * terms).astype(np.float32)
    indptr = np.arange(0, rows * terms + 1, terms)
    return SparseVectors(indptr, token_ids.ravel().astype(np.int32), weights, [f"t{place}" for place in range(width)])


def test_the_arrays_are_csr_with_ascending_token_ids(vectors: SparseVectors) -> None:
    assert vectors.indptr.tolist() == [0, 2, 2, 5] and vectors.indptr.dtype == np.int64
    assert vectors.token_ids.tolist() == [0, 1, 0, 3, 4] and vectors.token_ids.dtype == np.int32
    assert vectors.weights.tolist() == [0.5, 2.0, 3.0, 1.5, 1.5] and vectors.weights.dtype == np.float32


def test_a_row_is_a_dictionary_heaviest_first_then_by_token_id(vectors: SparseVectors) -> None:
    assert list(vectors[0].items()) == [("river", 2.0), ("the", 0.5)]
    assert list(vectors[2].items()) == [("the", 3.0), ("stone", 1.5), ("lamp", 1.5)]
    assert vectors[1] == {} and vectors[-1] == vectors[2] == vectors[np.int64(2)]
    assert list(vectors) == vectors.to_dicts() == ROWS and len(vectors) == 3


@pytest.mark.parametrize("place", [3, -4])
def test_a_row_that_does_not_exist_is_an_index_error(vectors: SparseVectors, place: int) -> None:
    with pytest.raises(IndexError):
        vectors[place]


@pytest.mark.parametrize(
    ("places", "expected"),
    [
        (slice(1, None), [1, 2]),
        (slice(None, None, -1), [2, 1, 0]),
        ([2, 0, 2], [2, 0, 2]),
        (np.array([-1]), [2]),
        (np.array([True, False, True]), [0, 2]),
        ([], []),
    ],
)
def test_slices_row_numbers_and_masks_select_vectors(
    vectors: SparseVectors, places: slice | list[int] | np.ndarray, expected: list[int]
) -> None:
    named = SparseVectors.from_rows(vectors.to_rows()._replace(doc_ids=["a", "b", "c"]), VOCABULARY)
    taken = named[places]
    assert taken.to_dicts() == [ROWS[row] for row in expected]
    assert taken.doc_ids == ["abc"[row] for row in expected]
    assert taken.vocabulary == VOCABULARY and vectors[places].doc_ids is None


def test_decode_gives_tokens_and_weights_heaviest_first(vectors: SparseVectors) -> None:
    assert vectors.decode() == [list(row.items()) for row in vectors]
    assert vectors.decode(top_k=2) == [[("river", 2.0), ("the", 0.5)], [], [("the", 3.0), ("stone", 1.5)]]


@pytest.mark.parametrize("top_k", [0, -1, 1.5, True, "3"])
def test_top_k_must_be_a_positive_integer(vectors: SparseVectors, top_k: object) -> None:
    with pytest.raises(UsageError, match="top_k is .*expected an integer above zero"):
        vectors.decode(top_k)


def test_the_scipy_matrix_has_the_full_width_and_is_a_copy(vectors: SparseVectors) -> None:
    matrix = vectors.to_scipy()
    assert matrix.shape == (3, len(VOCABULARY)) and matrix.dtype == np.float32 and matrix.format == "csr"
    assert matrix.toarray().tolist() == [[0.5, 2, 0, 0, 0], [0, 0, 0, 0, 0], [3, 0, 0, 1.5, 1.5]]
    matrix.data[:] = 0
    assert vectors.to_dicts() == ROWS


def test_without_scipy_the_extra_is_named(vectors: SparseVectors, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "scipy.sparse", None)
    with pytest.raises(MissingExtraError, match=r"to_scipy\(\) needs the extra \"evaluate\""):
        vectors.to_scipy()


def test_rows_of_a_run_become_vectors_and_back() -> None:
    halves = SparseRows(
        ["a", "b"], np.array([0, 1, 2]), np.array([3, 0], np.uint16), np.array([1.5, 0.1], dtype=np.float16)
    )
    vectors = SparseVectors.from_rows(halves, VOCABULARY)
    assert vectors.to_dicts() == [{"stone": 1.5}, {"the": float(np.float16(0.1))}]
    back = vectors.to_rows()
    assert back.doc_ids == ["a", "b"] and back.token_ids.dtype == np.uint16 and back.weights.dtype == np.float32
    assert back.row(0) == (3, 1.5)


def test_rows_without_ids_are_numbered(vectors: SparseVectors) -> None:
    assert vectors.to_rows().doc_ids == ["0", "1", "2"]


def test_a_large_vocabulary_uses_wider_token_ids() -> None:
    tokens = [f"t{place}" for place in range(65537)]
    assert SparseVectors.from_dicts([{"t65536": 1.0}], tokens).to_rows().token_ids.dtype == np.uint32


def test_the_repr_shows_the_shape_and_the_first_row(vectors: SparseVectors) -> None:
    shown = repr(vectors)
    assert shown == "<SparseVectors: 3 rows of 5 tokens, 5 non-zero weights; [0] {'river': 2, 'the': 0.5}>"
    assert repr(vectors[:0]) == "<SparseVectors: 0 rows of 5 tokens, 0 non-zero weights>"
    many = SparseVectors.from_dicts([{str(place): 9 - place for place in range(9)}])
    assert repr(many).endswith("{'0': 9, '1': 8, '2': 7, '3': 6, '4': 5, ...}>")


def test_inconsistent_arrays_are_refused() -> None:
    ids, weights = np.array([1, 5], np.int32), np.array([1, 2], np.float32)
    with pytest.raises(UsageError, match="indptr must start with 0"):
        SparseVectors(np.array([0, 1]), ids, weights, VOCABULARY)
    with pytest.raises(UsageError, match="Token ids from 1 to 5, but the vocabulary has 5 tokens"):
        SparseVectors(np.array([0, 2]), ids, weights, VOCABULARY)
    with pytest.raises(UsageError, match="2 document ids for 1 rows"):
        SparseVectors(np.array([0, 2]), ids, weights, [*VOCABULARY, "x"], ["a", "b"])


def test_a_token_outside_the_vocabulary_is_refused() -> None:
    with pytest.raises(UsageError, match="no token 'zebra'"):
        SparseVectors.from_dicts([{"zebra": 1.0}], VOCABULARY)


def test_similarity_is_bit_identical_to_exact_search() -> None:
    documents, queries = random_vectors(500, 40, 300, seed=1), random_vectors(7, 12, 300, seed=2)
    found = similarity(queries, documents)
    assert found.shape == (7, 500) and found.dtype == np.float32
    wanted = [QueryVector(ids.astype(np.uint32), weights) for ids, weights in map(queries.to_rows().row, range(7))]
    for row, hits in enumerate(search_exact([documents.to_rows()], wanted, k=500)):
        expected = np.zeros(500, dtype=np.float32)
        expected[hits.positions] = hits.scores
        assert found[row].tobytes() == expected.tobytes()


def test_similarity_of_many_documents_matches_the_full_matrix_product() -> None:
    documents, queries = random_vectors(40_000, 4, 30, seed=3), random_vectors(3, 5, 30, seed=4)
    expected = (queries.to_scipy().astype(np.float64) @ documents.to_scipy().astype(np.float64).T).toarray()
    np.testing.assert_allclose(similarity(queries, documents), expected, rtol=1e-6)


def test_similarity_matches_tokens_by_string(vectors: SparseVectors) -> None:
    """The other vocabulary has different ids, and a token that is in no document."""
    query = SparseVectors.from_dicts([{"zebra": 9.0, "stone": 2.0, "the": 1.0}], ("zebra", "stone", None, "the"))
    assert similarity(query, vectors).tolist() == [[0.5, 0.0, 6.0]]
    assert similarity(vectors, query).tolist() == [[0.5], [0.0], [6.0]]


def test_similarity_accepts_dictionaries(vectors: SparseVectors) -> None:
    query = {"zebra": 9.0, "stone": 2.0, "the": 1.0}
    assert similarity(query, vectors).tolist() == [[0.5, 0.0, 6.0]]
    assert similarity([query, {}], ROWS).tolist() == [[0.5, 0.0, 6.0], [0.0, 0.0, 0.0]]


def test_similarity_of_nothing_is_empty(vectors: SparseVectors) -> None:
    assert similarity([], vectors).shape == (0, 3)
    assert similarity(vectors, vectors[:0]).shape == (3, 0)


@pytest.mark.parametrize("wrong", ["the river", 7, [1.0, 2.0], None])
def test_similarity_refuses_other_types(vectors: SparseVectors, wrong: object) -> None:
    with pytest.raises(UsageError, match="expected"):
        similarity(vectors, wrong)


def test_similarity_needs_memory_for_one_block_of_documents() -> None:
    """All 100,000 documents in one block would need 91 MB."""
    some = random_vectors(1000, 50, 200, seed=5)
    documents = some[np.tile(np.arange(1000), 100)]
    tracemalloc.start()
    similarity(some[:2], documents)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 40e6
