"""Leases in an object store: one holder; expired ones are acquired by others, and a holder that slept notices."""

from __future__ import annotations

import json
import os
import time
from functools import partial

import pytest
from support.deadlines import until
from support.stores import FaultyStore

from sparse_ingest.errors import RunError
from sparse_ingest.runs import leases
from sparse_ingest.runs.leases import Leases
from sparse_ingest.storage.places import RemotePath


@pytest.fixture
def folder(bucket: str) -> RemotePath:
    return RemotePath.at(f"{bucket}/locks")


@pytest.fixture
def short_lease(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leases, "RENEWED_S", 0.1)
    monkeypatch.setattr(leases, "EXPIRES_S", 0.5)


def abandoned(folder: RemotePath, **holder: object) -> None:
    """Create the lease that a killed process leaves behind."""
    content = {"token": "t", "host": "another", "process": 1, "count": 3} | holder
    (folder / "one.lock").write_whole(json.dumps(content).encode())


def dead_process() -> int:
    if (number := os.fork()) == 0:
        os._exit(0)
    os.waitpid(number, 0)
    return number


def test_a_lease_has_one_holder_and_can_be_released(folder: RemotePath) -> None:
    one, two = Leases(folder), Leases(folder)
    assert one.take("one") and not two.take("one") and two.take("two")
    one.refuse_lost()
    one.release("one")
    assert two.take("one")
    two.release("one")
    two.release("two")
    assert list(folder.iterdir()) == []


def test_a_lease_that_is_renewed_does_not_expire(folder: RemotePath, short_lease: None) -> None:
    one, two, place = Leases(folder), Leases(folder), folder / "one.lock"
    assert one.take("one")

    def is_renewed(seen: bytes) -> bool:
        return place.read_bytes() != seen

    began = time.monotonic()
    while time.monotonic() - began < 3 * leases.EXPIRES_S:
        until(partial(is_renewed, place.read_bytes()))
        assert not two.take("one")
    one.release("one")


def test_a_lease_held_on_another_machine_expires(folder: RemotePath, short_lease: None) -> None:
    abandoned(folder)
    one, began = Leases(folder), time.monotonic()
    while not one.take("one"):
        time.sleep(0.05)
    assert time.monotonic() - began >= 0.5
    one.release("one")


def test_a_lease_of_a_dead_process_on_this_machine_is_acquired_immediately(folder: RemotePath) -> None:
    abandoned(folder, host=leases._here(), process=os.getpid())
    assert not Leases(folder).take("one")
    abandoned(folder, host=f"{leases._here()} in a container", process=dead_process())
    assert not Leases(folder).take("one")
    abandoned(folder, host=leases._here(), process=dead_process())
    one = Leases(folder)
    assert one.take("one")
    one.release("one")


def test_a_holder_that_slept_notices_the_lost_lease_and_keeps_the_new_one(folder: RemotePath) -> None:
    one = Leases(folder)
    assert one.take("one")
    abandoned(folder, token="of another")
    with pytest.raises(RunError, match="has acquired the lock of one, which this one did not renew for 60 s"):
        one.refuse_lost()
    one.release("one")
    assert b"of another" in (folder / "one.lock").read_bytes()


def test_a_lease_is_acquired_even_if_the_response_was_lost(bucket: str, faulty: FaultyStore) -> None:
    one = Leases(RemotePath.at(f"{bucket}/locks"))
    faulty.inject("PUT", "lost answer")
    assert one.take("one")
    assert faulty.done == ["lost answer"]
    one.release("one")


@pytest.mark.parametrize("content", [b"", b'{"host": 3}'])
def test_a_lock_file_with_other_content_is_no_error(folder: RemotePath, short_lease: None, content: bytes) -> None:
    (folder / "one.lock").write_whole(content)
    one = Leases(folder)
    until(lambda: one.take("one"))
    one.release("one")
