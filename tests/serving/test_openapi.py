"""/openapi.json is valid and describes every route: its examples work, and the answers have the described form."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlencode

import jsonschema
import pytest
from openapi_spec_validator import validate
from support.runs import make_run
from support.services import Served, served
from support.tables import TOKENS, write_table

from sparse_ingest.serving.operations import OPERATIONS


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("served")
    run = make_run(folder / "run", {"d1": {"catch": 1.0}}, model=str(write_table(folder / "model")), vocabulary=TOKENS)
    (folder / "queries.tsv").write_text("q1\tcatch\n")
    (folder / "qrels.tsv").write_text("q1 0 d1 1\n")
    with served("--run", run.path, "--queries", folder / "queries.tsv", "--qrels", folder / "qrels.tsv") as found:
        yield found


def schema_of(description: Any, media: Any) -> Any:
    """The schema of an answer, with the schemas that it refers to."""
    return {**media["schema"], "components": description["components"]}


def test_every_route_is_described_and_its_example_works(service: Served) -> None:
    description = service.get("/openapi.json")
    validate(description)
    assert description["openapi"].startswith("3.1")
    routes = {(one.path, method) for one in OPERATIONS for method in one.methods}
    described = {(path, method.upper()) for path, item in description["paths"].items() for method in item}
    assert described == routes | {("/", "GET"), ("/healthz", "GET"), ("/metrics", "GET")}
    for path, method in described:
        operation = description["paths"][path][method.lower()]
        body = operation.get("requestBody", {}).get("content", {}).get("application/json", {}).get("example")
        keys = {one["name"]: one["example"] for one in operation.get("parameters", ()) if one["required"]}
        answer = service.ask(method, path + (f"?{urlencode(keys)}" if keys else ""), body)
        # Documents are encoded only where the model can.
        status = 501 if path in ("/encode", "/highlights") else 200
        assert answer.status == status, (path, answer.body)
        [(kind, media)] = operation["responses"][str(status)]["content"].items()
        assert answer.headers["content-type"].startswith(kind)
        if kind == "application/json":
            jsonschema.validate(answer.body, schema_of(description, media))


def test_the_schema_of_a_body_refuses_what_the_service_refuses(service: Served) -> None:
    description = service.get("/openapi.json")
    schema = description["paths"]["/search"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    for body, status in (({"q": "catch"}, 200), ({"q": "catch", "k": 0}, 400), ({"q": "catch", "x": 1}, 400)):
        assert jsonschema.Draft202012Validator(schema).is_valid(body) == (status == 200)
        assert service.ask("POST", "/search", json.dumps(body).encode()).status == status
