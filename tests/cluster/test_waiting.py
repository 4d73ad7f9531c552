"""Waits for a missing response are reported and end on a stop request; other requests finish."""

from __future__ import annotations

import threading
import time

import pytest
from support.deadlines import HANGING_S, until
from support.reporters import Recorder

from sparse_ingest.cluster import waiting
from sparse_ingest.cluster.waiting import Waiting
from sparse_ingest.errors import Interrupted


class Stopped(Recorder):
    def stop_requested(self) -> bool:
        return True


@pytest.fixture
def hung():
    ended = threading.Event()
    yield lambda: ended.wait(HANGING_S)
    ended.set()


def test_a_missing_response_is_reported_and_a_stop_request_ends_the_wait(hung, monkeypatch: pytest.MonkeyPatch) -> None:
    assert waiting._SLOW_S == 4
    monkeypatch.setattr(waiting, "_SLOW_S", 0.2)
    with pytest.raises(Interrupted, match="cluster has not answered POST /x/_bulk"):
        Waiting("cluster", Stopped()).answer("POST /x/_bulk", hung)


def test_the_wait_is_reported_repeatedly_and_ends_after_the_timeout(hung, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waiting, "SAY_S", 0.1)
    recorder = Recorder()
    answer = Waiting("cluster", recorder).answer("GET /x", lambda: until(lambda: len(recorder.notes) >= 2))
    assert answer and recorder.notes[0].startswith("cluster has not answered GET /x for ")
    with pytest.raises(TimeoutError):
        Waiting("cluster", recorder).answer("GET /x", hung, timeout_s=0.1)


def test_a_stop_request_lets_a_quick_request_finish() -> None:
    assert Waiting("cluster", Stopped()).answer("GET /", lambda: time.sleep(0.3) or "here") == "here"


def test_errors_of_the_request_are_raised() -> None:
    def fail() -> None:
        raise TimeoutError("of the request's own")

    with pytest.raises(TimeoutError, match="own"):
        Waiting("cluster", Recorder()).answer("GET /", fail)


def test_causes_that_differ_only_in_numbers_are_reported_once(monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = Recorder()
    one = Waiting("cluster", recorder)
    for queue in range(5):
        one.say(f"429 rejected, queue = {queue}, pool@5ab3c{queue}", f"429, queue = {queue}")
    one.say("503", "unavailable")
    monkeypatch.setattr(waiting, "SAY_S", 0.0)
    one.say("429 rejected, queue = 9, pool@5ab3c9", "429, queue = 9")
    assert recorder.notes == ["429, queue = 0", "unavailable", "429, queue = 9 (4 more since the last such line)"]
