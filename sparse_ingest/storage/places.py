"""Where runs and corpora lie: a path of this machine, or an address such as s3://bucket/prefix, read through fsspec.

In: what a user wrote. Out: a `Path`, or a `RemotePath` with those methods of `Path` that runs and corpora need. An
object appears under its address whole or not at all, as object stores have it. Credentials come from the environment
of the libraries; those that stand in an address (user:password@, the query of a signed link) are used, and are in no
name or message.

Not covered: locks (runs/leases.py), and what the files hold.
"""

from __future__ import annotations

import errno
import io
import re
import time
from collections.abc import Callable, Iterator
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import Any, TypeAlias, TypeVar
from urllib.parse import unquote, urlsplit

from sparse_ingest.errors import MissingExtraError, SparseIngestError, StorageError, UsageError, first_line
from sparse_ingest.storage.remote_files import RemoteFile

WEB = ("http", "https")
_S3, _GS = ("s3", "s3a"), ("gs", "gcs")
_RETRYING = _S3 + _GS  # their libraries try again by themselves
_PAUSES_S = (0.5, 1.0, 2.0, 4.0)  # before a request that failed is made again
_BLOCK_BYTES = 4 << 20
_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")
# A password may hold what belongs into an address only in its encoded form, even a slash: what follows the colon is
# then no port.
_CREDENTIALS = re.compile(r"(?<=://)(?:[^/\s'\"]*|[^/:\s'\"]+:(?!\d+(?:/|$))[^\s'\"]*)@")
_QUERY = re.compile(r"(https?://[^\s?'\"]*)\?[^\s'\"]*", re.IGNORECASE)
_MISSING_STATUS = (404, 410)
# What stores call that by which two contents of one address differ, the surest first.
_VERSIONS = ("ETag", "etag", "md5Hash", "LastModified", "Last-Modified", "mtime", "created")
T = TypeVar("T")


def place_of(spec: str | Place) -> Place:
    """Return the place that a user named: an address if it has a scheme, otherwise a path of this machine."""
    if not isinstance(spec, str):
        return spec
    if not _ADDRESS.match(spec):
        return Path(spec)
    if spec.lower().startswith("file://"):
        return Path(unquote(urlsplit(spec).path))
    return RemotePath.at(spec)


