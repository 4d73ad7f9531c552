"""Locations of runs and corpora: a local path, or an address such as s3://bucket/prefix, read through fsspec.

In: a path or an address. Out: a `Path`, or a `RemotePath` with the methods of `Path` that runs and corpora need. Writes
are atomic. Credentials come from the environment or an address (user:password@, the query of a signed link), and never
appear in a name or a message. Not covered: locks (runs/leases.py).
"""

from __future__ import annotations

import errno
import io
import os
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeAlias, TypeVar
from urllib.parse import unquote, urlsplit

from sparse_ingest.errors import MissingExtraError, SparseIngestError, StorageError, UsageError, first_line, short_repr
from sparse_ingest.storage.addresses import ADDRESS, split_address
from sparse_ingest.storage.addresses import without_secrets as without_secrets
from sparse_ingest.storage.remote_files import RemoteFile
from sparse_ingest.storage.waiting import call_with_timeout
from sparse_ingest.storage.web import guarded_session

WEB = ("http", "https")
_S3, _GS = ("s3", "s3a"), ("gs", "gcs")
_RETRYING = _S3 + _GS  # their libraries retry failed requests
_PAUSES_S = (0.5, 1.0, 2.0, 4.0)  # before each retry of a failed request
_KEPT_BLOCKS = 4  # Parquet's columns are read alternately: at 50 ms a request 13 MB/s, 7 MB/s with one block
_MISSING_STATUS = (404, 410)
# Keys of an object's version in fsspec's `info`, strongest first.
_VERSIONS = ("ETag", "etag", "md5Hash", "LastModified", "Last-Modified", "mtime", "created")
T = TypeVar("T")


def place_of(spec: str | Place) -> Place:
    """Return a `RemotePath` for an address with a scheme, otherwise a local path."""
    if isinstance(spec, Path | RemotePath):
        return spec
    if not isinstance(spec, str):
        raise UsageError(f"A path is {short_repr(spec)}; expected a string or Path, such as runs/articles.")
    if not ADDRESS.match(spec):
        return Path(spec)
    if spec.lower().startswith("file://"):
        return Path(unquote(urlsplit(spec).path))
    return RemotePath.at(spec)


