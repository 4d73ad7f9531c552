"""Stores, web servers and hubs that stop responding: messages, timeouts, and signals that end the wait."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from threading import Event, Thread

import pytest
from support.deadlines import HANGING_S

from sparse_ingest.errors import StorageError, UsageError
from sparse_ingest.storage import waiting
from sparse_ingest.storage.places import RemotePath
from sparse_ingest.storage.waiting import TIMEOUT, call_with_timeout

# A line comes every second, and a stop request ends a wait immediately.
PROGRAM = (
    "from sparse_ingest.storage import waiting; waiting._LINE_EVERY_S, waiting._GRACE_S = 1.0, 0.0; "
    "from sparse_ingest.cli.main import main; main()"
)


def send_nothing(connection: socket.socket) -> None:
    pass


def drip(connection: socket.socket) -> None:
    """Send one byte of the headers or the body, repeatedly."""
    connection.recv(1 << 16)
    connection.send(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n")
    while True:
        connection.send(b" ")
        time.sleep(0.1)


def drip_headers(connection: socket.socket) -> None:
    connection.recv(1 << 16)
    connection.send(b"HTTP/1.1 200 OK\r\nX: ")
    while True:
        connection.send(b"x")
        time.sleep(0.1)


@contextmanager
def server_that_is(behavior: Callable[[socket.socket], None], connected: Event | None = None) -> Iterator[str]:
    connections = []

    def serve(connection: socket.socket) -> None:
        try:
            behavior(connection)
        except OSError:
            pass

    def accept() -> None:
        while True:
            try:
                connections.append(listener.accept()[0])
            except OSError:
                return
            Thread(target=serve, args=(connections[-1],), daemon=True).start()
            if connected:
                connected.set()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        Thread(target=accept, daemon=True).start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        listener.shutdown(socket.SHUT_RDWR)
    for connection in connections:
        connection.close()


def begin(*arguments: str, home: Path, timeout_s: float, **variables: str) -> subprocess.Popen[str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    env = {**kept, "HF_HOME": str(home), TIMEOUT: str(timeout_s), **variables}
    # A shell ignores SIGINT for background jobs, and a child inherits that.
    heed = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, *arguments], env=env, stderr=subprocess.PIPE, text=True, preexec_fn=heed
    )


@pytest.mark.parametrize("behavior", [send_nothing, drip, pytest.param(drip_headers, marks=pytest.mark.slow)])
def test_a_request_to_a_silent_web_server_times_out(
    behavior: Callable[[socket.socket], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(TIMEOUT, "0.6")  # printed without decimals
    with server_that_is(behavior) as url, pytest.raises(StorageError, match=f"No answer from {url}/x within 1 s"):
        RemotePath.at(f"{url}/x").read_bytes()


@pytest.mark.parametrize(
    "behavior", [send_nothing, *(pytest.param(one, marks=pytest.mark.slow) for one in (drip, drip_headers))]
)
def test_a_silent_hub_is_reported_and_times_out(behavior: Callable[[socket.socket], None], tmp_path: Path) -> None:
    assert (waiting._LINE_EVERY_S, waiting._GRACE_S) == (15, 10)
    with server_that_is(behavior) as url:
        started = begin("inspect", "made/card", home=tmp_path, timeout_s=2, HF_ENDPOINT=url)
        _, err = started.communicate(timeout=HANGING_S)
    *said, error = err.splitlines()
    assert said
    for line in said:
        line = line.replace(f"{url}, for the model made/card: ", "")
        assert re.fullmatch(rf"Waiting for the hub [12] of at most 2 s \({TIMEOUT}\)", line)
    assert error.startswith(f"Error: No answer from the hub {url}, for the model made/card within 2 s. Check")
    assert error.endswith("HF_HUB_OFFLINE=1 reads only the cache.") and started.returncode == 1


def test_a_silent_hub_times_out_for_a_dataset(tmp_path: Path) -> None:
    program = """if True:
        import os
        from sparse_ingest.corpora.options import CorpusOptions
        from sparse_ingest.errors import StorageError
        try:
            CorpusOptions().open("hf:made/rows")
        except StorageError as error:
            print(error, flush=True)
            os._exit(0)  # Python's exit would wait for the library
    """
    with server_that_is(send_nothing) as url:
        env = {**os.environ, "HF_HOME": str(tmp_path), TIMEOUT: "1", "HF_ENDPOINT": url}
        ran = subprocess.run([sys.executable, "-c", program], env=env, stdout=subprocess.PIPE, text=True, timeout=120)
    assert ran.stdout.startswith(f"No answer from the hub {url}, for the dataset made/rows within 1 s.")


@pytest.mark.parametrize("number", [pytest.param(signal.SIGINT, marks=pytest.mark.slow), signal.SIGTERM])
def test_a_signal_ends_a_wait(number: signal.Signals, tmp_path: Path) -> None:
    with server_that_is(send_nothing, connected := Event()) as url:
        arguments = (
            "encode",
            "--corpus",
            f"{url}/corpus.jsonl",
            "--model",
            "made/card",
            "--out",
            str(tmp_path / "run"),
        )
        started = begin(*arguments, home=tmp_path, timeout_s=6000, HF_ENDPOINT=url)
        assert connected.wait(HANGING_S)
        time.sleep(0.3)  # the command now waits for the answer
        started.send_signal(number)
        started.communicate(timeout=HANGING_S)
        assert started.returncode in (130, -number)


def test_received_bytes_restart_the_deadline_and_dripping_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(TIMEOUT, "0.6")
    began = time.monotonic()

    def slow() -> str:
        time.sleep(0.9)
        return "answer"

    assert call_with_timeout(slow, "here", received=lambda: int((time.monotonic() - began) * (4 << 20))) == "answer"
    with pytest.raises(StorageError, match="No answer from here within 1 s"):
        call_with_timeout(slow, "here", received=lambda: int((time.monotonic() - began) * 1000))
    assert call_with_timeout(slow, "here", bytes_sent=200_000) == "answer"


@pytest.mark.parametrize("value", ["0", "-1", "soon", "inf", "nan"])
def test_an_invalid_deadline_is_a_usage_error(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(TIMEOUT, value)
    with pytest.raises(UsageError, match=f"{TIMEOUT} is '{value}'; expected seconds"):
        call_with_timeout(lambda: 1, "here")
