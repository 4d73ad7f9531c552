"""Checks before the first request. What the server itself refuses is in test_rank_features.py and test_seismic.py."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from sparse_ingest.cluster.client import Client
from sparse_ingest.cluster.preflight import (
    MAX_REQUEST_BYTES,
    IndexLimits,
    PreflightReport,
    check_documents,
    clashes,
    request_limit,
)
from sparse_ingest.cluster.scores import LOWEST_WEIGHT, weight_codes
from sparse_ingest.errors import RunError
from sparse_ingest.records import SparseRows
from sparse_ingest.runs.shards import ShardPart

VOCABULARY = ["zero", "one", None, "three", "four"]
LIMITS = IndexLimits("sparse", VOCABULARY)


def part(
    documents: dict[str, list[tuple[int, float]]], fields: Sequence[str] | None = None, weights: type = np.float32
) -> ShardPart:
    rows = list(documents.values())
    return ShardPart(
        np.arange(len(rows), dtype=np.uint64),
        [bytes(16)] * len(rows),
        SparseRows(
            list(documents),
            np.cumsum([0, *map(len, rows)], dtype=np.int64),
            np.array([token for row in rows for token, _ in row], dtype=np.uint32),
            np.array([weight for row in rows for _, weight in row], dtype=weights),
        ),
        fields or ['{"text":"x"}'] * len(rows),
    )


def refusal(*parts: ShardPart, limits: IndexLimits = LIMITS) -> list[str]:
    """Return the lines of the error between the first and the last."""
    with pytest.raises(RunError) as caught:
        check_documents(parts, limits)
    lines = str(caught.value).split("\n")
    assert lines[0] == "The cluster would refuse documents of this run, so nothing was sent."
    return [line.strip() for line in lines[1:-1]]


def test_a_valid_run_gives_counts_and_a_histogram_of_weights() -> None:
    for kind in (np.float16, np.float32):
        report = check_documents(
            [part({"a": [(0, 0.5), (1, 1.5)], "empty": []}, weights=kind), part({"b": [(0, 0.5)]}, weights=kind)],
            LIMITS,
        )
        assert isinstance(report, PreflightReport)
        assert (report.documents, report.terms) == (3, 3)
        codes = weight_codes(np.array([0.5, 1.5]))
        assert report.codes[codes].tolist() == [2, 1]
        assert report.codes.sum() == 3


@pytest.mark.parametrize("doc_id", ["", "x" * 513, "é" * 257, "😀" * 129])
def test_ids_that_opensearch_refuses_are_listed(doc_id: str) -> None:
    fitting = {"x" * 512: [(0, 1.0)], "😀" * 128: [(0, 1.0)]}
    check_documents([part(fitting)], LIMITS)
    [line] = refusal(part({**fitting, doc_id: [(0, 1.0)]}))
    assert line.startswith(f"ids that are empty or longer than 512 bytes: '{doc_id[:80]}")


@pytest.mark.parametrize("weight", [0.0, 1e-40])
def test_weights_that_opensearch_refuses_are_listed_with_document_and_token(weight: float) -> None:
    good = [(0, LOWEST_WEIGHT), (1, 3.4e38)]
    check_documents([part({"a": good})], LIMITS)
    [line] = refusal(part({"a": good, "b": [(0, 1.0), (3, weight)]}))
    assert line == f"weights below 1.1754944e-38: 'b' token id 3 ({np.float32(weight):g})"


def test_subnormal_float16_weights_are_accepted() -> None:
    check_documents([part({"a": [(0, 6e-8)]}, weights=np.float16)], LIMITS)


def test_weights_of_ids_without_a_token_are_listed() -> None:
    documents = {"a": [(0, 1.0)], "empty": [], "b": [(1, 1.0), (2, 1.0)], "c": [(0, 1.0)]}
    assert refusal(part(documents)) == ["token ids without a token in vocab.json: 'b' (id 2)"]


def test_two_ids_of_one_token_are_refused_unless_ids_are_the_keys() -> None:
    limits = replace(LIMITS, vocabulary=["zero", "same", "same"])
    assert refusal(part({"a": [(0, 1.0)]}), limits=limits) == ["tokens that have several ids: 'same'"]
    check_documents([part({"a": [(1, 1.0), (2, 1.0)]})], replace(limits, kind="sparse_vector"))


def test_a_token_above_lucenes_limit_is_refused_only_if_a_document_has_it() -> None:
    limits = replace(LIMITS, vocabulary=["zero", "x" * 32_766, "x" * 32_767])
    check_documents([part({"a": [(0, 1.0), (1, 1.0)]})], limits)
    assert refusal(part({"a": [(2, 1.0)]}), limits=limits) == ["tokens longer than 32766 bytes: 'a' (id 2)"]


def test_more_terms_than_lucene_can_sum_are_refused() -> None:
    """OpenSearch refuses 200,000 weights of 1.0 with "too many tokens for field"."""
    limits = replace(LIMITS, vocabulary=list(map(str, range(150_000))))
    code = int(weight_codes(np.array([1.0]))[0])
    most = (2**31 - 1) // code
    check_documents([part({"a": [(token, 1.0) for token in range(most)]})], limits)
    [line] = refusal(part({"a": [(token, 1.0) for token in range(most + 1)]}), limits=limits)
    assert line == f"documents with more terms than Lucene can add up: 'a' ({most + 1} terms)"


@pytest.mark.parametrize(
    ("carried", "field", "expected"),
    [
        ({"sparse": 1}, "sparse", True),
        ({"text": "sparse"}, "sparse", False),
        ({"inner": {"sparse": 1}}, "sparse", False),
        ({"a": {"b": 1}}, "a.b", True),
        ({"a.b": 1}, "a.b", True),
        ({'ü"b': 1}, 'ü"b', True),
        ({"a": 1}, "a.b", True),
        ({"a": {"c": 1}}, "a.b", False),
        ({"b": 1}, "a.b", False),
    ],
)
def test_a_kept_field_with_the_name_of_the_sparse_field_is_refused(
    carried: dict[str, object], field: str, expected: bool
) -> None:
    assert clashes(carried, field) is expected
    some = part({"a": [(0, 1.0)], "b": []}, ['{"text":"x"}', json.dumps(carried)])
    limits = replace(LIMITS, field=field)
    if expected:
        [line] = refusal(some, limits=limits)
        assert line.startswith(f"documents that carry a field {field!r}, the name of the sparse field")
        assert line.endswith(": 'b'")
    else:
        check_documents([some], limits)


def test_a_document_above_the_request_limit_is_listed_with_its_size() -> None:
    limits = replace(LIMITS, max_bytes=10_000)
    text = json.dumps({"text": "x" * 9_900})
    check_documents([part({"a": [(0, 1.0)]}, [text])], limits)
    [line] = refusal(
        part({"a": [(0, 1.0)], "b": [(0, 1.0)]}, [text, json.dumps({"text": "x" * 10_000})]), limits=limits
    )
    assert line == ("documents larger than the 10000 bytes that a request may have: 'b' (10021 bytes or more)")


def test_each_problem_is_counted_and_its_first_twenty_documents_are_listed() -> None:
    parts = [part({f"{first}-{number}": [(0, 0.0), (2, 1.0)] for number in range(15)}) for first in "ab"]
    weights, tokens = refusal(*parts)
    assert weights.startswith("weights below ")
    assert weights.count("token id 0 (0)") == 20
    assert weights.endswith(", and 10 more")
    assert tokens.startswith("token ids without a token in vocab.json: 'a-0' (id 2), ")
    assert tokens.endswith("'b-4' (id 2), and 10 more")


def test_the_request_limit_is_read_from_the_cluster(client: Client) -> None:
    assert request_limit(client) == MAX_REQUEST_BYTES
