"""The manifest of a run: its identity, the hash of that, and the differences between two identities.

In: the settings of the model and of the vectors, as a JSON object. Out: `run_id`, and the differences that prevent a
resume. Versions, devices, paths and times are recorded in done/ and not compared.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Annotated, Any, NamedTuple

from msgspec import Meta

from sparse_ingest.pipeline import EncodeSettings, ModelSettings
from sparse_ingest.storage.foreign_json import checked

FORMAT = 1
SHARD_ROWS = 65536
Identity = dict[str, Any]
_SETTINGS = set(EncodeSettings.__dataclass_fields__)
Count = Annotated[int, Meta(ge=0, le=1 << 53)]


@dataclass(frozen=True)
class Manifest:
    """The content of manifest.json.

    `model` has the checkpoint as the user named it and the resolved settings, so that a search can use the same one.
    `auto` records what each `auto` chose and why. `vocabulary_sha256` is the hash of vocab.json, "" in runs of earlier
    releases. None of them is part of the identity.
    """

    format: int
    run_id: str
    identity: Identity
    shard_rows: Annotated[int, Meta(ge=1)]
    model: dict[str, Any] = field(default_factory=dict)
    auto: dict[str, Any] = field(default_factory=dict)
    vocabulary_sha256: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        """Raise ValueError if the parts do not belong together, or a setting has a value of the wrong type."""
        if self.run_id != run_id(self.identity):
            raise ValueError("run_id is not the hash of the identity")
        checked({name: self.identity[name] for name in _SETTINGS & self.identity.keys()}, EncodeSettings)
        for settings in (self.model, self.model.get("query_side") or {}):
            checked(settings, _RecordedModel)


@dataclass(frozen=True)
class _RecordedModel(ModelSettings):
    """The keys of `model` and of its `query_side` that are read."""

    sha256: str | None = None
    kind: str | None = None


class Difference(NamedTuple):
    """A setting in which two identities differ; `stored` or `requested` is None if that identity lacks it."""

    setting: str
    stored: object
    requested: object

    def in_words(self, of: str) -> str:
        """Return both values, for a message; `of` is what stores the first one."""
        stored, requested = ("none" if value is None else repr(value) for value in self[1:])
        return f"{self.setting}: {of} has {stored}, requested: {requested}"


def canonical_json(value: object) -> str:
    """Return the canonical JSON of a value: sorted keys, no spaces, no escapes for non-ASCII characters."""
    return json.dumps(value, ensure_ascii=False, sort_keys=True, separators=(",", ":"), allow_nan=False)


def run_id(identity: Identity) -> str:
    """Return the SHA-256 of the canonical JSON, in hexadecimal."""
    return hashlib.sha256(canonical_json(identity).encode()).hexdigest()


def identity_of(content: dict[str, Any]) -> tuple[str, Identity]:
    """Add the format to an identity. Return its hash, and the identity as JSON returns it."""
    identity: Identity = json.loads(canonical_json({"format": FORMAT, **content}))
    return run_id(identity), identity


def differences(stored: Identity, requested: Identity) -> list[Difference]:
    """Return the settings in which two identities differ, by dotted name, sorted by name."""
    before, after = dict(flattened(stored)), dict(flattened(requested))
    both = (Difference(name, before.get(name), after.get(name)) for name in sorted(before.keys() | after.keys()))
    return [one for one in both if one.stored != one.requested]


def flattened(value: object, prefix: str = "") -> Iterator[tuple[str, object]]:
    """Yield the dotted name and the value of each setting in nested objects."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from flattened(inner, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, value