@dataclass(frozen=True, repr=False)
class RemotePath:
    """A file or folder at an address, with methods of `pathlib.Path`. Always absolute."""

    _storage: Any = field(compare=False)  # fsspec's file system
    _scheme: str
    _key: str
    _query: str = field(compare=False)

    @classmethod
    def at(cls, address: str) -> RemotePath:
        """Return the location of an address, or raise `UsageError` or `MissingExtraError`."""
        parts = split_address(address)
        try:
            scheme = urlsplit(f"{parts.scheme}://{parts.rest}").scheme
        except ValueError as error:
            raise UsageError(f"{parts} is not an address: {error}. Check its spelling.") from None
        if scheme in WEB and not parts.is_clear:
            raise UsageError(
                "An address with an @ after a path is ambiguous. Write an @ of the path or query as %40, and a slash, "
                "? or # of a password as %2F, %3F or %23."
            )
        if scheme in _RETRYING and parts.user is not None:
            names = "AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY" if scheme in _S3 else "GOOGLE_APPLICATION_CREDENTIALS"
            raise UsageError(
                f"{parts} has credentials in the address. Set them in the environment ({names}) or in the "
                "configuration of the cloud's own tools."
            )
        address, mark, query = parts._replace(scheme=scheme).encoded, "", ""
        if scheme in WEB:
            address, mark, query = address.partition("#")[0].partition("?")
        storage, key = _storage_of(scheme, address)
        return cls(storage, scheme, key.rstrip("/"), mark + query)

    @property
    def name(self) -> str:
        """The last part of the address."""
        last = self._key.rpartition("/")[2]
        return unquote(last) if self._scheme in WEB else last

    @property
    def parent(self) -> RemotePath:
        """The folder."""
        return replace(self, _key=self._key.rpartition("/")[0])

    @property
    def writable(self) -> bool:
        """False on the web, which is only read."""
        return self._scheme not in WEB

    listable = writable  # on the web, files can only be named

    def __truediv__(self, name: str) -> RemotePath:
        return replace(self, _key=f"{self._key}/{name}")

    def __str__(self) -> str:
        address = self._key if self._scheme in WEB else f"{self._scheme}://{self._key.lstrip('/')}"
        scheme, _, rest = address.partition("://")
        host, slash, path = rest.partition("/")  # no slash precedes it in a login that is encoded
        return f"{scheme}://{host.rpartition('@')[2]}{slash}{path}"

    def __repr__(self) -> str:
        return f"RemotePath({str(self)!r})"

    def resolve(self) -> RemotePath:
        """Return the same location: addresses are absolute, and have no links."""
        return self

    def exists(self) -> bool:
        """Return whether it is a file or a folder that is not empty."""
        return self.about() is not None

    def is_dir(self) -> bool:
        """Return whether it is a folder that is not empty."""
        return self.listable and (self.about() or {}).get("type") == "directory"

    def about(self) -> dict[str, Any] | None:
        """Return `type`, `size` in bytes and `version`, a string that changes with the content; None if absent.

        Size and version are None if the store does not report them.
        """
        try:
            found = self._request("inspected", lambda: self._storage.info(self._target))
        except FileNotFoundError:
            return None
        version = next((str(found[key]) for key in _VERSIONS if found.get(key)), None)
        return {"type": found.get("type", "file"), "size": found.get("size"), "version": version}

    def iterdir(self) -> Iterator[RemotePath]:
        """Yield the entries of the folder, in byte order of their names."""
        yield from self._listed(lambda: self._storage.ls(self._target, detail=False))

    def glob(self, pattern: str) -> Iterator[RemotePath]:
        """Yield the entries of the folder whose names match a pattern."""
        yield from (place for place in self.iterdir() if fnmatchcase(place.name, pattern))

    def matching(self) -> list[RemotePath]:
        """Return the files that match this address as a glob, in byte order of their addresses."""
        return self._listed(lambda: self._storage.glob(self._target))

    def _listed(self, ask: Callable[[], list[str]]) -> list[RemotePath]:
        if not self.listable:
            raise StorageError(
                f"{self} cannot be listed: a web server does not list the files of a folder. Pass each file, or copy "
                "the folder."
            )
        try:
            keys = self._request("listed", ask)
        except FileNotFoundError:
            keys = []
        # A store may list the folder among its own entries.
        found = {key.rstrip("/") for key in keys} - {self._key}
        return [replace(self, _key=key) for key in sorted(found, key=os.fsencode)]

    def read_bytes(self) -> bytes:
        """Return the content of a small file, or raise `FileNotFoundError`."""
        # Otherwise s3fs requests the size first, and reads large files in pieces.
        how = {"max_concurrency": 1} if self._scheme in _S3 else {}
        return bytes(self._request("read", lambda: self._storage.cat_file(self._target, **how)))

    def open(self, _mode: Literal["rb"] = "rb") -> io.BufferedReader:
        """Open the file for reading, with the next block fetched in the background."""
        return io.BufferedReader(self.open_ranges(_KEPT_BLOCKS), 1 << 20)

    def open_ranges(self, kept_blocks: int = 0) -> RemoteFile:
        """Open the file for reading. Only the bytes that are read are fetched, unless blocks are kept."""
        open_file = partial(self._storage.open, self._target, "rb")
        return RemoteFile(open_file, self._request, str(self), kept_blocks=kept_blocks)

    def write_whole(self, content: bytes, *, exclusive: bool = False) -> None:
        """Write a small file atomically. If `exclusive`, raise `FileExistsError` if it exists."""
        self._put(lambda mode: self._storage.pipe_file(self._target, content, mode=mode), exclusive, content)

    def upload(self, source: Path, *, exclusive: bool = False) -> None:
        """Upload a local file atomically, as `write_whole`. Raise `StorageError` if the store reports another size."""
        self._put(lambda mode: self._storage.put_file(str(source), self._target, mode=mode), exclusive, source)
        size, found = source.stat().st_size, (self.about() or {}).get("size")
        if found != size:
            raise StorageError(
                f"{self} has {found} bytes after {size} were written. Start again; if that happens again, the store "
                "loses data."
            )

    def unlink(self, missing_ok: bool = False) -> None:
        """Delete a file."""
        self._refuse_writing()
        with suppress(FileNotFoundError) if missing_ok else nullcontext():
            self._request("removed", lambda: self._storage.rm_file(self._target))

    def mkdir(self, parents: bool = False, exist_ok: bool = False) -> None:
        """Create the folder, except in object stores, which have no folders."""
        if self._scheme not in _RETRYING and self.writable:
            self._request("created", lambda: self._storage.makedirs(self._target, exist_ok=exist_ok))

    @property
    def _target(self) -> str:
        return self._key + self._query

    def _refuse_writing(self) -> None:
        if not self.writable:
            raise StorageError(f"{self} cannot be written: a web address is for reading. Pass a folder or a bucket.")

    def _put(self, put: Callable[[str], None], exclusive: bool, sent: bytes | Path) -> None:
        """Call `put` with the mode of fsspec that creates or overwrites."""
        self._refuse_writing()
        size = len(sent) if isinstance(sent, bytes) else sent.stat().st_size

        def write() -> None:
            try:
                # On S3 and Google Cloud Storage "create" is one conditional request; for others fsspec checks first.
                put("create" if exclusive else "overwrite")
            except OSError as error:
                # s3fs raises FileExistsError only if the store names the condition that failed.
                code = getattr(error.__cause__, "response", {}).get("Error", {}).get("Code")
                if exclusive and str(code) in ("PreconditionFailed", "412"):
                    raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(self)) from None
                raise

        try:
            self._request("written", write, bytes_sent=size)
        except FileNotFoundError:
            raise StorageError(
                f"{self} cannot be written: its bucket or folder does not exist. Create it first."
            ) from None

    def _request(self, done: str, ask: Callable[[], T], **sizes: Any) -> T:
        """Return the result of a request, retried if no library does that; `sizes` are as for `call_with_timeout`.

        Failures other than FileNotFoundError and FileExistsError raise a `StorageError` without secrets.
        """
        return call_with_timeout(lambda: self._repeated(done, ask), str(self), **sizes)

    def _repeated(self, done: str, ask: Callable[[], T]) -> T:
        pauses_s = iter(() if self._scheme in _RETRYING else _PAUSES_S)
        while True:
            try:
                return ask()
            except (FileExistsError, SparseIngestError):
                raise
            except Exception as error:
                if isinstance(refused := _cause_of(error), SparseIngestError):
                    raise refused from None
                if _is_missing(error):
                    raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(self)) from None
                pause_s = next(pauses_s, None)
                if pause_s is None or not _may_succeed_later(error):
                    # Not `from error`: a library's message may contain the address with its secrets.
                    raise self._failed(done, error) from None
            time.sleep(pause_s)

    def _failed(self, done: str, error: Exception) -> StorageError:
        cause = _cause_of(error)
        system = cause.strerror if isinstance(cause, OSError) else None
        reason = without_secrets(first_line(Exception(system or str(cause) or type(cause).__name__)))
        if isinstance(error, PermissionError) or _status_of(error) in (401, 403):
            advice = "Check the credentials in the environment, and what they allow"
        else:
            advice = "Check the address, the network and the credentials in the environment, and start again"
        return StorageError(f"{self} cannot be {done}: {reason}. {advice}: what is finished is kept.")


