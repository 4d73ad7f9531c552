"""A model hub on loopback that serves local folders with the endpoints of huggingface_hub, over real HTTP.

Files of a revision are listed with their hashes. Weights are redirected to a second host name, as on the real hub.
Private models need the token; gated ones list their files to everyone and serve them only with the token. `cut` names
files whose first response is truncated, `broken` those that the storage cannot read. Every request is recorded.

Not covered: chunked storage (xet), paged listings, rate limits.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit

from support.serving import serving

TOKEN = "hf_aSecretThatNobodyMayPrint"
ASKED = re.compile(r"/(?P<kind>datasets/)?(?P<name>[\w.-]+/[\w.-]+)/resolve/(?P<revision>[^/]+)/(?P<file>.+)")
LISTED = re.compile(
    r"/api/(?P<kind>models|datasets)/(?P<name>[\w.-]+/[\w.-]+)"
    r"(?:/(?P<what>revision|tree|paths-info)/(?P<revision>[^/?]+)(?:/(?P<file>.*))?)?"
)


class Request(NamedTuple):
    """A request with its token and its first byte."""

    method: str
    path: str
    host: str
    token: str
    range: str


@dataclass
class Model:
    """A repository: `revisions` maps commits to folders, `branches` maps names to commits."""

    revisions: dict[str, Path]
    branches: dict[str, str]
    private: bool = False
    gated: bool = False


@dataclass
class Hub:
    """Hub address, repositories, and recorded requests."""

    url: str = ""
    models: dict[str, Model] = field(default_factory=dict)
    datasets: dict[str, Model] = field(default_factory=dict)
    requests: list[Request] = field(default_factory=list)
    cut: set[str] = field(default_factory=set)
    broken: set[str] = field(default_factory=set)

    def add(self, name: str, folder: Path, *, dataset: bool = False, **kind: bool) -> str:
        """Publish a folder as the newest revision of a model or dataset; return its commit."""
        commit = hashlib.sha1(f"{name} {folder}".encode()).hexdigest()
        model = (self.datasets if dataset else self.models).setdefault(name, Model({}, {}))
        model.revisions[commit] = folder
        model.branches["main"] = commit
        for key, value in kind.items():
            setattr(model, key, value)
        return commit

    def downloads(self) -> list[str]:
        """Return the names of downloaded files; redirects do not count."""
        sent = [one.path for one in self.requests if one.method == "GET" and "/resolve/" in one.path]
        sent = [path for path in sent if not path.endswith(".safetensors") and not path.endswith(".bin")]
        stored = [one.path for one in self.requests if one.method == "GET" and one.path.startswith("/storage/")]
        return sorted(path.rpartition("/")[2] for path in sent + stored)


class Ended(NamedTuple):
    """Exit code and output of a program."""

    code: int
    out: str
    err: str


@contextmanager
def loopback_hub() -> Iterator[Hub]:
    hub = Hub()

    class Handler(_Handler):
        shared = hub

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    with serving(server):
        yield hub


def begin(
    program: str, *arguments: str, endpoint: str, home: Path, stderr: int = subprocess.PIPE, **variables: str
) -> subprocess.Popen[str]:
    """Start a Python program that can reach only this hub.

    A new process, because huggingface_hub reads its environment when it is imported.
    """
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    proxies = {name: "" for name in kept if name.lower() in ("http_proxy", "https_proxy", "all_proxy")}
    return subprocess.Popen(
        [sys.executable, "-c", program, *arguments],
        env={**kept, **proxies, "HF_ENDPOINT": endpoint, "HF_HOME": str(home), **variables},
        cwd=home.parent, stdout=subprocess.PIPE, stderr=stderr, text=True,
    )  # fmt: skip


def ended(process: subprocess.Popen[str], timeout_s: float = 120) -> Ended:
    """Wait for a program, and check that its output does not contain the token."""
    out, err = process.communicate(timeout=timeout_s)
    assert TOKEN not in out + (err or "")
    return Ended(process.returncode, out, err or "")


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    shared: Hub

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        token = self.headers.get("authorization", "").removeprefix("Bearer ")
        host = self.headers.get("host", "").partition(":")[0]
        self.shared.requests.append(Request(self.command, path, host, token, self.headers.get("range", "")))
        if path.startswith("/storage/"):
            self._stored(path)
        elif token and token != TOKEN:
            self._refuse(401, message="Invalid credentials in Authorization header")
        elif found := LISTED.fullmatch(path) or ASKED.fullmatch(path):
            self._of_model(token, **{key: value for key, value in found.groupdict().items() if value})
        else:
            self._refuse(404)

    do_HEAD = do_POST = do_GET  # noqa: N815

    def _of_model(
        self, token: str, name: str, kind: str = "", revision: str = "main", what: str = "", file: str = ""
    ) -> None:
        if not (what or file):
            what = "revision"
        model = (self.shared.datasets if kind.startswith("datasets") else self.shared.models).get(name)
        if model is None or (model.private and not token):
            return self._refuse(404 if token else 401, "RepoNotFound")
        commit = model.branches.get(revision, revision)
        if commit not in model.revisions:
            return self._refuse(404, "RevisionNotFound")
        folder = model.revisions[commit]
        if what == "revision":
            names = [path for path, _ in _files(folder)]
            content = {"id": name, "sha": commit, "siblings": [{"rfilename": path} for path in names]}
            return self._send(json.dumps(content).encode())
        if what == "tree":
            recursive = "recursive=true" in self.path.lower()
            return self._send(json.dumps(_entries(folder, file, recursive=recursive)).encode())
        if what == "paths-info":
            asked = parse_qs(self.rfile.read(int(self.headers.get("content-length", "0"))).decode()).get("paths", [])
            return self._send(json.dumps([one for one in _entries(folder, "", True) if one["path"] in asked]).encode())
        if model.gated and not token:
            return self._refuse(401, "GatedRepo", f"Access to {name} is restricted.")
        if not (folder / file).is_file():
            return self._refuse(404, "EntryNotFound")
        return self._file(folder / file, commit)

    def _file(self, path: Path, commit: str) -> None:
        content = path.read_bytes()
        headers = {"X-Repo-Commit": commit, "ETag": f'"{_oid(content)}"'}
        if _is_large(path):
            sha = hashlib.sha256(content).hexdigest()
            # The storage is another host, which must not get the token.
            storage = f"http://localhost:{self.server.server_address[1]}/storage/{sha}{path}"  # type: ignore[index]
            linked = {"X-Linked-Etag": f'"{sha}"', "X-Linked-Size": str(len(content)), "Location": storage}
            self._send(b"", 302, {**headers, **linked})
        else:
            self._ranged(content, headers, path.name)

    def _stored(self, path: str) -> None:
        file = Path("/" + path.removeprefix("/storage/").partition("/")[2])
        if file.name in self.shared.broken:
            return self._refuse(500)
        self._ranged(file.read_bytes(), {}, file.name)

    def _ranged(self, content: bytes, headers: dict[str, str], name: str) -> None:
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("range", ""))
        if not wanted:
            return self._send(content, 200, headers, name)
        first, last = int(wanted[1]), min(int(wanted[2] or len(content)), len(content) - 1)
        said = {**headers, "Content-Range": f"bytes {first}-{last}/{len(content)}"}
        self._send(content[first : last + 1], 206, said)

    def _refuse(self, status: int, code: str = "", message: str = "") -> None:
        headers = {"X-Error-Code": code, "X-Error-Message": message}
        self._send(b"{}", status, {name: value for name, value in headers.items() if value})

    def _send(self, body: bytes, status: int = 200, headers: dict[str, str] | None = None, name: str = "") -> None:
        self.send_response(status)
        for key, value in {"Content-Length": str(len(body)), "Accept-Ranges": "bytes", **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if name in self.shared.cut:
            self.shared.cut.remove(name)
            self.wfile.write(body[: len(body) // 2])
            self.close_connection = True
        else:
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


def _files(folder: Path) -> list[tuple[str, Path]]:
    return sorted((path.relative_to(folder).as_posix(), path) for path in folder.rglob("*") if path.is_file())


def _entries(folder: Path, under: str, recursive: bool) -> list[dict[str, object]]:
    """Return the entries of a folder listing; a missing folder has none."""
    start = folder / under
    found = sorted(start.rglob("*") if recursive else start.glob("*"))
    return [
        _entry(path.relative_to(folder).as_posix(), path)
        if path.is_file()
        else {"type": "directory", "path": path.relative_to(folder).as_posix(), "oid": _oid(b""), "size": 0}
        for path in found
    ]


def _entry(name: str, path: Path) -> dict[str, object]:
    content = path.read_bytes()
    entry: dict[str, object] = {"type": "file", "path": name, "size": len(content), "oid": _oid(content)}
    if _is_large(path):
        sha = hashlib.sha256(content).hexdigest()
        entry["lfs"] = {"oid": sha, "size": len(content), "pointerSize": 134}
    return entry


def _is_large(path: Path) -> bool:
    return path.suffix in (".safetensors", ".bin", ".parquet")


def _oid(content: bytes) -> str:
    """Return the git object id of the content."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
