"""Run identities: hash, and the settings in which two of them differ."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparse_ingest.runs.manifest import Difference, canonical_json, differences, identity_of, run_id

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(st.characters(exclude_categories=["Cs"]), max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("ab.", max_size=3), inner, max_size=3),
    max_leaves=8,
)  # fmt: skip
identities = st.dictionaries(st.text("abc", min_size=1, max_size=2), json_values, max_size=4)


@given(identities)
def test_the_order_of_keys_does_not_change_an_identity(identity: dict) -> None:
    turned = dict(reversed(identity.items()))
    assert differences(identity, turned) == []
    assert run_id(identity) == run_id(turned) == run_id(json.loads(canonical_json(identity)))


@given(
    st.dictionaries(st.sampled_from("abcd"), st.integers(0, 3)),
    st.dictionaries(st.sampled_from("abcd"), st.integers(0, 3)),
)
def test_identities_differ_if_and_only_if_their_hashes_differ(one: dict, other: dict) -> None:
    assert bool(differences(one, other)) == (run_id(one) != run_id(other))


def test_a_missing_setting_is_shown_as_none() -> None:
    assert differences({"a": {"b": 1}}, {"a": {"c": 2}}) == [Difference("a.b", 1, None), Difference("a.c", None, 2)]


def test_the_serialization_of_an_identity_is_fixed() -> None:
    assert canonical_json({"b": [1, None], "a": "é\u2028"}) == '{"a":"é\u2028","b":[1,null]}'
    number, content = identity_of({"names": ("a", "b")})
    assert content == {"format": 1, "names": ["a", "b"]}
    assert number == "9f7a346c900960ef0750affa8a355093a12cb349e6bd4f5c9573bebbcd7efde4"
    with pytest.raises(ValueError, match="JSON"):
        canonical_json(float("nan"))
