"""Token maps: a run with token ids of 32,768 and more in a sparse_vector field."""

from __future__ import annotations

import base64
import json
import re
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.forked import command
from support.indexes import assert_same_hits
from support.large_vocabularies import (
    SIZE,
    USED,
    VOCABULARY,
    exact_seismic,
    ids_of,
    make_large_run,
    random_documents,
    write_large_table,
)
from support.loads import into, stamped

import sparse_ingest
from sparse_ingest.cluster.client import Client, Connection
from sparse_ingest.cluster.token_map import TokenMap
from sparse_ingest.errors import ClusterError, RunError, UsageError
from sparse_ingest.loading.live_tokens import token_map_of
from sparse_ingest.pipeline import IndexSettings, ModelSettings, Pipeline
from sparse_ingest.runs.run import Run
from sparse_ingest.searching import search
from sparse_ingest.searching.pipelines import engine_of
from sparse_ingest.verification.verify import VerifyReport, verify

DOCUMENTS = random_documents(50, USED)
SEISMIC = Pipeline(index=IndexSettings(kind="sparse_vector"))
QUERIES = [" ".join(VOCABULARY[token_id] for token_id in USED[start::17]) for start in range(10)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_large_table(tmp_path_factory.mktemp("model") / "large")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, model: str) -> Run:
    return make_large_run(tmp_path_factory.mktemp("run") / "run", DOCUMENTS, model)


def ids_in_meta(client: Client, index: str) -> tuple[list[int], list[int]]:
    """Return the ids of the bitmap and the appended ones, decoded as the documentation says."""
    mappings = client.call("GET", f"/{index}/_mapping")[index]["mappings"]
    content = mappings["_meta"]["sparse_ingest"]["token_map"]
    packed = zlib.decompress(base64.b64decode(content["bitmap"]))
    bits = [8 * place + bit for place, byte in enumerate(packed) for bit in range(8) if byte >> bit & 1]
    return bits, content["appended"]


def compared(client: Client, index: str, run: Run) -> VerifyReport:
    return verify(run, index=index, connection=Connection(client.address), sample=None)


def edit_stamp(client: Client, index: str, **content: Any) -> None:
    mappings = client.call("GET", f"/{index}/_mapping")[index]["mappings"]
    stamp = {**mappings["_meta"]["sparse_ingest"], **content}
    client.call("PUT", f"/{index}/_mapping", {"_meta": {"sparse_ingest": stamp}})


def test_live_ids_are_numbered_and_every_weight_is_verified(client: Client, index_name: str, run: Run) -> None:
    into(client, index_name, run, pipeline=SEISMIC)
    assert ids_in_meta(client, index_name) == (ids_of(DOCUMENTS), [])
    report = compared(client, index_name, run)
    assert report.ok and report.checked_weights == 12 * len(DOCUMENTS)
    # Into a segment with clusters.
    client.call("POST", f"/{index_name}/_forcemerge", params={"max_num_segments": "1"})
    assert compared(client, index_name, run).ok
    key = str(ids_of(DOCUMENTS).index(USED[-1]))
    client.call("PUT", f"/{index_name}/_doc/d7", {"sparse": {key: 9.0}}, params={"refresh": "true"})
    differences = compared(client, index_name, run).differences
    assert {one.doc_id for one in differences} == {"d7"}
    assert {one.token for one in differences} <= {*DOCUMENTS["d7"], None}