Place: TypeAlias = Path | RemotePath


def _storage_of(scheme: str, address: str) -> tuple[Any, str]:
    """Return fsspec's file system for an address, and the key of the address in it."""
    try:
        from fsspec.core import filesystem, url_to_fs

        if scheme in WEB:  # url_to_fs would split the :: of an address in IPv6
            # Ranges of the file, not of a copy that the server compresses.
            headers = {"headers": {"Accept-Encoding": "identity"}}
            return filesystem(scheme, client_kwargs=headers, get_client=guarded_session), address
        # No cached listings: files that another process wrote must be found.
        storage, key = url_to_fs(address, use_listings_cache=False)
    except ImportError as error:
        if scheme in WEB + _RETRYING:
            raise MissingExtraError("remote", f"Reading and writing {scheme}:// addresses") from None
        raise StorageError(f"{scheme}:// addresses need another package: {first_line(error)}.") from None
    except ValueError:
        raise UsageError(
            f"The scheme of {without_secrets(address)} is unknown. Use s3://, gs://, https://, the scheme of "
            "an installed fsspec package, or a local folder."
        ) from None
    except Exception as error:
        reason = without_secrets(first_line(error))
        raise StorageError(f"{without_secrets(address)} cannot be reached: {reason}. Check the credentials.") from None
    return storage, str(key)


def _cause_of(error: BaseException) -> BaseException:
    """Return the true failure: on the web, fsspec raises FileNotFoundError with the true one as its cause."""
    return (error.__cause__ if isinstance(error, FileNotFoundError) else None) or error


def _status_of(error: BaseException) -> int | None:
    status = getattr(_cause_of(error), "status", None)
    return status if isinstance(status, int) else None


def _is_missing(error: Exception) -> bool:
    of_web = type(_cause_of(error)).__module__.startswith(("aiohttp", "asyncio"))
    return isinstance(error, FileNotFoundError) and (not of_web or _status_of(error) in _MISSING_STATUS)


def _may_succeed_later(error: Exception) -> bool:
    """Return whether the same request may succeed later."""
    status = _status_of(error)
    if status is not None:
        return status in (408, 429) or status >= 500
    return not isinstance(error, (PermissionError, NotImplementedError, ValueError, TypeError, IsADirectoryError))
