"""A model of the hub as a folder of the hub's own cache, and one sentence for each way that this can fail.

In: a hub id and a revision. Out: the snapshot folder, whose name is the commit. huggingface_hub does the work: its
cache, its locks between processes, its token (HF_TOKEN, or the file that `hf auth login` writes), its HF_HUB_OFFLINE,
HF_ENDPOINT and proxies. A connection that breaks is taken up where it broke; after a start that was killed, whole
files stay and the file that was under way begins again. Only what is read is fetched: no other library's weights, no
training state, a pickle only where a folder has no safetensors, Python code only when it is asked for. Not covered:
what the files mean (layouts.py).
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

from sparse_ingest.errors import CheckpointError, Interrupted, StorageError, first_line
from sparse_ingest.storage.hub_session import guard_hub, hub_address, hub_token
from sparse_ingest.storage.places import without_secrets
from sparse_ingest.storage.waiting import answered

FILES = ("*.json", "*.txt", "*.model", "*.safetensors")
PICKLES = "pytorch_model*.bin"
CODE = "*.py"
CARD = "README.md"
# Copies of the model for other runtimes, and what training left behind: gigabytes that are never read.
IGNORED = ["onnx/*", "openvino/*", "coreml/*", "runs/*", "checkpoint-*/*", "*/checkpoint-*/*", "original/*"]
# The first class that an error has decides: a gated model is a repository that is not found, too.
MESSAGES = {
    "GatedRepoError": "The model {name} is gated, and {token}: accept its conditions on its page on the hub, set "
    "HF_TOKEN to a token of that account, then try again.",
    "RepositoryNotFoundError": "No model {name!r}: looked for a folder of that name here, and for a model of that name "
    "on the hub {hub}, where {token}. Correct the name; for a private model set HF_TOKEN to a token that may read it.",
    "RevisionNotFoundError": "The model {name} has no revision {revision!r} on the hub: looked for a branch, a tag and "
    "a commit of that name. Correct [model] revision, or omit it for the newest.",
    "HFValidationError": "{name!r} is no model of the hub ({reason}). Give a folder, package:NAME/PATH, or a hub id "
    "(owner/name).",
}
LINE_EVERY_S = 30.0
BARS_AFTER_S = 1.0


def fetch(name: str, revision: str | None = None, *, code: bool = False) -> Path:
    """Fetch what is missing of a model, and return its snapshot folder.

    Raises:
        CheckpointError: the hub, or the cache where the hub is out of reach, does not give it.
        StorageError: the hub is silent.
    """
    received = [0]
    guard_hub()
    place, advice = f"the hub {hub_address()}, for the model {name}", " HF_HUB_OFFLINE=1 reads only the cache."
    try:
        folder = answered(
            lambda: _download(name, revision, code, received), place, received=lambda: received[0], advice=advice
        )
    except (StorageError, Interrupted):
        raise
    # huggingface_hub speaks through requests, httpx or httpx2 by its release: their errors share no base class.
    except Exception as error:
        raise CheckpointError(_without_token(_sentence(name, revision, error))) from error
    if not folder.is_dir():
        raise CheckpointError(
            f"The model {name} on the hub has no file that a checkpoint is read from: looked for {', '.join(FILES)} "
            f"and {PICKLES}. Name a repository that holds a model."
        )
    return folder


def _download(name: str, revision: str | None, code: bool, received: list[int]) -> Path:
    from huggingface_hub import constants, snapshot_download

    # Bytes between two reports of progress: the default of 10 MB takes longer than the deadline on a slow line.
    constants.DOWNLOAD_CHUNK_SIZE = min(constants.DOWNLOAD_CHUNK_SIZE, 1 << 20)

    def snapshot(at: str | None, *more: str) -> Path:
        patterns = [*FILES, CARD, *([CODE] if code else []), *more]
        bars = _bars(name, received)
        folder = snapshot_download(name, revision=at, allow_patterns=patterns, ignore_patterns=IGNORED, tqdm_class=bars)
        return Path(folder)

    folder = snapshot(revision)
    places = sorted({path.parent for path in folder.rglob("*.json")})
    bare = [place for place in places if not list(place.glob("*.safetensors"))]
    if not bare:
        return folder
    # The listing of this commit is in the cache by now; folders without any weights, such as a pooling, cost nothing.
    inner = (path.relative_to(folder).as_posix() for path in bare)
    return snapshot(folder.name, *(PICKLES if path == "." else f"{path}/{PICKLES}" for path in inner))


def _bars(name: str, received: list[int]) -> Any:
    """The class of progress bars that the hub's library shows: on a terminal as bars, elsewhere as plain lines.

    A start that finds everything in the cache shows nothing. `received` counts the bytes; a complete file adds 1 MB.
    """
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled
    from tqdm import tqdm

    hidden, terminal = are_progress_bars_disabled(), sys.stderr.isatty()
    began = last = time.monotonic()

    class Bars(tqdm):  # type: ignore[type-arg]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self.unit_bytes = 1 if kwargs.get("unit") == "B" else 1 << 20
            # Left standing, a bar ends in an empty line elsewhere.
            super().__init__(*args, **{**kwargs, "leave": False, "disable": hidden})

        def update(self, n: float | None = 1) -> bool | None:
            received[0] += int(n or 0) * self.unit_bytes
            return super().update(n)

        def display(self, *args: Any, **kwargs: Any) -> Any:
            nonlocal last
            now, total = time.monotonic(), self.total or 0
            if terminal:
                return now - began >= BARS_AFTER_S and super().display(*args, **kwargs)
            # One of the bars counts files, the others bytes; the bytes say more.
            if self.unit == "B" and 0 < self.n < total and now - last >= LINE_EVERY_S:
                last = now
                done, whole = (self.format_sizeof(count, "B", 1024) for count in (self.n, total))
                sys.stderr.write(f"Downloading {name}: {done} of {whole}\n")
            return False

    return Bars


def _sentence(name: str, revision: str | None, error: Exception) -> str:
    """Describe what went wrong, what was looked for, and what to do."""
    from huggingface_hub import errors

    at = f" at revision {revision!r}" if revision else ""
    if isinstance(error, errors.LocalEntryNotFoundError):
        return _out_of_reach(name, at, error)
    known = {"name": name, "revision": revision, "hub": hub_address(), "token": _token_in_words()}
    for kind, message in MESSAGES.items():
        if isinstance(error, getattr(errors, kind)):
            return message.format(**known, reason=first_line(error))
    if getattr(getattr(error, "response", None), "status_code", None) == 401:
        return (
            f"The hub {hub_address()} refuses the token that was sent for the model {name}. Set HF_TOKEN to one "
            "that is valid, or to none for a public model."
        )
    return f"The model {name}{at} cannot be fetched from the hub {hub_address()} ({first_line(error)}). Try again."


def _out_of_reach(name: str, at: str, error: Exception) -> str:
    """Describe why neither the hub nor the cache has the model."""
    from huggingface_hub import constants

    found = "only a part of it" if getattr(error, "snapshot_path", None) else f"no model of that name{at}"
    lacking = f"the cache {constants.HF_HUB_CACHE} has {found}"
    if constants.HF_HUB_OFFLINE:
        return (
            f"No folder {name!r} here, and the hub is not asked (HF_HUB_OFFLINE is set): {lacking}. "
            "Fetch it once without HF_HUB_OFFLINE, or name a folder or package:NAME/PATH."
        )
    reason = first_line(error.__cause__ or error)
    return (
        f"No folder {name!r} here, and the hub {hub_address()} cannot be reached ({reason}): {lacking}. "
        "Try again with the hub in reach, or name a folder or package:NAME/PATH."
    )


def _token_in_words() -> str:
    return "the token that was sent does not open it" if hub_token() else "no token was sent"


def _without_token(message: str) -> str:
    """A token with a letter that no header can hold is quoted by the HTTP library's error."""
    for token in {hub_token(), os.environ.get("HF_TOKEN"), os.environ.get("HUGGING_FACE_HUB_TOKEN")} - {None, ""}:
        message = message.replace(str(token), "(token)").replace(repr(token)[1:-1], "(token)")
    return without_secrets(message)
