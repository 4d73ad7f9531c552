"""Bulk request bodies: their bytes parse back to the rows that they were written from."""

from __future__ import annotations

import json
import subprocess
import sys
from fractions import Fraction

import numpy as np
import pytest
from support.runs import DOCUMENTS, VOCABULARY, make_run

from sparse_ingest.cluster import bulk_bodies as bodies
from sparse_ingest.cluster.bulk_bodies import BodyWriter, BulkRequest, Spelling, delete_requests, shortest_decimal
from sparse_ingest.cluster.scores import stored_weights, weight_codes
from sparse_ingest.errors import RunError
from sparse_ingest.records import SparseRows
from sparse_ingest.runs.shards import ShardPart, read_shard


def part(vectors: SparseRows, fields: list[str] | None = None, first_row: int = 0) -> ShardPart:
    count = len(vectors.doc_ids)
    rows = np.arange(first_row, first_row + count, dtype=np.uint64)
    return ShardPart(rows, [bytes(16)] * count, vectors, fields or ["{}"] * count)


def one(weights: list[float], token_ids: list[int], fields: str = "{}") -> ShardPart:
    indptr = np.array([0, len(weights)], dtype=np.int64)
    vectors = SparseRows(["a"], indptr, np.array(token_ids, dtype=np.uint32), np.array(weights, dtype=np.float32))
    return part(vectors, [fields])


def written(writer: BodyWriter, *parts: ShardPart) -> str:
    return b"".join(request.body for request in writer.requests(parts)).decode()


def some_documents(count: int, first_row: int = 0) -> ShardPart:
    """Documents d0, d1, … of about 60 bytes each; every fifth has no terms."""
    terms = np.array([0 if row % 5 == 0 else row % 3 + 1 for row in range(first_row, first_row + count)])
    vectors = SparseRows(
        [f"d{row}" for row in range(first_row, first_row + count)],
        np.concatenate(([0], np.cumsum(terms))),
        np.concatenate([np.arange(length, dtype=np.uint16) for length in terms]),
        np.full(terms.sum(), 1.5, dtype=np.float16),
    )
    return part(vectors, first_row=first_row)


@pytest.mark.parametrize("weights", ["float16", "float32"])
def test_bodies_parse_back_to_the_rows(tmp_path, weights) -> None:
    run = make_run(tmp_path / "run", shard_rows=100, weights=weights)
    (rows,) = read_shard(run.shard_path(0))
    lines = written(BodyWriter(run.vocabulary(), "sparse"), rows).split("\n")
    assert lines.pop() == ""
    found = {
        json.loads(action)["index"]["_id"]: json.loads(source)
        for action, source in zip(lines[::2], lines[1::2], strict=True)
    }
    assert found.keys() == DOCUMENTS.keys()
    for place, (doc_id, source) in enumerate(found.items()):
        token_ids, kept = rows.vectors.row(place)
        assert list(source["sparse"]) == [run.vocabulary()[token_id] for token_id in token_ids]
        values = np.array(list(source["sparse"].values()), dtype=np.float32)
        np.testing.assert_array_equal(stored_weights(values), stored_weights(kept))
        assert source["title"] == f"Title of {doc_id}"


def test_the_bytes_of_a_small_request() -> None:
    vectors = SparseRows(
        ['a"b', "c", "d"], np.array([0, 2, 2, 3]), np.array([0, 1, 1], dtype=np.uint16),
        np.array([1.5, 0.1, 2], dtype=np.float16),
    )  # fmt: skip
    assert written(BodyWriter(['"', "é"], "s"), part(vectors, ['{"title":"x"}', "{}", "{}"])) == (
        '{"index":{"_id":"a\\"b"}}\n{"title":"x","s":{"\\"":1.5,"é":0.1}}\n'
        '{"index":{"_id":"c"}}\n{"s":{}}\n{"index":{"_id":"d"}}\n{"s":{"é":2}}\n'
    )


def test_an_update_writes_only_the_vector() -> None:
    action = '{"update":{"_id":"a","retry_on_conflict":3}}\n'
    carried = one([1.5], [0], '{"title":"x"}')
    assert written(BodyWriter(["t"], "s", operation="update"), carried) == action + '{"doc":{"s":{"t":1.5}}}\n'
    replaced = written(BodyWriter(["t"], "s", operation="replace"), carried)
    assert replaced.startswith(action)
    assert json.loads(replaced.split("\n")[1])["script"]["params"] == {"f": "s", "v": {"t": 1.5}}


@pytest.mark.parametrize(
    ("operation", "expected"),
    [
        ("index", {"title": "x"}),
        ("update", {"script": {"source": "ctx._source.remove(params.f)", "params": {"f": "s"}}}),
        ("replace", {"script": {"source": "ctx._source.remove(params.f)", "params": {"f": "s"}}}),
    ],
)
def test_an_empty_vector_is_omitted_or_removed_if_the_field_refuses_it(operation, expected) -> None:
    writer = BodyWriter(["t"], "s", operation=operation, empty_field=False)
    _, source, _ = written(writer, one([], [], '{"title":"x"}')).split("\n")
    assert json.loads(source) == expected
    assert "1.5" in written(writer, one([1.5], [0]))


