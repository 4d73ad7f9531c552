"""Locks of a run: `flock` on a local file; in a store a lease, which is an object that its holder renews.

A lease is acquired by an exclusive create, and written again every `RENEWED_S`. If it does not change for `EXPIRES_S`
by the observer's own clock, its process died, and another process acquires it; immediately if the dead process was on
this machine. A holder that was suspended and lost its lease stops before it publishes a shard or its record; requests
in flight only create objects, so they change nothing. In a store that ignores conditions, another process may write
between its check and its request: then the shard does not match its record, and `load` refuses it.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import platform
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sparse_ingest.errors import RunError, StorageError
from sparse_ingest.reporting import Reporter
from sparse_ingest.storage.durable import open_own
from sparse_ingest.storage.foreign_json import checked, parse_json
from sparse_ingest.storage.places import RemotePath
from sparse_ingest.storage.scratch import try_lock

RENEWED_S = 10.0
EXPIRES_S = 60.0


class Leases:
    """The leases of one process on one run."""

    def __init__(self, folder: RemotePath) -> None:
        self._folder = folder
        self._held: dict[str, _Lease] = {}
        self._seen: dict[str, tuple[bytes, float]] = {}  # leases of other processes: content, and when it was new

    def take(self, name: str) -> bool:
        """Acquire a lease unless another process holds it. Return whether it is held now."""
        place = self._folder / f"{name}.lock"
        lease = _Lease(place)
        try:
            place.write_whole(lease.content(), exclusive=True)
        except FileExistsError:
            found = _read(place)
            # After a lost answer the retried request finds our own lease.
            if found != lease.content():
                if found is not None and not self._expired(name, found):
                    return False
                place.write_whole(lease.content())
                if _read(place) != lease.content():
                    return False
        self._seen.pop(name, None)
        self._held[name] = lease
        lease.renewal.start()
        return True

    def wait(self, name: str, reporter: Reporter) -> bool:
        """Acquire a lease after a failed `take` if its holder has died. Return False once the holder renews it."""
        found = self._seen[name][0]
        reporter.note(
            f"{self._folder / name}.lock is held. Waiting up to {EXPIRES_S:.0f} s to see whether its process has died."
        )
        while self._seen[name][0] == found and not reporter.stop_requested():
            time.sleep(min(1.0, RENEWED_S))
            if self.take(name):
                return True
        return False

    def release(self, name: str) -> None:
        """Release a lease."""
        lease = self._held.pop(name)
        lease.stop()
        if lease.is_ours():
            lease.place.unlink(missing_ok=True)

    def refuse_lost(self) -> None:
        """Raise `RunError` if another process has acquired a lease that this one held."""
        for name, lease in self._held.items():
            if not lease.is_ours():
                raise RunError(
                    f"Another process has acquired the lock of {name}, which this one did not renew for "
                    f"{EXPIRES_S:.0f} s. Run the command again to continue."
                )

    def _expired(self, name: str, found: bytes) -> bool:
        content, since = self._seen.get(name, (b"", 0.0))
        if content != found:
            since = time.monotonic()
            self._seen[name] = (found, since)
        return time.monotonic() - since > EXPIRES_S or _died_here(found)


@contextlib.contextmanager
def file_lock(path: Path) -> Iterator[bool]:
    """Hold the `flock` on a local file for the block, and create the file. Yield False if another process holds it."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = os.fdopen(open_own(path, os.O_RDWR), "rb")
    except OSError as error:
        if error.errno in (errno.EINVAL, errno.ELOOP, errno.ENXIO):
            raise RunError(f"{path} is a link or not a regular file; expected a lock file. Delete it.") from error
        raise RunError(
            f"{path} cannot be created: {error.strerror}. Locks of a read-only run are kept in SPARSE_INGEST_HOME: set "
            "it to a writable folder with free space."
        ) from error
    with file:
        yield try_lock(file)


class _Lease:
    """A lease that is held: a thread renews it until `stop`."""

    def __init__(self, place: RemotePath) -> None:
        self.place = place
        self._token = uuid.uuid4().hex
        self._count = 0
        self._ended = threading.Event()
        self.renewal = threading.Thread(target=self._renew, name=f"lease {place.name}", daemon=True)

    def content(self) -> bytes:
        holder = {"token": self._token, "host": _here(), "process": os.getpid(), "count": self._count}
        return json.dumps(holder).encode() + b"\n"

    def stop(self) -> None:
        self._ended.set()
        self.renewal.join()

    def is_ours(self) -> bool:
        """Return whether no other process has acquired it since; reads the lock from the store."""
        return _holder(_read(self.place)).get("token") == self._token

    def _renew(self) -> None:
        while not self._ended.wait(RENEWED_S):
            try:
                if not self.is_ours():
                    return
                self._count += 1
                self.place.write_whole(self.content())
            except StorageError:
                # The store is down for every process; whatever needs the lease reads it again.
                continue


def _read(place: RemotePath) -> bytes | None:
    try:
        return place.read_bytes()
    except FileNotFoundError:
        return None


def _holder(content: bytes | None) -> dict[str, Any]:
    try:
        return checked(parse_json(content or b""), dict[str, Any])
    except ValueError:
        return {}


def _here() -> str:
    """Return the name of this machine, its boot and process namespace: containers may share a host name."""
    with contextlib.suppress(OSError):  # Linux
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{platform.node()} {boot} {Path('/proc/self/ns/pid').readlink()}"
    return platform.node()


def _died_here(content: bytes) -> bool:
    """Return whether the holder was a process of this machine that no longer runs."""
    holder = _holder(content)
    number = holder.get("process")
    if holder.get("host") != _here() or not isinstance(number, int) or not 0 < number < 1 << 30:
        return False
    try:
        os.kill(number, 0)
    except OSError as error:  # PermissionError: it runs as another user
        return isinstance(error, ProcessLookupError)
    return False
