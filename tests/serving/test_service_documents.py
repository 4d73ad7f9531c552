"""Documents that the service encodes, while it answers searches."""

from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from support.checkpoints import PACKAGED
from support.deadlines import HANGING_S, until
from support.services import Served, served

from sparse_ingest.searching.encoded import encode
from sparse_ingest.serving.work import THREADS

LONG = "a bread dough rises when yeast turns sugar into gas " * 60


def in_progress(service: Served) -> int:
    """Return how many requests the service has, without this one."""
    metrics = service.ask("GET", "/metrics").body.decode()
    [number] = re.findall(r"^sparse_ingest_requests_in_progress (\d+)", metrics, re.MULTILINE)
    return int(number) - 1


def test_searches_do_not_wait_for_documents_that_are_encoded(tmp_path: Path) -> None:
    run = encode([{"_id": "1", "text": "bread"}], tmp_path / "run", model=PACKAGED, dtype="float32")
    with served("--run", run.path, "--time-limit", HANGING_S) as service, ThreadPoolExecutor(THREADS + 1) as clients:
        [alone] = service.post("/encode", texts=[LONG])["vectors"]
        first = clients.submit(service.post, "/encode", texts=[LONG] * 24)
        assert until(lambda: in_progress(service) == 1)
        others = [clients.submit(service.post, "/encode", texts=["bread"]) for _ in range(THREADS)]
        assert until(lambda: in_progress(service) == 1 + THREADS)
        assert service.get("/search", q="bread")["hits"][0]["id"] == "1"
        assert not first.done()
        assert not any(one.done() for one in others)
        vectors = first.result()["vectors"]
        assert [list(vector) == list(alone) for vector in vectors] == [True] * 24
        assert {len(one.result()["vectors"]) for one in others} == {1}
