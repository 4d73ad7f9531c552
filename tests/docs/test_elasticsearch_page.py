"""The commands of guides/elasticsearch.md that move a run between clusters."""

from __future__ import annotations

import json
import re
import shlex
from collections import defaultdict
from contextlib import closing
from pathlib import Path

import pytest
from support.forked import command
from support.runs import make_run
from support.tables import TOKENS, write_table

from sparse_ingest.cluster.client import Connection, connect

pytestmark = [pytest.mark.elasticsearch_only, pytest.mark.slow]

PAGE = Path(__file__).parents[2] / "docs" / "guides" / "elasticsearch.md"
QUERIES = {"1": "catch", "2": "an exception", "3": "a river", "4": "catch an exception in a river"}


def by_score(trec_run: Path) -> dict[tuple[str, str], set[str]]:
    """Return the documents of each query with the same printed score, since ties may have any order."""
    found = defaultdict(set)
    for line in trec_run.read_text().splitlines():
        query_id, _, doc_id, _, score, _ = line.split()
        found[query_id, score].add(doc_id)
    return dict(found)


def test_a_run_in_both_clusters_has_the_same_rankings(
    cluster_url: str, opensearch_url: str, index_name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    documents = {f"d{number}": {"river": number / 7, "catch": 3 / number, "except": 0.3 + number % 5, "##ion": 0.123}
                 for number in range(1, 60)}  # fmt: skip
    make_run(tmp_path / "RUN", documents, model=str(write_table(tmp_path / "model")), vocabulary=TOKENS)
    (tmp_path / "COLLECTION" / "qrels").mkdir(parents=True)
    lines = [json.dumps({"_id": query_id, "text": text}) for query_id, text in QUERIES.items()]
    (tmp_path / "COLLECTION" / "queries.jsonl").write_text("\n".join(lines))
    qrels = "".join(f"{query_id}\td{number}\t1\n" for query_id in QUERIES for number in (3, 5))
    (tmp_path / "COLLECTION" / "qrels" / "test.tsv").write_text(f"query-id\tcorpus-id\tscore\n{qrels}")
    [code] = re.findall(r"## Moving between clusters.*?```console\n(.*?)```", PAGE.read_text(), re.DOTALL)
    code = code.replace("http://opensearch:9200", opensearch_url).replace("http://elasticsearch:9200", cluster_url)
    commands = [shlex.split(line)[1:] for line in code.replace(" articles ", f" {index_name} ").splitlines()]
    assert [words[0] for words in commands] == ["load", "load", "evaluate", "evaluate"]
    try:
        for words in commands:
            answer = command(*words)
            assert answer.code == 0, answer.err
        answer = command(*commands[-1], "--trec-run", "elasticsearch.trec", "--json")
        assert {one["difference"] for one in json.loads(answer.out)["comparison"]} == {0}
        assert by_score(tmp_path / "elasticsearch.trec") == by_score(tmp_path / "opensearch.trec")
    finally:
        with closing(connect(Connection(opensearch_url))) as client:
            client.call("DELETE", f"/{index_name}")
