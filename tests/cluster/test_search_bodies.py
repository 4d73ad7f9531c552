"""Search request bodies, without a server. tests/searching/test_search.py sends them to one."""

from __future__ import annotations

import json
import struct

import pytest

from sparse_ingest.cluster.hybrid_bodies import bm25_body
from sparse_ingest.cluster.reading import explained_terms
from sparse_ingest.cluster.search_bodies import neural_sparse_body, rank_feature_body
from sparse_ingest.errors import UsageError
from sparse_ingest.records import TermShare


def test_a_neural_sparse_body_is_a_complete_request_without_the_vector() -> None:
    assert neural_sparse_body({"catch": 2.5, "##ion": 0.5}, field="sparse", size=7) == {
        "size": 7,
        "_source": {"excludes": ["sparse"]},
        "query": {"neural_sparse": {"sparse": {"query_tokens": {"catch": 2.5, "##ion": 0.5}}}},
    }


def test_a_rank_feature_body_asks_for_the_same_tokens_and_weights() -> None:
    assert rank_feature_body({"catch": 2.5, "##ion": 0.5}, field="v", size=3)["query"] == {
        "bool": {
            "should": [
                {"rank_feature": {"field": "v.catch", "linear": {}, "boost": 2.5}},
                {"rank_feature": {"field": "v.##ion", "linear": {}, "boost": 0.5}},
            ]
        }
    }


def test_weights_survive_json_as_the_same_float32() -> None:
    weight = struct.unpack("<f", struct.pack("<f", 0.1))[0]
    text = json.dumps(neural_sparse_body({"a": weight}, field="sparse", size=1))
    read = json.loads(text)["query"]["neural_sparse"]["sparse"]["query_tokens"]["a"]
    assert struct.pack("<f", read) == struct.pack("<f", 0.1)


@pytest.mark.parametrize("make", [neural_sparse_body, rank_feature_body])
def test_a_query_without_weights_matches_nothing(make) -> None:
    assert make({}, field="sparse", size=1)["query"] == {"match_none": {}}


@pytest.mark.parametrize("make", [neural_sparse_body, rank_feature_body])
def test_explain_is_set_only_if_requested(make) -> None:
    assert make({"a": 1.0}, field="sparse", size=1, explain=True)["explain"] is True
    assert "explain" not in make({"a": 1.0}, field="sparse", size=1)


def test_more_tokens_than_clauses_are_refused_with_the_setting_to_change() -> None:
    weights = {str(number): 1.0 for number in range(1025)}
    with pytest.raises(UsageError, match=r"1025 tokens.*1024 clauses.*query\.top_k=1024"):
        neural_sparse_body(weights, field="sparse", size=1)
    assert neural_sparse_body(weights, field="sparse", size=1, max_clauses=2000)


def test_a_rank_feature_body_refuses_a_token_with_a_dot() -> None:
    with pytest.raises(UsageError, match=r"'a\.b'"):
        rank_feature_body({"a.b": 1.0}, field="sparse", size=1)


def test_a_bm25_body_matches_title_and_text() -> None:
    assert bm25_body("catch it", field="sparse", size=5) == {
        "size": 5,
        "_source": {"excludes": ["sparse"]},
        "query": {"multi_match": {"query": "catch it", "fields": ["title", "text"], "type": "most_fields"}},
    }


def linear(token: str, weight: float, stored: float, value: float) -> dict:
    return {
        "value": value,
        "description": f"Linear function on the sparse field for the {token} feature, computed as w * S from:",
        "details": [
            {"value": weight, "description": "w, weight of this function", "details": []},
            {"value": stored, "description": "S, feature value", "details": []},
        ],
    }


def test_an_explanation_of_one_token_or_of_many_gives_the_terms() -> None:
    one = linear("hello", 2.0, 1.5, 3.0)
    many = {"value": 3.5, "description": "sum of:", "details": [one, linear("", 0.5, 1.0, 0.5)]}
    assert list(explained_terms(one, "sparse")) == [TermShare("hello", 2.0, 1.5, 3.0)]
    assert [term.token for term in explained_terms(many, "sparse")] == ["hello", ""]


def test_a_token_that_contains_the_words_of_an_explanation_is_read() -> None:
    token = "x feature, computed as w * S from:"
    assert [term.token for term in explained_terms(linear(token, 1.0, 1.0, 1.0), "sparse")] == [token]


def test_clauses_on_other_fields_give_no_terms() -> None:
    tree = {
        "value": 4.0,
        "description": "sum of:",
        "details": [linear("a", 1.0, 1.0, 1.0), {"value": 3.0, "description": "weight(title:a in 0)", "details": []}],
    }
    assert [term.token for term in explained_terms(tree, "sparse")] == ["a"]