def test_answers_equal_those_of_the_run_and_of_a_rank_features_field(
    client: Client, index_name: str, run: Run, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    names = {"sparse_vector": f"{index_name}-s", "rank_features": f"{index_name}-r"}
    into(client, names["sparse_vector"], run, pipeline=exact_seismic(tmp_path))
    into(client, names["rank_features"], run)
    of_run, connection = sparse_ingest.open_run(run), Connection(client.address)
    with (
        sparse_ingest.open_index(names["sparse_vector"], connection=connection) as seismic,
        sparse_ingest.open_index(names["rank_features"], connection=connection) as features,
    ):
        for text in QUERIES:
            hits, others, expected = (
                opened.search(text, k=20, **how)  # type: ignore[attr-defined]
                for opened, how in ((seismic, {}), (features, {}), (of_run, {"stored": True}))
            )
            found = [(hit.id, hit.score) for hit in hits]
            assert len(found) == 20
            assert_same_hits(found, [(hit.id, hit.score) for hit in expected], 20)
            assert_same_hits(found, [(hit.id, hit.score) for hit in others], 20)
            assert {term.token for term in hits[0].terms} <= DOCUMENTS[hits[0].id].keys()
        [shown], [other] = seismic.show("d3"), features.show("d3")
        assert [(term.token, term.weight) for term in shown.terms] == [
            (term.token, term.weight) for term in other.terms
        ]
        explained = seismic.explain(QUERIES[0], hits[0].id)
        assert explained.lacking
        # A token that no document has changes no score, and is no reason for a warning.
        [first], [same] = (seismic.search(text, k=1) for text in (QUERIES[0], f"{QUERIES[0]} w11 w39999"))
        assert (first.id, first.score) == (same.id, same.score)
        assert not [record for record in caplog.records if record.name.startswith("sparse_ingest")]
        assert seismic.search("w11") == []
        assert seismic.why_empty("w11") == [
            f"No document of index {names['sparse_vector']!r} has any token of the query in field 'sparse': 'w11'."
        ]


def test_measures_are_those_of_the_run(client: Client, index_name: str, run: Run, tmp_path: Path) -> None:
    (tmp_path / "qrels").mkdir()
    queries = [json.dumps({"_id": str(number), "text": text}) for number, text in enumerate(QUERIES)]
    (tmp_path / "queries.jsonl").write_text("\n".join(queries))
    qrels = "".join(f"{number}\td{3 * number + more}\t{1 + more}\n" for number in range(10) for more in range(3))
    (tmp_path / "qrels" / "test.tsv").write_text(f"query-id\tcorpus-id\tscore\n{qrels}")
    into(client, index_name, run, pipeline=exact_seismic(tmp_path))
    found = []
    for target in (("--index", index_name, "--url", client.address), ("--run", run.path, "--stored")):
        answer = command("evaluate", "--queries", tmp_path, *target, "--per-query", "--json")
        assert answer.code == 0, answer.err
        found.append(json.loads(answer.out))
    assert found[0]["engine"] == "seismic"
    assert found[0]["per_query"] == found[1]["per_query"]
    assert 0 < found[0]["nDCG@10"] < 1


def test_a_later_load_appends_the_ids_that_are_new(
    client: Client, index_name: str, tmp_path: Path, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = make_large_run(tmp_path / "old", DOCUMENTS, model)
    more = {"new": {VOCABULARY[39_999]: 1.0, VOCABULARY[20]: 2.0, VOCABULARY[500]: 0.5}}
    changed = {"d1": {VOCABULARY[32_768]: 3.0}}
    new = make_large_run(tmp_path / "new", {**DOCUMENTS, **changed, **more}, model)
    into(client, index_name, old, pipeline=SEISMIC)
    opened = sparse_ingest.open_index(index_name, connection=Connection(client.address))
    assert opened.search("w32768") == []
    report = into(client, index_name, new, pipeline=SEISMIC, since=old)
    assert report.unchanged == len(DOCUMENTS) - 1
    assert ids_in_meta(client, index_name) == (ids_of(DOCUMENTS), [20, 32_768, 39_999])
    again = into(client, index_name, new, pipeline=SEISMIC, since=old)
    assert (again.loaded_shards, ids_in_meta(client, index_name)[1]) == (0, [20, 32_768, 39_999])
    assert compared(client, index_name, new).ok
    monkeypatch.setattr(search, "MAP_AGE_S", 0.0)
    with opened:
        served = opened.served(60)
        assert served.search("w32768") == []  # only `current` reads the map
        assert [hit.id for hit in served.current().search("w32768")] == ["d1"]
        [hit] = opened.search("w32768")
        assert (hit.id, hit.score, hit.terms[0].token) == ("d1", pytest.approx(3.0 * 1.0, rel=0.6), "w32768")
    shown = json.loads(command("index", "show", "--index", index_name, "--url", client.address, "--json").out)
    assert shown["numbered_tokens"] == len(ids_of(DOCUMENTS)) + 3


def test_a_load_into_a_created_index_that_starts_again_keeps_the_map(client: Client, index_name: str, run: Run) -> None:
    assert (
        command("index", "create", "--index", index_name, "--kind", "sparse_vector", "--url", client.address).code == 0
    )
    into(client, index_name, run, pipeline=SEISMIC)
    before = ids_in_meta(client, index_name)
    into(client, index_name, run, pipeline=SEISMIC, retry_dead=True)
    assert ids_in_meta(client, index_name) == before
    client.call("DELETE", f"/{index_name}/_doc/d9", params={"refresh": "true"})
    assert compared(client, index_name, run).missing_ids == ["d9"]


def test_ids_below_32768_of_a_large_vocabulary_stay_and_later_ids_above_are_refused(
    client: Client, index_name: str, tmp_path: Path, model: str
) -> None:
    low = random_documents(5, [token_id for token_id in USED if token_id < 32_768])
    old = make_large_run(tmp_path / "old", low, model)
    into(client, index_name, old, pipeline=SEISMIC)
    assert stamped(client, index_name).token_map is None
    assert compared(client, index_name, old).ok
    with sparse_ingest.open_index(index_name, connection=Connection(client.address)) as opened:
        assert opened.search(f"{max(low['d0'], key=len)} w39999")
    new = make_large_run(tmp_path / "new", {**low, "high": {"w39999": 1.0}}, model)
    with pytest.raises(
        ClusterError, match=r"has documents but no token map, which the token ids of this load need \(up to 39,999"
    ):
        into(client, index_name, new, pipeline=SEISMIC, since=old)
    into(client, index_name, new, pipeline=SEISMIC, replace=True)
    assert compared(client, index_name, new).ok


def test_too_many_tokens_are_refused_with_the_pruning_that_fits(
    client: Client, index_name: str, tmp_path: Path, model: str
) -> None:
    random = np.random.default_rng(2)
    tokens = random.permutation(np.arange(10, SIZE))
    many = {
        f"d{number}": dict(
            zip((VOCABULARY[one] for one in some), random.gamma(2.0, 0.5, len(some)) + 0.01, strict=True)
        )
        for number, some in enumerate(np.array_split(tokens, 80))
    }
    run = make_large_run(tmp_path / "run", many, model)
    with pytest.raises(
        RunError, match=r"have 39,990 different tokens, .* distinguishes 32,768\. Prune with"
    ) as refused:
        into(client, index_name, run, pipeline=SEISMIC)
    message = str(refused.value)
    assert "use --kind rank_features" in message
    assert client.find(f"/{index_name}") is None
    found = re.findall(r"--(top-k|min-weight) ([\d.]+) \(([\d,]+) tokens\)", message)
    assert [rule for rule, _, _ in found] == ["top-k", "min-weight"]
    for rule, value, left in found:
        pruned = token_map_of(run, {rule.replace("-", "_"): float(value)})
        assert pruned is not None
        assert 32_000 < len(pruned.ids) <= 32_768
        assert f"{len(pruned.ids):,}" == left


def test_an_index_that_is_full_is_refused_with_advice(
    client: Client, index_name: str, run: Run, tmp_path: Path, model: str
) -> None:
    into(client, index_name, run, pipeline=SEISMIC)
    edit_stamp(client, index_name, token_map=TokenMap(np.arange(SIZE - 32_768, SIZE)).as_meta())
    more = make_large_run(tmp_path / "more", {"more": {"w500": 1.0}}, model)
    with pytest.raises(RunError, match=r"this load have 32,769 different tokens, .*\. Load into a new index \(--alias"):
        into(client, index_name, more, pipeline=SEISMIC)


def test_an_index_without_its_map_is_refused(client: Client, index_name: str, run: Run, tmp_path: Path) -> None:
    into(client, index_name, run, pipeline=SEISMIC)
    edit_stamp(client, index_name, token_map={"bitmap": "bad", "appended": []})
    with pytest.raises(ClusterError, match="cannot be read"):
        compared(client, index_name, run)
    with pytest.raises(ClusterError, match="cannot be read"):
        into(client, index_name, run, pipeline=SEISMIC)
    client.call("PUT", f"/{index_name}/_mapping", {"_meta": {}})
    with pytest.raises(ClusterError, match=r"has no _meta\.sparse_ingest, where a load stores which tokens"):
        compared(client, index_name, run)
    named = ModelSettings(document=run.manifest.model["document"])
    with pytest.raises(ClusterError, match=r"has no _meta\.sparse_ingest, where a load stores which tokens"):
        sparse_ingest.open_index(index_name, model=named, connection=Connection(client.address))
    # Small ids could be other keys of the lost map.
    low = make_large_run(tmp_path / "low", {"low": {"catch": 1.0}}, run.manifest.model["document"])
    for lost in (run, low):
        with pytest.raises(ClusterError, match="has documents but no token map"):
            into(client, index_name, lost, pipeline=SEISMIC)


def test_an_alias_that_moves_to_an_index_with_other_keys_is_noticed(
    client: Client, index_name: str, run: Run, tmp_path: Path, model: str
) -> None:
    others = {doc_id: {VOCABULARY[token_id]: 1.0 for token_id in (5, 39_000)} for doc_id in DOCUMENTS}
    other = make_large_run(tmp_path / "other", others, model)
    connection = Connection(client.address)
    old, new = f"{index_name}-old", f"{index_name}-new"
    into(client, old, run, pipeline=SEISMIC)
    into(client, new, other, pipeline=SEISMIC)
    client.call("POST", "/_aliases", {"actions": [{"add": {"index": old, "alias": index_name}}]})
    with sparse_ingest.open_index(index_name, connection=connection) as opened:
        assert opened.search(QUERIES[0])
        move = {"remove": {"index": old, "alias": index_name}}, {"add": {"index": new, "alias": index_name}}
        client.call("POST", "/_aliases", {"actions": list(move)})
        for text in (QUERIES[0], VOCABULARY[USED[-1]]):  # with hits and without
            with pytest.raises(ClusterError, match="whose keys mean other tokens. Open it again"):
                opened.search(text)
    with sparse_ingest.open_index(index_name, connection=connection) as opened:
        assert len(opened.search("w39000", k=60)) == len(DOCUMENTS)


def test_query_takes_the_keys_of_an_index_or_of_a_run(client: Client, index_name: str, run: Run, model: str) -> None:
    into(client, index_name, run, pipeline=SEISMIC)
    asked, kind = f"{VOCABULARY[USED[-1]]} catch", ("--set", "index.kind=sparse_vector")
    refused = command("query", "--model", model, *kind, asked)
    assert refused.code == 2
    assert "Pass --index NAME, which has these numbers, or --run RUN." in refused.err
    bodies = []
    for target in (("--index", index_name, "--url", client.address), ("--run", run.path, *kind)):
        answer = command("query", *target, asked)
        assert answer.code == 0, answer.err
        bodies.append(json.loads(answer.out)["query"]["neural_sparse"]["sparse"]["query_tokens"])
    assert bodies[0] == bodies[1]
    assert list(bodies[0]) == [str(ids_of(DOCUMENTS).index(USED[-1]))]
    assert "pruning none" in answer.err
    with pytest.raises(UsageError, match="distinguishes 32,768"):
        engine_of(Pipeline(model=ModelSettings(document=model), index=IndexSettings(kind="sparse_vector")))
    both = command("query", "--run", run.path, "--index", index_name, "catch")
    assert both.code == 2 and "--run cannot be combined" in both.err
