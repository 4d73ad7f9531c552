"""A document's rank is its place in the ranking of all hits, in a run and in an index; tokens as readable text."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from support.indexes import bits, filled, random_documents, random_queries
from support.runs import make_run

from sparse_ingest.cluster.client import Client
from sparse_ingest.cluster.search_bodies import Engine
from sparse_ingest.runs.run import Run
from sparse_ingest.searching.document_terms import readable_by
from sparse_ingest.searching.explaining import explain_in_index
from sparse_ingest.searching.index_search import search_index
from sparse_ingest.searching.run_search import explain_in_run, search_run

pytestmark = pytest.mark.both_products

# "doc-0" and every ninth have weights of 0.5 and 1 only, so one token gives equal scores.
TIES = {"word3": 1.0, "word7": 0.5}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    documents = random_documents(120) | {f"same-{number}": {"word3": 0.5} for number in range(6)}
    return make_run(tmp_path_factory.mktemp("explain") / "run", documents, shard_rows=32)


@pytest.fixture(scope="module", params=[1, 2])
def index(client: Client, run: Run, request: pytest.FixtureRequest) -> Iterator[str]:
    with filled(client, run, shards=request.param) as name:
        yield name


@pytest.mark.parametrize("weights", [TIES, random_queries(1)[0]])
def test_hits_of_a_run_have_their_rank(run: Run, weights: dict[str, float]) -> None:
    hits = search_run(run, weights, size=1000, stored=True)
    for hit in [*hits[:7], *hits[7::9]]:
        found = explain_in_run(run, weights, hit.id, size=5, stored=True)
        assert (found.rank, bits(found.score), found.terms, found.fields) == (
            hit.rank, bits(hit.score), hit.terms, hit.fields,
        )  # fmt: skip
        assert found.reason == (None if hit.rank <= 5 else "low score")
        assert (found.matching, bits(found.last_score)) == (len(hits), bits(hits[4].score))
        assert found.equal == sum(bits(other.score) == bits(hit.score) for other in hits) - 1


def test_hits_of_an_index_have_their_rank(client: Client, index: str) -> None:
    hits = search_index(client, index, TIES, size=1000)
    assert sum(hit.score == 0.5 for hit in hits) >= 6
    # Two of the first ones, of those with equal scores, and of the last ones.
    for hit in [*hits[2:4], *[hit for hit in hits if hit.id.startswith("same")][1:3], *hits[-2:]]:
        found = explain_in_index(client, index, TIES, hit.id, size=3, engine=Engine())
        assert (found.rank, bits(found.score), found.terms) == (hit.rank, bits(hit.score), hit.terms)
        assert found.reason == (None if hit.rank <= 3 else "low score")
        assert (found.matching, bits(found.last_score)) == (len(hits), bits(hits[2].score))
        assert found.equal == sum(bits(other.score) == bits(hit.score) for other in hits) - 1


def test_a_filter_changes_the_rank_and_a_window_hides_the_order_of_equal_scores(client: Client, index: str) -> None:
    wanted = {"ids": {"values": [f"same-{number}" for number in range(6)]}}
    ranked = [hit.id for hit in search_index(client, index, TIES, size=10, filter=wanted)]
    options = {"size": 2, "engine": Engine(), "filter": wanted}
    found = [explain_in_index(client, index, TIES, doc_id, **options) for doc_id in ranked]
    assert [(one.rank, one.matching, one.equal) for one in found] == [(rank, 6, 5) for rank in range(1, 7)]
    last = explain_in_index(client, index, TIES, ranked[-1], **options, window=3)
    assert (last.rank, last.reason) == (1, "low score")


@pytest.mark.opensearch_only
def test_two_phase_ranks_its_hits_and_names_what_it_misses(client: Client, index: str) -> None:
    engine = Engine("two-phase", two_phase={"prune_type": "max_ratio", "prune_ratio": 0.9})
    weights = {"word3": 1.0, "word7": 0.5}
    light = [hit for hit in search_index(client, index, {"word7": 1.0}, size=1000) if len(hit.terms) == 1]
    heavy = {hit.id for hit in search_index(client, index, {"word3": 1.0}, size=1000)}
    only_light = next(hit.id for hit in light if hit.id not in heavy)
    found = explain_in_index(client, index, weights, only_light, size=1000, engine=engine)
    assert (found.reason, found.rank) == ("missed", None)
    best = search_index(client, index, weights, size=1, engine=engine)[0]
    assert explain_in_index(client, index, weights, best.id, size=1, engine=engine).rank == 1


@pytest.mark.parametrize(
    ("vocabulary", "readable"),
    [
        (["[CLS]", "bread", "##ing", "##s", "##"], ["[CLS]", "bread", "…ing", "…s", "##"]),
        (["<s>", "Ġbread", "Ġthe", "ing", "Ã©", "ï", "Ġ"], ["<s>", "bread", "the", "…ing", "…é", "…\\xef", "Ġ"]),
        (["</s>", "▁bread", "▁de", "ing"], ["</s>", "bread", "de", "…ing"]),
        (["bread", "ing"], ["bread", "ing"]),
    ],
)  # fmt: skip
def test_tokens_are_readable(vocabulary: list[str], readable: list[str]) -> None:
    assert list(map(readable_by([None, *vocabulary]), vocabulary)) == readable
