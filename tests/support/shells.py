"""Run shell code whose `sparse-ingest` is this process, because a new process takes 5 s to import torch."""

from __future__ import annotations

import contextlib
import json
import os
import socketserver
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from support.forked import command


def shell(code: str, folder: Path, path: Path, url: str, server: socketserver.UnixStreamServer) -> str:
    """Run a shell block and return its stdout. `path` contains the `sparse-ingest` that calls `server`."""
    environment = {**os.environ, "PATH": f"{path}:{os.environ['PATH']}", "SPARSE_INGEST_URL": url}
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as notes:
        program = ["bash", "-euo", "pipefail", "-c", code]
        with subprocess.Popen(program, cwd=folder, env=environment, stdout=out, stderr=notes) as process:
            while process.poll() is None:
                server.handle_request()
        out.seek(0)
        notes.seek(0)
        assert process.returncode == 0, f"{code}\n{notes.read()}"
        return out.read()


@contextlib.contextmanager
def warm_command(folder: Path) -> Iterator[socketserver.UnixStreamServer]:
    """Write a `sparse-ingest` script to `folder` that calls this process."""
    address = folder / "socket"

    class Handler(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            answer = command(*json.loads(self.rfile.readline()))
            self.wfile.write(json.dumps(answer).encode())

    client = f"""#!{sys.executable} -IS
import json, socket, sys
with socket.socket(socket.AF_UNIX) as one:
    one.connect({str(address)!r})
    one.sendall(json.dumps(sys.argv[1:]).encode() + b"\\n")
    code, out, err = json.load(one.makefile())
sys.stdout.write(out)
sys.stderr.write(err)
sys.exit(code)
"""
    (folder / "sparse-ingest").write_text(client)
    (folder / "sparse-ingest").chmod(0o755)
    with socketserver.UnixStreamServer(str(address), Handler) as server:
        server.timeout = 0.05
        yield server