def test_writing_bodies_does_not_import_pandas(tmp_path) -> None:
    run = make_run(tmp_path / "run", shard_rows=100)
    script = (
        "import sys; from pathlib import Path; from sparse_ingest.runs.shards import ShardPart, read_shard; "
        "from sparse_ingest.cluster.bulk_bodies import BodyWriter; "
        "requests = list(BodyWriter(['t'] * 999, 's').requests(read_shard(Path(sys.argv[1])))); "
        "assert requests and 'pandas' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script, str(run.shard_path(0))], check=True)


def test_keys_and_number_format_are_configurable() -> None:
    spelling = Spelling(lambda weights: np.round(weights * 10).astype(np.uint16), lambda code: f"{code}e-1")
    writer = BodyWriter(["0", None, "2"], "s", spelling=spelling)
    assert '{"0":15e-1,"2":3e-1}' in written(writer, one([1.5, 0.3], [0, 2]))


def test_a_weight_that_appears_in_a_later_part_has_its_decimal() -> None:
    writer = BodyWriter(["t"], "s")
    assert [json.loads(written(writer, one([weight], [0])).split("\n")[1]) for weight in (1.5, 0.25, 1.5, 3)] == [
        {"s": {"t": weight}} for weight in (1.5, 0.25, 1.5, 3)
    ]


@pytest.mark.parametrize(("limit", "layouts"), [("_SLICE_TERMS", 14), ("_SLICE_CHARACTERS", 17)])
def test_parts_written_in_slices_give_the_same_bytes(monkeypatch, limit: str, layouts: int) -> None:
    expected = written(BodyWriter(["a", "b", "c"], "s"), some_documents(50))
    monkeypatch.setattr(bodies, limit, 7)
    assert len(list(BodyWriter(["a", "b", "c"], "s")._layouts(some_documents(50)))) == layouts
    assert written(BodyWriter(["a", "b", "c"], "s"), some_documents(50)) == expected


def test_deletions_list_the_ids(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bodies, "MAX_DOCUMENTS", 2)
    first, last = delete_requests(['a"', "b", "c"])
    assert first.body == b'{"delete":{"_id":"a\\""}}\n{"delete":{"_id":"b"}}\n'
    assert (first.doc_ids, first.borders.tolist(), first.operation) == (['a"', "b"], [0, 25, 48], "delete")
    assert last.doc_ids == ["c"]


def test_fields_with_line_breaks_are_written_on_one_line() -> None:
    text = written(BodyWriter(["t"], "s"), one([1], [0], '{\n "title": "x\\ny"\n}\n'))
    assert text.count("\n") == 2
    assert json.loads(text.split("\n")[1]) == {"title": "x\ny", "s": {"t": 1}}


def test_every_storable_weight_has_a_decimal_that_parses_to_its_code() -> None:
    codes = np.arange(256, 0xFF00, dtype=np.uint32)
    decimals = [shortest_decimal(int(code)) for code in codes]
    # JSON parsers read a decimal as float32 directly, or as a double that is cast to float32.
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


def test_requests_stay_below_both_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    writer = BodyWriter(["a", "b", "c"], "s")
    parts = [some_documents(10), some_documents(13, first_row=10)]
    everything = written(writer, *parts)
    by_bytes = list(writer.requests(parts, max_bytes=300))
    assert len(by_bytes) > 3
    assert all(len(request.body) <= 300 for request in by_bytes)
    # No request has room for the first document of the next one.
    for request, following in zip(by_bytes, by_bytes[1:], strict=False):
        assert len(request.body) + following.borders[1] > 300
    monkeypatch.setattr(bodies, "MAX_DOCUMENTS", 9)
    by_count = list(writer.requests(parts))
    assert [len(request.doc_ids) for request in by_count] == [9, 9, 5]
    for requests in (by_bytes, by_count):
        assert b"".join(request.body for request in requests).decode() == everything
        assert [doc_id for request in requests for doc_id in request.doc_ids] == [f"d{row}" for row in range(23)]
        assert [row for request in requests for row in request.rows.tolist()] == list(range(23))


def test_a_changing_limit_is_read_before_each_request() -> None:
    limits = iter([100, 200, 400, 800, 1600, 3200])
    limits_used: list[int] = []

    def limit() -> int:
        limits_used.append(next(limits))
        return limits_used[-1]

    requests = list(BodyWriter(["a", "b", "c"], "s").requests([some_documents(30)], max_bytes=limit))
    assert len(requests) > 2
    assert all(
        limit / 2 < len(request.body) <= limit for request, limit in zip(requests[:-1], limits_used, strict=False)
    )


def test_a_document_above_the_limit_is_sent_alone() -> None:
    requests = BodyWriter(["a", "b", "c"], "s").requests([some_documents(3)], max_bytes=5)
    assert [request.doc_ids for request in requests] == [["d0"], ["d1"], ["d2"]]


def test_requests_have_their_shard_and_no_part_gives_no_request() -> None:
    writer = BodyWriter(["a", "b", "c"], "s")
    assert [request.shard for request in writer.requests([some_documents(3)], shard=7)] == [7]
    assert list(writer.requests([])) == []


def test_part_of_a_request_has_the_bytes_of_its_documents() -> None:
    (request,) = BodyWriter(["a", "b", "c"], "s").requests([some_documents(4)], shard=2)
    chosen = request.part([1, 3])
    lines = request.body.splitlines(keepends=True)
    assert chosen.body == b"".join([lines[2], lines[3], lines[6], lines[7]])
    assert (chosen.doc_ids, chosen.rows.tolist(), chosen.shard) == (["d1", "d3"], [1, 3], 2)
    again = chosen.part([1])
    assert isinstance(again, BulkRequest)
    assert again.body == b"".join(lines[6:])


def test_a_weight_of_an_id_without_token_is_reported_as_a_damaged_run() -> None:
    missing = VOCABULARY.index(None)
    with pytest.raises(RunError, match=f"token id {missing}, which vocab.json does not have"):
        written(BodyWriter(VOCABULARY, "s"), one([1], [missing]))
