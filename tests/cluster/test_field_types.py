"""Field types: the type of a value, and the values that a mapped type accepts, compared with OpenSearch."""

from __future__ import annotations

import json
from decimal import Decimal

import pytest

from sparse_ingest.cluster.client import Client
from sparse_ingest.cluster.field_types import FieldValues, fits
from sparse_ingest.records import refused_name

BIG = 123456789012345678901234567890


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        ([], "keyword"),
        (["red", "blue"], "keyword"),
        ([1, -2, 0], "long"),
        ([1, 2.5], "double"),
        ([True, False], "boolean"),
        ([True, "true"], "keyword"),
        (["true", "false"], "keyword"),
        ([1, "x"], "keyword"),
        ([1, True], "keyword"),
        ([1, "2"], "long"),
        (["3", "-3", "0"], "long"),
        (["27.99", "-3", "5"], "double"),
        (["27.90"], "keyword"),
        (["00501", "10001"], "keyword"),
        (["1e3"], "keyword"),
        (["-0"], "keyword"),
        (["+1"], "keyword"),
        (["1.0", "2.5"], "double"),
        (["NaN"], "keyword"),
        (["5", ""], "keyword"),
        (["٣"], "keyword"),
        ([2**63 - 1, -(2**63)], "long"),
        ([2**63], "keyword"),
        ([BIG], "keyword"),
        (["9223372036854775808"], "keyword"),
        ([2**53 + 1], "long"),
        ([2**53 + 1, 0.5], "keyword"),
        ([2**53, 0.5], "double"),
        (["2026-01-05", "2026-01-05T10:00:00Z", "2026-01-05T10:00:00.5+02:00"], "date"),
        (["2026-01-05T10:00:00.123456"], "date"),
        (["2024-02-29"], "date"),
        (["2026-02-30"], "keyword"),
        (["2026-01-05", "soon"], "keyword"),
        (["2026-01-05", ""], "keyword"),
        (["2026-01-05 10:00:00"], "keyword"),
        (["2026-01"], "keyword"),
        (["2026"], "long"),
        (["20260105"], "long"),
        (["2026-01-05T24:00:00"], "keyword"),
        (["2026-01-05", 5], "keyword"),
    ],
)
def test_the_chosen_type_stores_every_value_unchanged(values: list[str | float], kind: str) -> None:
    for order in (values, values[::-1]):
        seen = FieldValues()
        for value in order:
            seen.add(value)
        assert seen.type == kind


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        (["00501", "10001"], "'00501' is not how that number is printed"),
        (["27.90", "1.5"], "'27.90' is not how that number is printed"),
        ([BIG, 1], f"{BIG} is over 64 bits"),
        (["5", ""], "'' is not a long"),
        (["2026-01-05", ""], "'' is not a date"),
        (["5", "2.5", ""], "'' is not a double or long"),
        ([2**53 + 1, 0.5], "9007199254740993 is not exact as a double"),
        ([1, "x"], "'x' is not a long"),
        (["1.5", "27.90", "n/a"], "'n/a' is not a double"),
        ([True, 3], "it has values of several kinds (boolean, long)"),
        (["a", ""], None),
        ([""], None),
        ([1, 2], None),
    ],
)
def test_an_unexpected_keyword_type_has_a_reason(values: list[str | float], reason: str | None) -> None:
    seen = FieldValues()
    for value in values:
        seen.add(value)
    assert seen.reason == reason


def test_strings_above_ignore_above_are_counted() -> None:
    seen = FieldValues()
    for value in ("x" * 256, "x" * 257, "😀" * 128, "😀" * 129, "é" * 256):
        seen.add(value)
    assert seen.long == 2