class RemotePath:
    """A file or folder at an address. It keeps to `pathlib.Path` as far as it goes; there are no relative ones."""

    def __init__(self, storage: Any, scheme: str, key: str, query: str = "") -> None:
        self._storage = storage  # fsspec's file system
        self._scheme = scheme
        self._key = key
        self._query = query

    @classmethod
    def at(cls, address: str) -> RemotePath:
        """The place of an address.

        Raises:
            UsageError: the scheme is unknown, or credentials stand where they do not belong.
            MissingExtraError: what reads it is not installed.
        """
        scheme, _, rest = address.partition("://")
        scheme = scheme.lower()
        address = f"{scheme}://{rest}"
        try:
            parts = urlsplit(address)
        except ValueError as error:
            raise UsageError(f"{without_secrets(address)} is no address: {error}. Check its spelling.") from None
        if scheme in _RETRYING and "@" in parts.netloc:
            raise UsageError(
                f"{without_secrets(address)} was given with credentials in the address. Give them in the environment "
                f"({'AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY' if scheme in _S3 else 'GOOGLE_APPLICATION_CREDENTIALS'}"
                "), or in the settings of the cloud's own tools."
            )
        query = ""
        if scheme in WEB:
            address, mark, query = address.partition("#")[0].partition("?")
            query = mark + query
        storage, key = _storage_of(scheme, address)
        return cls(storage, scheme, key.rstrip("/"), query)

    @property
    def name(self) -> str:
        """The last part."""
        return unquote(self._last) if self._scheme in WEB else self._last

    @property
    def stem(self) -> str:
        """The last part without its suffix."""
        return PurePosixPath(self.name).stem

    @property
    def parent(self) -> RemotePath:
        """What it lies in."""
        return RemotePath(self._storage, self._scheme, self._key.rpartition("/")[0], self._query)

    @property
    def _last(self) -> str:
        return self._key.rpartition("/")[2]

    @property
    def writable(self) -> bool:
        """False where nothing can be written, as on the web."""
        return self._scheme not in WEB

    @property
    def listable(self) -> bool:
        """False where one must know what is there, as on the web."""
        return self._scheme not in WEB

    def __truediv__(self, name: str) -> RemotePath:
        return RemotePath(self._storage, self._scheme, f"{self._key}/{name}", self._query)

    def __str__(self) -> str:
        address = self._key if self._scheme in WEB else f"{self._scheme}://{self._key.lstrip('/')}"
        return without_secrets(address)

    def __repr__(self) -> str:
        return f"RemotePath({str(self)!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RemotePath) and (self._scheme, self._key) == (other._scheme, other._key)

    def __hash__(self) -> int:
        return hash((self._scheme, self._key))

    def resolve(self) -> RemotePath:
        """Itself."""
        return self

    def exists(self) -> bool:
        """Whether a file is there, or a folder with something in it."""
        return self.about() is not None

    def is_dir(self) -> bool:
        """Whether it is a folder with something in it."""
        return self.listable and (self.about() or {}).get("type") == "directory"

    def is_file(self) -> bool:
        """Whether a file is there."""
        return (self.about() or {}).get("type") == "file"

    def about(self) -> dict[str, Any] | None:
        """What the store says of a file: `size` (None: it does not say), `version` (a text that differs when the
        content does, None likewise) and `type`; None where nothing is.
        """
        try:
            found = self._asked("looked at", lambda: self._storage.info(self._target))
        except FileNotFoundError:
            return None
        version = next((found[key] for key in _VERSIONS if found.get(key)), None)
        return {
            "type": found.get("type", "file"),
            "size": found.get("size"),
            "version": None if version is None else str(version),
        }

    def iterdir(self) -> Iterator[RemotePath]:
        """What lies in the folder, in byte order of the names."""
        self._refuse_listing()
        try:
            keys = self._asked("listed", lambda: self._storage.ls(self._target, detail=False))
        except FileNotFoundError:
            return
        yield from self._places(keys)

    def glob(self, pattern: str) -> Iterator[RemotePath]:
        """What lies in the folder and has a name of this pattern."""
        yield from (place for place in self.iterdir() if fnmatchcase(place.name, pattern))

    def matching(self) -> list[RemotePath]:
        """The files that this address stands for as a glob, in byte order of their addresses."""
        self._refuse_listing()
        return list(self._places(self._asked("listed", lambda: self._storage.glob(self._target))))

    def _places(self, keys: list[str]) -> Iterator[RemotePath]:
        # A store may name the folder itself among what lies in it.
        found = {key.rstrip("/") for key in keys} - {self._key}
        for key in sorted(found, key=lambda key: key.encode("utf-8", "surrogateescape")):
            yield RemotePath(self._storage, self._scheme, key, self._query)

    def read_bytes(self) -> bytes:
        """The content of a small file. FileNotFoundError where there is none."""
        # Else s3fs asks for the size first, and reads in pieces what is large.
        how = {"max_concurrency": 1} if self._scheme in _S3 else {}
        return bytes(self._asked("read", lambda: self._storage.cat_file(self._target, **how)))

    def read_text(self, encoding: str = "utf-8") -> str:
        """The content of a small file."""
        return self.read_bytes().decode(encoding)

    def open(self, mode: str = "rb") -> io.BufferedReader:
        """The content as a stream that is read ahead."""
        assert mode == "rb", "nothing is written piece by piece"
        return io.BufferedReader(self.open_ranges(ahead=2), 1 << 20)

    def open_ranges(self, ahead: int = 0) -> RemoteFile:
        """The content, of which only what is asked for is fetched; with `ahead` in blocks, so many before they are."""

        def opened(stream: bool) -> Any:
            how = {"block_size": 0} if stream else {"cache_type": "none"}
            return self._storage.open(self._target, "rb", **how)

        return RemoteFile(opened, self._asked, str(self), block_bytes=_BLOCK_BYTES, ahead=ahead)

    def write_whole(self, content: bytes, *, exclusive: bool = False) -> None:
        """Write a small file in one step; with `exclusive`, FileExistsError where there is one."""
        self._put(lambda mode: self._storage.pipe_file(self._target, content, mode=mode), exclusive)

    def upload(self, source: Path, *, exclusive: bool = False) -> None:
        """Put a file of this machine there, in one step for all who look; `exclusive` as with `write_whole`."""
        self._put(lambda mode: self._storage.put_file(str(source), self._target, mode=mode), exclusive)
        size, found = source.stat().st_size, (self.about() or {}).get("size")
        if found != size:
            raise StorageError(
                f"{self} has {found} bytes after {size} were written. Start again; if that happens again, the store "
                "loses data."
            )

    def unlink(self, missing_ok: bool = False) -> None:
        """Remove a file."""
        self._refuse_writing()
        try:
            self._asked("removed", lambda: self._storage.rm_file(self._target))
        except FileNotFoundError:
            if not missing_ok:
                raise

    def mkdir(self, parents: bool = False, exist_ok: bool = False) -> None:
        """Make the folder where the store has folders; object stores have none."""
        if self._scheme not in _RETRYING and self.writable:
            self._asked("made", lambda: self._storage.makedirs(self._target, exist_ok=exist_ok))

    @property
    def _target(self) -> str:
        return self._key + self._query

    def _refuse_listing(self) -> None:
        if not self.listable:
            raise StorageError(
                f"{self} cannot be listed: a web server does not say what lies in a folder. Name each file, or copy "
                "the folder."
            )

    def _refuse_writing(self) -> None:
        if not self.writable:
            raise StorageError(f"{self} cannot be written: a web address is for reading. Name a folder or a bucket.")

    def _put(self, put: Callable[[str], None], exclusive: bool) -> None:
        """Make what `put` makes in a mode of fsspec."""
        self._refuse_writing()

        def make() -> None:
            try:
                # On S3 and Google Cloud Storage "create" is one conditional request; elsewhere fsspec looks first.
                put("create" if exclusive else "overwrite")
            except OSError as error:
                # Not every store says which condition failed, and only then does s3fs know.
                code = getattr(error.__cause__, "response", {}).get("Error", {}).get("Code")
                if exclusive and str(code) in ("PreconditionFailed", "412"):
                    raise FileExistsError(errno.EEXIST, "there is one", str(self)) from None
                raise

        try:
            self._asked("written", make)
        except FileNotFoundError:
            raise StorageError(
                f"{self} cannot be written: the bucket or folder that it lies in does not exist. Make that first."
            ) from None

    def _asked(self, done: str, ask: Callable[[], T]) -> T:
        """What a request gives; one that failed is made again where no library does that.

        Raises:
            FileNotFoundError, FileExistsError: as it says.
            StorageError: everything else, in one sentence.
        """
        for pause_s in (() if self._scheme in _RETRYING else _PAUSES_S) + (None,):
            try:
                return ask()
            except (FileExistsError, SparseIngestError):
                raise
            except Exception as error:
                if _is_missing(error):
                    raise FileNotFoundError(errno.ENOENT, "there is no such file", str(self)) from None
                if pause_s is None or not _may_pass(error):
                    # Not `from error`: what a library says may hold the address with its secrets.
                    raise self._failed(done, error) from None
            time.sleep(pause_s)
        raise AssertionError("the last attempt returns or raises")

    def _failed(self, done: str, error: Exception) -> StorageError:
        cause = _cause_of(error)
        said = cause.strerror if isinstance(cause, OSError) else None
        reason = without_secrets(first_line(Exception(said or str(cause) or type(cause).__name__)))
        if _is_refusal(error):
            advice = "Check the credentials in the environment, and what they allow"
        else:
            advice = "Check the address, the network and the credentials in the environment, and start again"
        return StorageError(f"{self} cannot be {done}: {reason}. {advice}: what is finished is kept.")


