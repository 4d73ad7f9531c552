"""Loading and searching tests/runs/frozen_run sends the requests that the first edition sent, byte for byte.

frozen_load.json was recorded with the first edition and OpenSearch 3.6.0. For each case below it holds the requests
that change the index, every bulk request, the journal, the index after the load, and the search requests. When a test
fails, fix the code. Record the file again only for an intended change, and read its diff:

    PYTHONPATH=CHECKOUT:tests python tests/loading/test_frozen_load.py URL

CHECKOUT is the checkout to record, URL an OpenSearch with the neural-search plugin. This module imports nothing from
sparse_ingest and runs the command line, so that every release can be recorded.
"""

from __future__ import annotations

import json
import re
import secrets
import shutil
import sys
import tempfile
import urllib.request
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from support.forked import command
from support.secure_proxy import Request, secure_proxy

FROZEN = Path(__file__).with_name("frozen_load.json")
RUNS = Path(__file__).parents[1] / "runs"
QUERY = "How is bread baked in an oven?"
# Query weights come from a table: those of a masked LM differ slightly between CPUs.
IDF = {"bread": 4.75, "oven": 5.5, "baked": 2.0625, "how": 0.75, "in": 0.1, "is": 0.1, "an": 0.1}
# The --update cases start from an index that lacks this document, so that it is refused.
NOT_INDEXED = "owl"


class Case(NamedTuple):
    """A load, and the searches of its index.

    If `mappings` is set, the index exists before the load and holds the run's documents without vectors.
    """

    load: tuple[str, ...] = ()
    searches: tuple[tuple[str, ...], ...] = ()
    mappings: dict[str, Any] | None = None
    target: str = "--index"


CASES = {
    "plain": Case(searches=(("--engine", "exact"), ("--engine", "two-phase"))),
    "pruned": Case(("--top-k", "12", "--max-ratio", "0.3", "--alpha-mass", "0.9")),
    "sparse_vector": Case(("--kind", "sparse_vector"), searches=((),)),
    "vectors in _source": Case(("--set", "index.source=keep", "--field", "vector"), searches=((),)),
    "update": Case(("--update",), mappings={"_source": {"excludes": ["sparse"]}}),
    "update, vectors in _source": Case(("--update", "--top-k", "12"), mappings={}),
    "alias": Case(target="--alias"),
}


@pytest.mark.parametrize("name", CASES)
def test_load_and_search_send_what_the_first_edition_sent(
    name: str, opensearch_url: str, index_name: str, tmp_path: Path
) -> None:
    expected = json.loads(FROZEN.read_text())[name]
    found = record(CASES[name], opensearch_url, index_name, tmp_path)
    assert found == expected
    # 1 == 1.0 in Python, but they are different bytes.
    assert as_text(found) == as_text(expected)


def record(case: Case, url: str, name: str, folder: Path) -> dict[str, Any]:
    """Load the run into the index or alias `name` and search it, through a proxy that records the requests."""
    run = Path(shutil.copytree(RUNS / "frozen_run", folder / "run"))
    if case.mappings is not None:
        index_texts(url, name, case.mappings)
    sent: list[Request] = []
    with secure_proxy(url, check=sent.append) as proxy:
        loaded = command("load", run, case.target, name, *case.load, "--url", proxy.url)
        load_requests, sent[:] = list(sent), []
        for options in case.searches:
            query = ("--set", f"model.query={query_table(folder)}", "--force")
            searched = command("search", QUERY, "--index", name, "-k", 3, *query, *options, "--url", proxy.url)
            assert searched.code == 0, searched.err
    ((index, entry),) = call(url, f"/{name}").items()
    settings = entry["settings"]["index"]
    (journal,) = run.glob(f"load/*/{settings['uuid']}/journal.jsonl")
    changes = ("PUT /", "POST /_aliases")
    # Later releases claim a new alias first.
    load_requests = [one for one in load_requests if b'"is_hidden"' not in one.body]
    found = {
        "exit code": loaded.code,
        "changes": [shown(one) for one in load_requests if f"{one.method} {one.path}".startswith(changes)],
        # Several requests are in flight, so their order is not fixed.
        "bulk requests": sorted((shown(one) for one in load_requests if "/_bulk" in one.path), key=str),
        "journal": [re.sub(r'"seconds": [\d.]+', '"seconds": 0', line) for line in lines(journal)],
        "dead letters": [line.replace(settings["uuid"], "UUID") for line in lines(journal.with_name("dead.jsonl"))],
        "searches": [shown(one) for one in sent if "/_search" in one.path],
    }
    for random in ("uuid", "creation_date", "provided_name", "version"):
        del settings[random]
    found["index"] = {index: entry}
    return dict(json.loads(json.dumps(found).replace(name, "NAME")))


def shown(request: Request) -> dict[str, Any]:
    """Return a request as JSON: a bulk body as its exact lines, any other body parsed."""
    if "/_bulk" in request.path:
        body: Any = [line.decode() for line in request.body.splitlines(keepends=True)]
    else:
        body = json.loads(request.body or b"null")
    return {"request": f"{request.method} {request.path}", "body": body}


def as_text(found: dict[str, Any]) -> str:
    """Return JSON with sorted keys: OpenSearch returns the keys of `_meta` in no fixed order."""
    return json.dumps(found, ensure_ascii=False, indent=1, sort_keys=True) + "\n"


def lines(path: Path) -> list[str]:
    return path.read_bytes().decode().split("\n") if path.exists() else []


def index_texts(url: str, index: str, mappings: dict[str, Any]) -> None:
    """Create an index with the documents of the run, without vectors."""
    call(url, f"/{index}", "PUT", json.dumps({"mappings": mappings}))
    documents = json.loads((RUNS / "frozen_expected.json").read_text())["documents"]
    pairs = [
        ({"index": {"_id": doc_id}}, {"text": document["fields"]["text"]})
        for doc_id, document in documents.items()
        if doc_id != NOT_INDEXED
    ]
    body = "".join(json.dumps(line) + "\n" for pair in pairs for line in pair)
    assert not call(url, f"/{index}/_bulk?refresh=true", "POST", body)["errors"]


def query_table(folder: Path) -> Path:
    """Write an inference-free query model that has the tokenizer of the run's model."""
    table = folder / "table"
    table.mkdir(exist_ok=True)
    (table / "tokenizer.json").write_bytes((files("cognition") / "model" / "tokenizer.json").read_bytes())
    (table / "idf.json").write_text(json.dumps(IDF))
    return table


def call(url: str, path: str, method: str = "GET", body: str | None = None) -> Any:
    """Call OpenSearch directly, without the proxies of the environment."""
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(url + path, body.encode() if body else None, headers, method=method)
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=60) as answer:
        return json.load(answer)


def freeze(url: str) -> None:
    """Write frozen_load.json with the sparse_ingest that is first on the path."""
    found = {}
    for name, case in CASES.items():
        index = f"sparse-ingest-freeze-{secrets.token_hex(6)}"
        with tempfile.TemporaryDirectory() as folder:
            try:
                found[name] = record(case, url, index, Path(folder))
            finally:
                for concrete in call(url, f"/{index}*"):
                    call(url, f"/{concrete}", "DELETE")
    FROZEN.write_text(as_text(found))
    print(f"Recorded {sys.modules['sparse_ingest'].__file__} in {FROZEN}.", file=sys.stderr)


if __name__ == "__main__":
    freeze(sys.argv[1])