# Values by mapped type: OpenSearch keeps some, changes some and refuses the rest.
NUMBERS = ["byte", "short", "integer", "long", "unsigned_long", "half_float", "float", "double"]
TRIED: dict[str, list[object]] = {
    **dict.fromkeys(
        NUMBERS,
        [0, 127, 128, -129, 32768, 2**31, 2**63 - 1, 2**63, 2**64, BIG, 1.0, 1.5, 1e3, 1e30, 1e39, 65519.0, 65520.0,
         3.4028235e38, 3.40282357e38, "1", "1.0", "1.5", "", "+1", "01", "x", "1_0", "0x10", "NaN", "1e400", "-5",
         True],
    ),  # fmt: skip
    "boolean": [True, False, "true", "false", "True", "1", "yes", 1, 0],
    "date": ["2026-01-05", "2026-01", "2026", "2026-01-05T10", "2026-01-05T10:20:30.123456789Z",
             "2026-01-05T10:20:30,5",
             "2026-01-05T10:20:30.1234567891", "2026-01-05T10:20:30+0200", "2026-01-05T10:20:30+18:00",
             "2026-01-05T10:20:30+18:01", "2026-01-05T10:20:30+19:00", "2026-01-05T10:20:30-01:60", "2026-01-05Z",
             "2026-01-05T24:00:00", "2026-01-05T23:59:60", "2026-02-30", "2024-02-29", "0000-02-29", "10000-01-01",
             "2026-1-5", "2026-01-05 10:20:30", "2026-01-05t10:20:30z", "", "2026-W01-1", "1600000000000",
             1600000000000, True, " 2026-01-05"],
    "keyword": [BIG, 1.5, True, "x" * 32766, "x" * 32767, "é" * 16383, "é" * 16384],
    "text": [BIG, True, 1.5, "x" * 40000],
    "alias": ["x", 1],
}  # fmt: skip


def test_a_type_accepts_what_the_server_stores_unchanged(client: Client, index_name: str) -> None:
    tried = [(kind, value) for kind, values in TRIED.items() for value in values]
    properties = {kind: {"type": kind} for kind in TRIED} | {"alias": {"type": "alias", "path": "keyword"}}
    client.call("PUT", f"/{index_name}", {"mappings": {"dynamic": False, "properties": properties}})
    lines = [
        f'{{"index":{{"_id":"{place}"}}}}\n{json.dumps({kind: value})}\n' for place, (kind, value) in enumerate(tried)
    ]
    client.call("POST", f"/{index_name}/_bulk", "".join(lines).encode(), params={"refresh": "true"})
    fields = [kind for kind in TRIED if kind != "text"]
    hits = client.call("POST", f"/{index_name}/_search", {"size": 1000, "docvalue_fields": fields})["hits"]["hits"]
    kept = {int(hit["_id"]): hit.get("fields", {}) for hit in hits}
    wrong = []
    for place, (kind, value) in enumerate(tried):
        accepted = place in kept
        if accepted and kind in NUMBERS[:5] and value != "":
            accepted = Decimal(str(value)) == kept[place][kind][0]
        if fits(value, properties[kind]) != accepted:  # type: ignore[arg-type]
            wrong.append((kind, value, kept.get(place)))
    assert wrong == []


@pytest.mark.parametrize(
    ("value", "also", "accepted"),
    [("5", {"coerce": False}, False), (5, {"coerce": False}, True), ("x", {"ignore_malformed": True}, True)],
)
def test_coerce_and_ignore_malformed_are_respected(
    client: Client, index_name: str, value: str | int, also: dict[str, bool], accepted: bool
) -> None:
    entry = {"type": "long"} | also
    client.call("PUT", f"/{index_name}", {"mappings": {"properties": {"a": entry}}})
    answer = client.call("POST", f"/{index_name}/_bulk", f'{{"create":{{}}}}\n{json.dumps({"a": value})}\n'.encode())
    assert fits(value, entry) == (not answer["errors"]) == accepted


NAMES = ["_id", "_index", "_source", "_routing", "_seq_no", "_version", "_field_names", "_ignored", "_nested_path",
         "_feature", "_data_stream_timestamp", "_type", "_foo", "_size", "", " ", "\t", ".", "..", "a.", "a..b", ".x",
         "y.", "a. b", "a. .b", " a", "a ", "a*", "a,b", "é", "x" * 49_999, "x" * 50_001, "a.\u3000", "a.\u2028",
         "a.\x1f", "a.\x00", "a.\u00a0", "a.\u2007.b", "a.\x85", ".".join("a" * 25)]  # fmt: skip


def test_the_server_refuses_the_same_field_names(client: Client, index_name: str) -> None:
    client.call("PUT", f"/{index_name}", {"mappings": {"dynamic": False}})
    lines = [f'{{"index":{{"_id":"{place}"}}}}\n{json.dumps({name: 1})}\n' for place, name in enumerate(NAMES)]
    answer = client.call("POST", f"/{index_name}/_bulk", "".join(lines).encode())
    refused = {name for name, item in zip(NAMES, answer["items"], strict=True) if "error" in item["index"]}
    assert {name for name in NAMES if refused_name(name) is not None} == refused
