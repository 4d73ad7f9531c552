"""Malformed responses: wrong types, missing keys and deep nesting never end in a traceback."""

from __future__ import annotations

import copy
import json
import os
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.loads import MANY
from support.runs import make_run
from support.secure_proxy import SecureProxy, secure_proxy
from support.tables import write_table

from sparse_ingest.cluster import index_admin
from sparse_ingest.cluster.client import Client, Connection, UnreachableError
from sparse_ingest.cluster.sending import Retries
from sparse_ingest.errors import SparseIngestError
from sparse_ingest.evaluation.evaluate import evaluate
from sparse_ingest.loading.load import load
from sparse_ingest.runs.run import Run
from sparse_ingest.searching.search import open_index
from sparse_ingest.verification.verify import verify

FAST = Retries(attempts=2, base_s=0.001, cap_s=0.001)
# Mutations per command (two thirds for SLOW ones). Set SPARSE_INGEST_MUTATIONS for a longer run.
MUTATIONS = int(os.environ.get("SPARSE_INGEST_MUTATIONS", "15"))
SLOW = ("load", "merge", "create")
DEEP = json.loads("[" * 400 + "]" * 400)
DROPPED = object()
VALUES: tuple[object, ...] = (DROPPED, None, [], {}, "x", 7, [None], DEEP)
Location = tuple[str | int, ...]


def locations(value: Any, before: Location = ()) -> Iterator[Location]:
    """Yield the path of each value in a JSON value; of a list, only those of its first two items."""
    yield before
    # Malformed stamps are tested in test_stamps.py.
    inner: Any = value.items() if isinstance(value, dict) else enumerate(value[:2]) if isinstance(value, list) else ()
    for key, one in inner if before[-1:] != ("_meta",) else ():
        yield from locations(one, (*before, key))


def mutated(value: Any, location: Location, new: object) -> Any:
    """Return a copy of a JSON value with the value at `location` replaced or dropped."""
    if not location:
        return None if new is DROPPED else new
    value = copy.deepcopy(value)
    container = value
    for key in location[:-1]:
        container = container[key]
    if new is DROPPED:
        del container[location[-1]]
    else:
        container[location[-1]] = new
    return value


class Mutator:
    """Changes response number `number`, and records all responses in `answers`."""

    def __init__(self) -> None:
        self.begin()

    def begin(self, number: int = -1, location: Location = (), new: object = None) -> None:
        self.answers: list[Any] = []
        self._number, self._way, self._new = number, location, new

    def __call__(self, request: object, content: bytes) -> bytes:
        value = json.loads(content)
        self.answers.append(value)
        if len(self.answers) - 1 != self._number:
            return content
        try:
            return json.dumps(mutated(value, self._way, self._new)).encode()
        except (LookupError, TypeError):  # this response differs from that of the first pass
            return content


@pytest.fixture(scope="module")
def mutator() -> Mutator:
    return Mutator()


@pytest.fixture(scope="module")
def proxy(opensearch_url: str, mutator: Mutator) -> Iterator[SecureProxy]:
    with secure_proxy(opensearch_url, change=mutator) as proxy:
        yield proxy


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("malformed")
    documents = {name: {"catch": weights["river"], "an": weights["stone"]} for name, weights in MANY.items()}
    (folder / "queries.tsv").write_text("q1\tcatch\nq2\tan catch\n")
    (folder / "qrels.tsv").write_text("q1 0 d1 1\nq2 0 d2 1\n")
    return make_run(folder / "run", documents, shard_rows=20, model=str(write_table(folder / "model")))


Command = Callable[[Run, str, Connection], object]


def _load(run: Run, index: str, connection: Connection, **settings: Any) -> object:
    shutil.rmtree(run.path / "load", ignore_errors=True)
    return load(run, index=index, connection=connection, retries=FAST, **settings)


def _create(run: Run, index: str, connection: Connection) -> object:
    shutil.rmtree(run.path / "load", ignore_errors=True)
    load(run, index=f"{index}-new", connection=connection, retries=FAST)
    return index_admin.drop_index(f"{index}-new", connection=connection)


def _search(run: Run, index: str, connection: Connection) -> object:
    with open_index(index, connection=connection) as opened:
        opened.search("catch")
        return opened.search("catch an", filter={"exists": {"field": "text"}})


def _rank(run: Run, index: str, connection: Connection) -> object:
    queries, qrels = (Path(run.path).parent / name for name in ("queries.tsv", "qrels.tsv"))
    with open_index(index, connection=connection) as opened:
        return evaluate(opened, queries=queries, qrels=qrels, bm25=True)


COMMANDS: dict[str, Command] = {
    "load": _load,
    "merge": lambda *given: _load(*given, merge=True),
    "create": _create,
    "verify": lambda run, index, connection: verify(run, index=index, connection=connection),
    "verify sample": lambda run, index, connection: verify(run, index=index, connection=connection, sample=5),
    "search": _search,
    "evaluate": _rank,
    "index show": lambda run, index, connection: index_admin.show_index(index, connection=connection),
}


# `merge` and `create` load too.
@pytest.mark.parametrize(
    "name", [pytest.param(one, marks=pytest.mark.slow) if one in ("merge", "create") else one for one in COMMANDS]
)
def test_a_malformed_response_is_one_message_that_names_the_address(
    name: str, client: Client, index_name: str, run: Run, proxy: SecureProxy, mutator: Mutator, hasty_merges: None
) -> None:
    connection, chosen = Connection(proxy.url, timeout_s=20), random.Random(name + os.environ.get("SEED", ""))
    _load(run, index_name, Connection(client.address))
    mutator.begin()
    COMMANDS[name](run, index_name, connection)
    answers, named = mutator.answers, 0
    for _ in range(2 * MUTATIONS // 3 if name in SLOW else MUTATIONS):
        number = chosen.randrange(len(answers))
        location, new = chosen.choice(list(locations(answers[number]))), chosen.choice(VALUES)
        mutator.begin(number, location, new)
        try:
            COMMANDS[name](run, index_name, connection)
        except SparseIngestError as error:
            named += proxy.url in str(error)
            assert proxy.url in str(error) or not isinstance(error, UnreachableError)
        except Exception as error:
            error.add_note(f"answer {number}: {str(answers[number])[:200]}: {location} is {str(new)[:20]}")
            raise
    assert named
