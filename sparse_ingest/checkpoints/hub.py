"""Fetch a model from the hub into the hub's cache, with a message for each kind of failure.

huggingface_hub does the work: cache, locks between processes, token (HF_TOKEN, or the file of `hf auth login`),
HF_HUB_OFFLINE, HF_ENDPOINT and proxies. Only files that are read are fetched: no weights of other libraries, no
training state, a pickle only if a folder has no safetensors, Python code only on request.
"""

from __future__ import annotations

import logging
import sys
import time
from pathlib import Path
from typing import Any

from sparse_ingest.errors import CheckpointError, Interrupted, StorageError, first_line
from sparse_ingest.pipeline import packaged_names
from sparse_ingest.storage.hub_session import guard_hub, hub_address, refused_token, token_state, without_token
from sparse_ingest.storage.waiting import call_with_timeout

# The last one is a small pickle of tensors (BGE-M3).
FILES = ("*.json", "*.txt", "*.model", "*.safetensors", "sparse_linear.pt")
PICKLES = "pytorch_model*.bin"
SAFETENSORS = "model*.safetensors"  # preferred to pickles
CODE = "*.py"
CARD = "README.md"
# Copies of the model for other runtimes, and training state: gigabytes that are never read.
IGNORED = ["onnx/*", "openvino/*", "coreml/*", "runs/*", "checkpoint-*/*", "*/checkpoint-*/*", "original/*"]
# The first match is used: the class of a gated model is a subclass of RepositoryNotFoundError.
MESSAGES = {
    "GatedRepoError": "The model {name} is gated, and {token}: accept its conditions on its page on the hub, set "
    "HF_TOKEN to a token of that account, then try again.",
    "RepositoryNotFoundError": "No model {name!r}: looked for a folder of that name here, and for a model of that name "
    "on the hub {hub}, where {token}. Correct the name; for a private model set HF_TOKEN to a token that may read it.",
    "RevisionNotFoundError": "The model {name} has no revision {revision!r} on the hub: looked for a branch, a tag and "
    "a commit of that name. Correct [model] revision, or omit it for the newest.",
    "HFValidationError": "{name!r} is not the name of a model ({reason}). Give a folder, package:NAME/PATH, or a hub "
    "id (owner/name).",
}
LINE_EVERY_S = 30.0
BARS_AFTER_S = 1.0


def fetch(name: str, revision: str | None = None, *, code: bool = False) -> Path:
    """Fetch the missing files of a model, and return its snapshot folder.

    Raise `CheckpointError` if neither the hub nor the cache has the model, `StorageError` if the hub does not answer.
    """
    received = [0]
    guard_hub()
    place, advice = f"the hub {hub_address()}, for the model {name}", " HF_HUB_OFFLINE=1 reads only the cache."
    try:
        folder = call_with_timeout(
            lambda: _download(name, revision, code, received), place, received=lambda: received[0], advice=advice
        )
    except (StorageError, Interrupted):
        raise
    except Exception as error:  # of requests, httpx or httpx2, by the release of huggingface_hub
        pipeline = f" {name!r} is a packaged pipeline: pass --pipeline {name}." if name in packaged_names() else ""
        raise CheckpointError(without_token(_message(name, revision, error)) + pipeline) from error
    if not folder.is_dir():
        raise CheckpointError(
            f"The model {name} on the hub has no file of a checkpoint: looked for {', '.join(FILES)} and {PICKLES}. "
            "Name a repository that has a model."
        )
    return folder


def _download(name: str, revision: str | None, code: bool, received: list[int]) -> Path:
    from huggingface_hub import constants, snapshot_download

    # Bytes between two reports of progress: 10 MB, the default, take longer than the deadline on a slow line.
    constants.DOWNLOAD_CHUNK_SIZE = min(constants.DOWNLOAD_CHUNK_SIZE, 1 << 20)

    def snapshot(at: str | None, *more: str) -> Path:
        patterns = [*FILES, CARD, *([CODE] if code else []), *more]
        bars = _bars(name, received)
        folder = snapshot_download(name, revision=at, allow_patterns=patterns, ignore_patterns=IGNORED, tqdm_class=bars)
        return Path(folder)

    folder = snapshot(revision)
    places = sorted({path.parent for path in folder.rglob("*.json")})
    bare = [place for place in places if not list(place.glob(SAFETENSORS))]
    if not bare:
        return folder
    inner = (path.relative_to(folder).as_posix() for path in bare)
    return snapshot(folder.name, *(PICKLES if path == "." else f"{path}/{PICKLES}" for path in inner))


def _bars(name: str, received: list[int]) -> Any:
    """Return a class of progress bars: bars on a terminal, otherwise a line every 30 s; none if all files are cached.

    `received` counts the bytes; a complete file adds 1 MB.
    """
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled
    from tqdm import tqdm

    hidden = are_progress_bars_disabled() or logging.getLogger("sparse_ingest").level >= logging.WARNING
    terminal = sys.stderr.isatty()
    began = last = time.monotonic()

    class Bars(tqdm):  # type: ignore[type-arg]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self.unit_bytes = 1 if kwargs.get("unit") == "B" else 1 << 20
            super().__init__(*args, **{**kwargs, "leave": False, "disable": hidden})

        def update(self, n: float | None = 1) -> bool | None:
            received[0] += int(n or 0) * self.unit_bytes
            return super().update(n)

        def display(self, *args: Any, **kwargs: Any) -> Any:
            nonlocal last
            now, total = time.monotonic(), self.total or 0
            if terminal:
                return now - began >= BARS_AFTER_S and super().display(*args, **kwargs)
            if not hidden and self.unit == "B" and 0 < self.n < total and now - last >= LINE_EVERY_S:
                last = now
                done, size = (self.format_sizeof(count, "B", 1024) for count in (self.n, total))
                sys.stderr.write(f"Downloading {name}: {done} of {size}\n")
            return False

    return Bars


def _message(name: str, revision: str | None, error: Exception) -> str:
    from huggingface_hub import errors

    at = f" at revision {revision!r}" if revision else ""
    if isinstance(error, errors.LocalEntryNotFoundError):
        return _out_of_reach(name, at, error)
    known = {"name": name, "revision": revision, "hub": hub_address(), "token": token_state()}
    for kind, message in MESSAGES.items():
        if isinstance(error, getattr(errors, kind)):
            return message.format(**known, reason=first_line(error))
    if refused := refused_token(error):
        return refused
    return f"The model {name}{at} cannot be fetched from the hub {hub_address()} ({first_line(error)}). Try again."


def _out_of_reach(name: str, at: str, error: Exception) -> str:
    from huggingface_hub import constants

    found = "only a part of it" if getattr(error, "snapshot_path", None) else f"no model of that name{at}"
    state = f"the hub {hub_address()} cannot be reached ({first_line(error.__cause__ or error)})"
    advice = "Try again when the hub can be reached"
    if constants.HF_HUB_OFFLINE:
        state, advice = "the hub is not contacted (HF_HUB_OFFLINE is set)", "Fetch it once without HF_HUB_OFFLINE"
    return (
        f"No folder {name!r} here, and {state}: the cache {constants.HF_HUB_CACHE} has {found}. {advice}, or name a "
        "folder or package:NAME/PATH."
    )
