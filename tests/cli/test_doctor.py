"""`doctor`: its findings on this machine and of a real server, what it hides, and checks that fail."""

from __future__ import annotations

import json
import os
import tomllib
from importlib.metadata import version
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
from support.forked import command
from support.secure_proxy import Refusal, Request, secure_proxy

from sparse_ingest.cli import installation
from sparse_ingest.cluster.connection import Connection
from sparse_ingest.cluster.diagnosis import check_cluster
from sparse_ingest.models.linear import has_avx2, has_avx512, has_vnni
from sparse_ingest.reporting import Check

PASSWORD, USER = "s3cret/pw", "alice@example"
NO_RIGHT = "indices:admin/create"


def findings(*arguments: str) -> tuple[int, dict[str, dict[str, Any]], str]:
    """Exit code, findings by name, and everything that was printed."""
    code, out, err = command("doctor", "--json", *arguments)
    return code, {one["name"]: one for one in json.loads(out)["checks"]}, out + err


@pytest.fixture
def quick(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Packages that cannot be imported, which takes no time."""
    install(
        {"torch": "raise OSError('libcudart.so: cannot open')", "nanotoken": "raise ImportError('no wheel')"},
        tmp_path,
        monkeypatch,
    )


def install(packages: dict[str, str], folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Put packages before those that are installed, for processes that start now."""
    for name, code in packages.items():
        (folder / name).mkdir()
        (folder / name / "__init__.py").write_text(code)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")]))


def test_everything_here_is_found(opensearch_url: str) -> None:
    code, found, out = findings("--url", opensearch_url)
    assert code == 0, out
    assert found["base"]["state"] == "ok" and f"numpy {version('numpy')}" in found["base"]["found"]
    assert found["torch"]["found"].startswith(f"{version('torch').partition('+')[0]}")
    assert found["tokenizer"]["state"] == "ok"
    assert {found[f"{dtype} kernel"]["state"] for dtype in ("int8", "bfloat16")} <= {"ok", "missing"}
    every = {"int8 linear layers", "int16 kernel", "int16 linear layers", "bfloat16 attention", "float32 attention"}
    assert all(found[name]["state"] == "ok" for name in every & found.keys())
    assert ("int8 linear layers" in found) == has_vnni()
    assert ("int16 kernel" in found) == ("int16 linear layers" in found) == (has_avx2() and not has_avx512())
    assert found["server"]["found"] == f"OpenSearch 3.6.0 at {opensearch_url}"
    assert found["opensearch-neural-search"]["state"] == "ok"
    assert found["disk"]["found"].startswith("node ")
    assert (found["rights"]["state"], found["rights"]["found"][:17]) == ("unknown", "cannot be checked")


@pytest.mark.usefixtures("quick")
def test_a_server_that_was_given_must_answer_and_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SPARSE_INGEST_URL", raising=False)
    code, found, _ = findings("--url", "http://127.0.0.1:1")
    assert (code, found["server"]["state"]) == (1, "problem")
    assert "connection refused" in found["server"]["found"]
    monkeypatch.setenv("SPARSE_INGEST_URL", "http://127.0.0.1:1")
    assert findings()[1]["server"]["state"] == "problem"


@pytest.mark.parametrize("columns", [80, 120])
@pytest.mark.usefixtures("quick")
def test_the_text_fits_and_says_what_to_do(columns: int, opensearch_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    code, out, _ = command("doctor", "--url", opensearch_url)
    assert code == 1
    assert [line for line in out.splitlines() if len(line) > columns] == []
    words = " ".join(out.split())
    assert "problem torch cannot be imported (OSError: libcudart.so: cannot open) Reinstall torch" in words
    assert out.endswith("Broken: torch, tokenizer.\n")


@pytest.mark.usefixtures("quick")
def test_no_user_password_or_token_is_printed(opensearch_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    token = "hf_abcdefghijklmnopqrstuvwxyz"
    monkeypatch.setenv("HF_TOKEN", token)
    monkeypatch.setenv("HTTPS_PROXY", f"http://{USER.partition('@')[0]}:{token}@127.0.0.1:1")

    def check(request: Request) -> Refusal | None:
        reason = f"no permissions for User [name={USER}, password={PASSWORD}]"
        return (403, {"error": {"type": "security_exception", "reason": reason}}) if "_c" in request.path else None

    with secure_proxy(opensearch_url, users={USER: PASSWORD}, check=check) as proxy:
        quoted = proxy.url.replace("://", "://alice%40example:s3cret%2Fpw@")
        given = {"--url": proxy.url, "--user": USER, "--password": PASSWORD}
        right = findings("--url", quoted)
        wrong = findings(*(part for pair in (given | {"--password": "wr0ng"}).items() for part in pair))
        env = {"SPARSE_INGEST_URL": proxy.url, "SPARSE_INGEST_USER": USER, "SPARSE_INGEST_PASSWORD": PASSWORD}
        for name, value in env.items():
            monkeypatch.setenv(name, value)
        by_variables = findings()
    assert right[1]["server"]["state"] == by_variables[1]["server"]["state"] == "ok"
    assert right[1]["health"]["found"] == "cannot be checked: the server answers 403 security_exception"
    assert wrong[0] == 1 and "401" in wrong[1]["server"]["found"]
    assert right[1]["token"]["found"] == "set"
    for _, _, printed in (right, wrong, by_variables):
        for secret in (PASSWORD, USER, "alice", "s3cret", "wr0ng", token, str(Path.home()) + "/"):
            assert secret not in printed


def as_security_plugin(lacking: dict[str, list[str]], *, asks: bool = True) -> Any:
    """Answers of the security plugin, which the tests' server lacks; `lacking` are rights by method and end of a path.

    In the form of https://docs.opensearch.org/latest/security/access-control/permissions/.
    """

    def check(request: Request) -> Refusal | None:
        if request.path.startswith("/_plugins/_security/authinfo"):
            return 200, {"user_name": USER, "roles": ["loader"]}
        if "perform_permission_check=true" not in request.path:
            return None
        if not asks:
            return 400, {"error": {"type": "illegal_argument_exception", "reason": "unrecognized parameter"}}
        found = lacking.get(f"{request.method} {request.path.partition('?')[0]}", [])
        return 200, {"accessAllowed": not found, "missingPrivileges": found}

    return check


@pytest.mark.parametrize(
    ("lacking", "asks", "index", "state", "words"),
    [
        ({}, True, "articles", "ok", "a load into 'articles' lacks no rights"),
        ({"PUT /articles": [NO_RIGHT]}, True, "articles", "missing", f"a load into 'articles' lacks {NO_RIGHT}"),
        ({}, True, None, "unknown", "not checked"),
        ({}, False, "articles", "unknown", "cannot be checked: perform_permission_check needs OpenSearch 3.2"),
    ],
)
def test_missing_rights_are_reported(lacking, asks, index, state, words, opensearch_url: str) -> None:
    with secure_proxy(opensearch_url, check=as_security_plugin(lacking, asks=asks)) as proxy:
        found = {one.name: one for one in check_cluster(Connection(proxy.url), index)}
    assert (found["rights"].state, found["rights"].found[: len(words)]) == (state, words)
    # A server that does not know the question is asked nothing else: it would carry the request out.
    assert asks or {method for method, _ in proxy.asked} == {"GET"}


@pytest.mark.parametrize(
    ("settings", "state", "words"),
    [
        ({"watermark.low": "0%", "watermark.high": "99.99%"}, "problem", "above the low watermark (0%)"),
        ({"watermark.flood_stage": "9000tb"}, "problem", "above the flood_stage watermark (9000tb)"),
        ({"watermark.low": "99.99%", "watermark.high": "1b"}, "ok", "watermarks: low 99.99%, high 1b"),
        ({"watermark.low": "0%", "threshold_enabled": "false"}, "ok", "the watermarks are off"),
    ],
)
def test_disks_are_compared_with_the_watermarks(settings, state: str, words: str, opensearch_url: str) -> None:
    named = {f"cluster.routing.allocation.disk.{name}": value for name, value in settings.items()}

    def change(request: Request, answer: bytes) -> bytes:
        return json.dumps({"defaults": named}).encode() if request.path.startswith("/_cluster/settings") else answer

    with secure_proxy(opensearch_url, change=change) as proxy:
        (disk,) = (one for one in check_cluster(Connection(proxy.url)) if one.name == "disk")
    assert disk.state == state and words in disk.found


def test_a_plugin_is_needed_on_every_node(opensearch_url: str) -> None:
    def change(request: Request, answer: bytes) -> bytes:
        if not request.path.startswith("/_nodes/plugins"):
            return answer
        assert "nodes.*.name" in unquote(request.path)  # a node without plugins must not be left out
        return json.dumps({"nodes": {"a": {"plugins": [{"name": "opensearch-knn"}]}, "b": {"name": "b"}}}).encode()

    with secure_proxy(opensearch_url, change=change) as proxy:
        found = {one.name: one for one in check_cluster(Connection(proxy.url))}
    assert (found["opensearch-knn"].state, found["opensearch-knn"].found) == ("missing", "installed on 1 of 2 nodes")


def test_answers_that_are_malformed_end_no_other_check(opensearch_url: str) -> None:
    def change(request: Request, answer: bytes) -> bytes:
        return answer if request.path == "/" else b'{"status": "red", "nodes": {"a": 1}}'

    with secure_proxy(opensearch_url, change=change) as proxy:
        found = check_cluster(Connection(proxy.url))
    assert found[0].state == "ok"
    assert {one.state for one in found[1:]} == {"unknown"}
    assert [one.name for one in found[1:]] == ["plugins", "health", "disks", "rights"]


@pytest.mark.parametrize(
    ("code", "words"), [("import os; os.kill(os.getpid(), 4)", "signal 4"), ("raise SystemExit(3)", "exit code 3")]
)
def test_a_torch_that_ends_the_process_is_a_problem(
    code: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install({"torch": code}, tmp_path, monkeypatch)
    (found,) = installation.trial()
    assert (found.name, found.state) == ("torch", "problem")
    assert words in found.found


def test_an_extra_has_a_purpose() -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    assert installation.PURPOSES.keys() == project["optional-dependencies"].keys()


@pytest.mark.parametrize(
    ("groups", "files", "expected"),
    [
        ("0::/a/b\n", {"a/cpu.max": "150000 100000", "a/b/memory.max": "4096", "memory.max": "max"}, (1.5, 4096)),
        ("0::/elsewhere\n", {"cpu.max": "max 100000", "memory.max": "2048"}, (None, 2048)),
        (
            "5:memory:/d\n4:cpu,cpuacct:/d\n",
            {
                "memory/d/memory.limit_in_bytes": "4096", "memory/memory.limit_in_bytes": "9223372036854771712",
                "cpu,cpuacct/d/cpu.cfs_quota_us": "50000", "cpu,cpuacct/d/cpu.cfs_period_us": "100000",
                "cpu,cpuacct/cpu.cfs_quota_us": "-1", "cpu,cpuacct/cpu.cfs_period_us": "100000",
            },
            (0.5, 4096),
        ),
        ("", {}, (None, None)),
    ],
)  # fmt: skip
def test_limits_of_control_groups(groups: str, files: dict[str, str], expected: object, tmp_path: Path) -> None:
    (tmp_path / "groups").write_text(groups)
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"{content}\n")
    assert installation.control_group_limits(tmp_path, tmp_path / "groups") == expected


def test_this_machine_has_cores_and_memory() -> None:
    found = {one.name: one for one in installation.machine()}
    assert all(isinstance(one, Check) and one.state == "ok" for one in found.values())
    assert found["cores"].found.startswith(f"{len(os.sched_getaffinity(0))} of ")
