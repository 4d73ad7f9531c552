"""A running `sparse-ingest serve`, and requests to it over a socket."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlencode

from support.deadlines import HANGING_S, until
from support.forked import start
from support.servers import environment, random_free_port


class Answer(NamedTuple):
    """Status, headers with lower-case names, and the body, parsed if it is JSON."""

    status: int
    headers: dict[str, str]
    body: Any

    @property
    def message(self) -> str:
        """The message of an error."""
        assert set(self.body) == {"error"}, self.body
        assert set(self.body["error"]) == {"type", "message"}
        return str(self.body["error"]["message"])


class Served(NamedTuple):
    """A service that runs in a process."""

    process: BaseProcess
    port: int
    log_path: Path

    def ask(
        self, method: str, path: str, body: object = None, headers: dict[str, str] | None = None, **keys: object
    ) -> Answer:
        """Send one request. `body` is sent as JSON unless it is bytes; `keys` are added to the address."""
        content = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        address = path + (f"?{urlencode(keys)}" if keys else "")
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", self.port, timeout=HANGING_S)) as connection:
            connection.request(method, address, content, headers or {})
            answer = connection.getresponse()
            named = {name.lower(): value for name, value in answer.getheaders()}
            found = answer.read()
        is_json = named.get("content-type") == "application/json" and found
        return Answer(answer.status, named, json.loads(found) if is_json else found)

    def get(self, path: str, **keys: object) -> Any:
        """Return the JSON of a request that succeeds."""
        answer = self.ask("GET", path, **keys)
        assert answer.status == 200, answer.body
        return answer.body

    def post(self, path: str, **keys: object) -> Any:
        """Return the JSON of a request that succeeds."""
        answer = self.ask("POST", path, keys)
        assert answer.status == 200, answer.body
        return answer.body

    def log(self) -> str:
        """Return what the process has written to standard error."""
        return self.log_path.read_text()

    def stop(self, number: int = signal.SIGTERM) -> int | None:
        """Send a signal, and return the exit code."""
        self.send_signal(number)
        return self.wait()

    def send_signal(self, number: int) -> None:
        """Send a signal."""
        os.kill(self.process.pid or 0, number)

    def wait(self) -> int | None:
        """Return the exit code of the process when it has ended."""
        self.process.join(HANGING_S)
        return self.process.exitcode


@contextmanager
def served(*arguments: object, **variables: str) -> Iterator[Served]:
    """Start `sparse-ingest serve`, wait until it answers, and stop it after the block."""
    port = random_free_port()
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        with environment(**variables):
            service = Served(start("serve", *arguments, "--port", port, log=log), port, log)
        try:
            until(lambda: _answers(service), service.log)
            yield service
        finally:
            service.process.terminate()
            service.wait()


def _answers(service: Served) -> bool:
    assert service.process.is_alive(), service.log()
    try:
        return service.ask("GET", "/healthz").status == 200
    except OSError:
        return False
