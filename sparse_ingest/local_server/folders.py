"""Where the local server's files are, whose they are, and who may enter: the part that differs when root asks.

Everything is under SPARSE_INGEST_HOME when it is set; else in the user's own cache and state folders, and for root
under /var, because the server then runs as `nobody`, who cannot look into root's home.

Not covered: what is put there (download.py, launch.py).
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
from sparse_ingest.storage.scratch import user_folder

Account = pwd.struct_passwd  # of the unprivileged user that runs the server when the caller is root


def server_account() -> Account | None:
    """Who runs the server: `nobody` when the caller is root (OpenSearch refuses root), else the caller (None)."""
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
    """The arguments of `subprocess` that make a child run as `account`."""
    return {} if account is None else {"user": account.pw_uid, "group": account.pw_gid, "extra_groups": []}


def cache_home() -> Path:
    """Where downloads are unpacked; may be deleted at any time while no server runs."""
    return _home("/var/cache", "XDG_CACHE_HOME", ".cache")


def state_home() -> Path:
    """The folder of instances and their default data folders."""
    return _home("/var/lib", "XDG_STATE_HOME", ".local/state")


def _home(for_root: str, variable: str, in_home: str) -> Path:
    if os.geteuid() == 0 and not os.environ.get("SPARSE_INGEST_HOME"):
        return Path(for_root) / "sparse-ingest"
    return user_folder(variable, in_home)


def make_folder(folder: Path) -> Path:
    """Make `folder` and its parents; what is newly made can be entered by every user, whatever the umask."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        for path in reversed(missing):
            path.mkdir(exist_ok=True)
            path.chmod(0o755)
    except OSError as error:
        raise LocalServerError(
            f"The folder {folder} cannot be made: {error.strerror}. Name another with SPARSE_INGEST_HOME or --data."
        ) from error
    return folder


def require_reachable(folder: Path, account: Account | None) -> None:
    """Refuse a folder that `account` cannot enter, and name the parent that is in the way."""
    if account is None:
        return
    for path in (folder.resolve(), *folder.resolve().parents):
        found = path.stat()
        bit = 0o100 if found.st_uid == account.pw_uid else 0o010 if found.st_gid == account.pw_gid else 0o001
        if not found.st_mode & bit:
            raise LocalServerError(
                f"As root the server runs as the user {account.pw_name}, who cannot enter {path} "
                f"(mode {found.st_mode & 0o777:o}). Put {folder} elsewhere with SPARSE_INGEST_HOME or --data."
            )


@contextmanager
def locked(path: Path, reporter: Reporter, busy: str) -> Iterator[None]:
    """Hold the lock file `path`, created if it does not exist; `busy` is noted if another process holds it.

    The kernel releases the lock when its process dies.
    """
    make_folder(path.parent)
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            reporter.note(busy)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def hand_over(folder: Path, account: Account | None) -> None:
    """Make `folder` when it is missing, and give it with all it holds to the server's user."""
    if folder.is_symlink():
        # Following it as root would give away whatever it points to.
        raise LocalServerError(f"{folder} is a symbolic link. Give the folder that it points to.")
    make_folder(folder)
    require_reachable(folder.parent, account)
    if account is None:
        if not os.access(folder, os.W_OK):
            raise LocalServerError(
                f"{folder} cannot be written by this user (it belongs to {folder.owner()}). Give another --data."
            )
        return
    if folder.stat().st_uid != account.pw_uid:
        for parent, folders, files, at in os.fwalk(folder):
            for name in (*folders, *files):
                about = os.stat(name, dir_fd=at, follow_symlinks=False)
                if stat.S_ISREG(about.st_mode) and about.st_nlink > 1 and about.st_uid != account.pw_uid:
                    # Its other name may be any file of this file system.
                    raise LocalServerError(
                        f"{parent}/{name} is a hard link, and would be given to the user {account.pw_name} under its "
                        "other names too. Copy the folder, or give another --data."
                    )
                os.chown(name, account.pw_uid, account.pw_gid, dir_fd=at, follow_symlinks=False)
        # Last: an interrupted walk is then done again.
        os.chown(folder, account.pw_uid, account.pw_gid)
