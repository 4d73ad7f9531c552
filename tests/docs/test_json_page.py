"""docs/reference/json-output.md has the keys that the commands print, and no others.

Sections of commands that take long are checked by tests that run them anyway: `encode`, `inspect`, `plan`,
`report`, `server`, `demo` and `evaluate --nano-beir`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import click
import pytest
from support.forked import command
from support.json_page import check, sections
from support.runs import make_run
from support.tables import TOKENS, write_table

from sparse_ingest.cli.main import cli
from sparse_ingest.cluster.client import Client
from sparse_ingest.runs.files import totals_of

TEXTS = ("catch", "an exception", "river catch")  # tokens that the weight table knows


class Made(NamedTuple):
    """A run without a model's vectors, and a folder of queries with judgments."""

    run: Path
    collection: Path


def printed(*arguments: object, code: int = 0) -> Any:
    """What a command prints with --json; of several lines, the first."""
    answer = command(*arguments, "--json")
    assert answer.code == code, answer.err
    return json.JSONDecoder().raw_decode(answer.out)[0]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    folder = tmp_path_factory.mktemp("json")
    documents = {str(place): dict.fromkeys(text.split(), 1 + place / 8) for place, text in enumerate(TEXTS)}
    run = make_run(folder / "run", documents, model=str(write_table(folder / "model")), vocabulary=TOKENS)
    (folder / "qrels").mkdir()
    queries = [json.dumps({"_id": f"q{place}", "text": text}) + "\n" for place, text in enumerate(TEXTS)]
    (folder / "queries.jsonl").write_text("".join(queries))
    judgments = [f"q{place}\t{place}\t1\n" for place in range(len(TEXTS))]
    (folder / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\n" + "".join(judgments))
    return Made(run.path, folder)


def commands(group: click.Group, before: str = "") -> dict[str, click.Command]:
    found: dict[str, click.Command] = {}
    for name, entry in group.commands.items():
        found |= commands(entry, f"{before}{name} ") if isinstance(entry, click.Group) else {before + name: entry}
    return found


def test_every_command_with_json_has_a_section() -> None:
    with_json = {name for name, entry in commands(cli).items() if any(one.name == "as_json" for one in entry.params)}
    assert {name.partition(" --")[0] for name in sections()} == with_json
    assert commands(cli).keys() - with_json == {"query", "help", "serve"}


def test_what_is_printed_of_corpora_and_runs(made: Made, tmp_path: Path) -> None:
    of = ("--pipeline", "demo", "--corpus", made.collection / "queries.jsonl")
    check("encode --dry-run", printed("encode", *of, "--dry-run"))
    check("idf", printed("idf", *of, "--out", tmp_path / "idf.json"))

    check("search --doc", printed("search", "--run", made.run, "catch", "--doc", "0"))
    check("search --queries", printed("search", "--run", made.run, "--queries", made.collection))
    check("show", printed("show", made.run, "0", "1"), printed("show", made.run, "0", "--query", "catch"))
    trec = tmp_path / "run.trec"
    evaluate = ("evaluate", "--run", made.run, "--queries", made.collection)
    plain = printed(*evaluate, "--trec-run", trec)
    trec.write_text("q0 Q0 2 1 1.0 t\n")
    check("evaluate", plain, printed(*evaluate, "--per-query", "--bm25", "--compare", trec))


def test_what_is_printed_of_indexes(made: Made, client: Client, index_name: str) -> None:
    on = ("--url", client.address)
    alias, index, empty = f"{index_name}-alias", f"{index_name}-one", f"{index_name}-empty"
    loaded = printed("load", made.run, "--index", index, *on)
    check("load", loaded, printed("load", made.run, "--alias", alias, *on))
    check("load --to", printed("load", "--alias", alias, "--to", index, *on))
    check("index list", *printed("index", "list", f"{index}*", *on))
    check("pipelines list", *printed("pipelines", "list"))
    check("load --restore", printed("load", "--index", index, "--restore", *on))
    state = printed("status", made.run)
    check("status", state, {**state, **totals_of([{"without_token": 1}])})
    search = ("search", "--index", index, "catch")
    check(
        "search",
        printed("search", "--run", made.run, "catch"),
        printed(*search, *on),
        printed(*search, "--hybrid", *on),
    )
    check("search --queries", printed("search", "--index", index, "--queries", made.collection, *on))
    check("index show", printed("index", "show", "--index", index, *on))
    check("index create", printed("index", "create", "--index", empty, *on))
    check("index drop", printed("index", "drop", "--index", empty, "--yes", *on))
    client.call("PUT", f"/{index}/_doc/1", {"sparse": {"stone": 1.0}}, params={"refresh": "true"})
    check("verify", printed("verify", made.run, "--index", index, "--all", *on, code=1))
