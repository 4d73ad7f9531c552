"""Folders of the local server, their owner and permissions.

They are in SPARSE_INGEST_HOME if it is set, otherwise in the user's cache and state folders; for root in /var, because
the server then runs as `nobody`, who has no access to root's home.
"""

from __future__ import annotations

import fcntl
import os
import pwd
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sparse_ingest.errors import LocalServerError
from sparse_ingest.reporting import Reporter
from sparse_ingest.storage.scratch import try_lock, user_folder

Account = pwd.struct_passwd  # of the unprivileged user that runs the server if the caller is root


def server_account() -> Account | None:
    """Return the account of `nobody` if the caller is root, because OpenSearch does not run as root; otherwise None."""
    if os.geteuid() != 0:
        return None
    try:
        return pwd.getpwnam("nobody")
    except KeyError:
        raise LocalServerError(
            "OpenSearch refuses to run as root, and this system has no user `nobody`. "
            "Run the command as an ordinary user."
        ) from None


def as_account(account: Account | None) -> dict[str, Any]:
    """Return arguments of `subprocess` that run a child as `account`."""
    return {} if account is None else {"user": account.pw_uid, "group": account.pw_gid, "extra_groups": []}


def cache_home() -> Path:
    """Return the folder for unpacked downloads. It may be deleted while no server runs."""
    return _home("/var/cache", "XDG_CACHE_HOME", ".cache")


def state_home() -> Path:
    """Return the folder of instances and their default data folders."""
    return _home("/var/lib", "XDG_STATE_HOME", ".local/state")


def _home(for_root: str, variable: str, in_home: str) -> Path:
    if os.geteuid() == 0 and not os.environ.get("SPARSE_INGEST_HOME"):
        return Path(for_root) / "sparse-ingest"
    return user_folder(variable, in_home)


def make_folder(folder: Path) -> Path:
    """Create `folder` and its parents, accessible for every user whatever the umask."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        for path in reversed(missing):
            path.mkdir(exist_ok=True)
            path.chmod(0o755)
    except OSError as error:
        raise LocalServerError(
            f"The folder {folder} cannot be created: {error.strerror}. Name another with SPARSE_INGEST_HOME or --data."
        ) from error
    return folder


def require_reachable(folder: Path, account: Account | None) -> None:
    """Refuse a folder that `account` cannot access."""
    if account is None:
        return
    for path in (folder.resolve(), *folder.resolve().parents):
        found = path.stat()
        bit = 0o100 if found.st_uid == account.pw_uid else 0o010 if found.st_gid == account.pw_gid else 0o001
        if not found.st_mode & bit:
            raise LocalServerError(
                f"For root the server runs as the user {account.pw_name}, who cannot enter {path} "
                f"(mode {found.st_mode & 0o777:o}). Put {folder} elsewhere with SPARSE_INGEST_HOME or --data."
            )


@contextmanager
def locked(path: Path, reporter: Reporter, busy: str) -> Iterator[None]:
    """Lock the file `path`; report `busy` if another process has locked it. A lock ends with its process."""
    make_folder(path.parent)
    with path.open("a") as file:
        if not try_lock(file):
            reporter.note(busy)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def hand_over(folder: Path, account: Account | None) -> None:
    """Create `folder` if it does not exist, and change the owner of its contents to `account`."""
    if folder.is_symlink():
        # Following it as root would change the owner of any folder.
        raise LocalServerError(f"{folder} is a symbolic link. Give the folder that it points to.")
    make_folder(folder)
    require_reachable(folder.parent, account)
    if account is None:
        if not os.access(folder, os.W_OK):
            raise LocalServerError(
                f"{folder} is not writable for this user (its owner is {folder.owner()}). Give another --data."
            )
        return
    if folder.stat().st_uid != account.pw_uid:
        for parent, folders, files, at in os.fwalk(folder):
            for name in (*folders, *files):
                about = os.stat(name, dir_fd=at, follow_symlinks=False)
                if stat.S_ISREG(about.st_mode) and about.st_nlink > 1 and about.st_uid != account.pw_uid:
                    # Its other name may be any file of this file system.
                    raise LocalServerError(
                        f"{parent}/{name} is a hard link: changing its owner to {account.pw_name} would change its "
                        "other names too. Copy the folder, or give another --data."
                    )
                os.chown(name, account.pw_uid, account.pw_gid, dir_fd=at, follow_symlinks=False)
        # Last, so that an interrupted walk is repeated.
        os.chown(folder, account.pw_uid, account.pw_gid)
