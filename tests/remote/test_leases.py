"""Locks in a store: one holder, taken over when it has died, and known to be lost by who slept."""

from __future__ import annotations

import json
import os
import time

import pytest
from support.stores import FaultyStore

from sparse_ingest.errors import RunError
from sparse_ingest.runs import leases
from sparse_ingest.runs.leases import Leases
from sparse_ingest.storage.places import RemotePath


@pytest.fixture
def folder(bucket: str) -> RemotePath:
    return RemotePath.at(f"{bucket}/locks")


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leases, "RENEWED_S", 0.1)
    monkeypatch.setattr(leases, "EXPIRES_S", 0.5)


def abandoned(folder: RemotePath, **holder: object) -> None:
    """What a process leaves behind that was killed."""
    content = {"token": "t", "host": "another", "process": 1, "count": 3} | holder
    (folder / "one.lock").write_whole(json.dumps(content).encode())


def dead_process() -> int:
    if (number := os.fork()) == 0:
        os._exit(0)
    os.waitpid(number, 0)
    return number


def test_one_of_two_holds_a_lease_and_gives_it_back(folder: RemotePath) -> None:
    one, two = Leases(folder), Leases(folder)
    assert one.take("one") and not two.take("one") and two.take("two")
    one.refuse_lost()
    one.release("one")
    assert two.take("one")
    two.release("one")
    two.release("two")
    assert list(folder.iterdir()) == []


def test_a_lease_that_is_renewed_does_not_expire(folder: RemotePath, quick: None) -> None:
    one, two = Leases(folder), Leases(folder)
    assert one.take("one")
    until = time.monotonic() + 1.5
    while time.monotonic() < until:
        assert not two.take("one")
        time.sleep(0.1)
    one.release("one")


def test_a_lease_of_another_machine_expires(folder: RemotePath, quick: None) -> None:
    abandoned(folder)
    one, began = Leases(folder), time.monotonic()
    while not one.take("one"):
        time.sleep(0.05)
    assert time.monotonic() - began >= 0.5
    one.release("one")


def test_a_lease_of_a_dead_process_of_this_machine_is_taken_at_once(folder: RemotePath) -> None:
    abandoned(folder, host=leases._here(), process=os.getpid())
    assert not Leases(folder).take("one")
    abandoned(folder, host=f"{leases._here()} in a container", process=dead_process())
    assert not Leases(folder).take("one")
    abandoned(folder, host=leases._here(), process=dead_process())
    one = Leases(folder)
    assert one.take("one")
    one.release("one")


def test_whoever_slept_finds_its_lease_lost_and_leaves_the_other_alone(folder: RemotePath) -> None:
    one = Leases(folder)
    assert one.take("one")
    abandoned(folder, token="of another")
    with pytest.raises(RunError, match="has acquired the lock of one, which this one did not renew for 60 s"):
        one.refuse_lost()
    one.release("one")
    assert b"of another" in (folder / "one.lock").read_bytes()


def test_a_lease_that_was_written_though_the_answer_was_lost_is_held(bucket: str, spoiled: FaultyStore) -> None:
    one = Leases(RemotePath.at(f"{bucket}/locks"))
    spoiled.spoil("PUT", "lost answer")
    assert one.take("one")
    assert spoiled.done == ["lost answer"]
    one.release("one")


@pytest.mark.parametrize("content", [b"", b'{"host": 3}'])
def test_a_lock_that_holds_something_else_is_no_error(folder: RemotePath, quick: None, content: bytes) -> None:
    (folder / "one.lock").write_whole(content)
    one, began = Leases(folder), time.monotonic()
    while not one.take("one"):
        assert time.monotonic() - began < 20
        time.sleep(0.05)
    one.release("one")
