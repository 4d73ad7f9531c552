"""Corpus files at addresses: s3://bucket/folder, gs://bucket/*.jsonl.gz, https://host/corpus.parquet.

In: what `--corpus` named, if it has a scheme. Out: `StoredFile`s, which are read in ranges, so that a run goes on where
it stopped. A folder or a glob stands for its files as on this machine; on the web each file is named.

Not covered: the way to the bytes (places.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import BinaryIO, cast

from sparse_ingest.corpora.documents import printable
from sparse_ingest.corpora.stored import changed
from sparse_ingest.errors import CorpusError
from sparse_ingest.storage.places import RemotePath, without_secrets

ChooseFiles = Callable[[Sequence[str], str], list[str]]


@dataclass(frozen=True)
class RemoteStoredFile:
    """A file at an address, as it was when it was found; `version` is what the store told its contents apart by."""

    path: RemotePath
    bytes: int
    version: str | None

    @property
    def name(self) -> str:
        """The last part of its address."""
        return printable(self.path.name)

    @property
    def place(self) -> str:
        """Its address, without what stands behind a question mark and without credentials."""
        return printable(str(self.path))

    def open(self) -> BinaryIO:
        """Its bytes from the start, fetched ahead of their reader."""
        return cast(BinaryIO, self.path.open("rb"))

    def refuse_changed(self) -> None:
        """Raises `CorpusError` if the store has another size or version now."""
        now = self.path.about() or {}
        if now.get("size") != self.bytes:
            raise changed(self.place, f"it had {self.bytes} bytes at first and has {now.get('size', 'none')} now")
        if now.get("version") != self.version:
            raise changed(self.place, "it was replaced by another of the same size")


def remote_files(spec: str, choose: ChooseFiles) -> list[RemoteStoredFile]:
    """The files that an address stands for; `choose` says which of the names in a folder are the corpus."""
    path = RemotePath.at(spec)
    about = path.about() if not spec.endswith("/") or not path.listable else {"type": "directory"}
    if about and about["type"] != "directory":
        return [_found(path)]
    if about is None and path.listable and any(sign in spec for sign in "*?["):
        files = [one for one in path.matching() if _is_shown(one)]
        if not files:
            raise CorpusError(f'No file matches the glob "{without_secrets(spec)}". Check the folder and the suffix.')
        return [_found(file) for file in files]
    if about is None:
        advice = "Check the address." if path.listable else "Check it; on the web each file is named by itself."
        raise CorpusError(f'There is no file or folder "{path}". {advice}')
    names = _names_in(path)
    return [_found(_inside(path, name)) for name in choose(names, str(path))]


def _names_in(folder: RemotePath) -> list[str]:
    """What lies in a folder, by its name within it; of a subfolder named corpus what lies in that."""
    names = []
    for one in filter(_is_shown, folder.iterdir()):
        names.append(one.name)
        if one.name == "corpus" and one.is_dir():
            names += [f"corpus/{inner.name}" for inner in filter(_is_shown, one.iterdir())]
    return names


def _inside(folder: RemotePath, name: str) -> RemotePath:
    for part in name.split("/"):
        folder = folder / part
    return folder


def _is_shown(path: RemotePath) -> bool:
    return not path.name.startswith(".")


def _found(path: RemotePath) -> RemoteStoredFile:
    about = path.about()
    if about is None:
        raise CorpusError(f'There is no file or folder "{path}". Check the address.')
    if about["type"] != "file":
        raise CorpusError(
            f'"{path}" is not a file. A folder or glob stands for files only: narrow it to a glob such as *.jsonl.'
        )
    if about["size"] is None:
        raise CorpusError(f"{path} has no known size: its server does not tell. Download it, and name the file.")
    return RemoteStoredFile(path, about["size"], about["version"])