Place: TypeAlias = Path | RemotePath


def without_secrets(text: str) -> str:
    """A text whose addresses have neither user nor password nor query."""
    return _QUERY.sub(r"\1", _CREDENTIALS.sub("", text))


def _storage_of(scheme: str, address: str) -> tuple[Any, str]:
    """fsspec's file system for an address, and the address as that takes it."""
    extra = MissingExtraError("remote", f"Reading and writing {scheme}:// addresses")
    try:
        from fsspec.core import url_to_fs
    except ImportError:
        raise extra from None
    # What another process wrote must be seen: nothing that was listed is remembered.
    options: dict[str, Any] = {"use_listings_cache": False}
    if scheme in WEB:
        # What is asked for are bytes of the file, not of a compressed copy.
        options = {"client_kwargs": {"headers": {"Accept-Encoding": "identity"}}}
    try:
        storage, key = url_to_fs(address, **options)
    except ImportError as error:
        if scheme in WEB + _RETRYING:
            raise extra from None
        raise StorageError(f"{scheme}:// addresses need another package: {first_line(error)}.") from None
    except ValueError:
        raise UsageError(
            f"The scheme of {without_secrets(address)} is unknown. Known are s3://, gs://, https:// and what fsspec "
            "has a package for; a folder of this machine has no scheme."
        ) from None
    except Exception as error:
        reason = without_secrets(first_line(error))
        raise StorageError(f"{without_secrets(address)} cannot be reached: {reason}. Check the credentials.") from None
    return storage, str(key)


def _cause_of(error: BaseException) -> BaseException:
    """What was wrong: for the web every failure is told as a missing file, with the true one behind it."""
    if isinstance(error, FileNotFoundError) and error.__cause__ is not None:
        return error.__cause__
    return error


def _status_of(error: BaseException) -> int | None:
    status = getattr(_cause_of(error), "status", None)
    return status if isinstance(status, int) else None


def _is_missing(error: Exception) -> bool:
    if not isinstance(error, FileNotFoundError):
        return False
    module = type(_cause_of(error)).__module__
    return not module.startswith(("aiohttp", "asyncio")) or _status_of(error) in _MISSING_STATUS


def _is_refusal(error: Exception) -> bool:
    return isinstance(error, PermissionError) or _status_of(error) in (401, 403)


def _may_pass(error: Exception) -> bool:
    """Whether the same request may succeed a moment later."""
    status = _status_of(error)
    if status is not None:
        return status in (408, 429) or status >= 500
    return not isinstance(error, (PermissionError, NotImplementedError, ValueError, TypeError, IsADirectoryError))
