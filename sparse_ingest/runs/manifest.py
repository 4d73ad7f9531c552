"""What makes two runs the same: an identity, its hash, and the differences between two of them.

In: a JSON object of everything that changes a number. Out: `run_id`, and named differences for the message that
refuses to resume. Not covered: what is only recorded (versions, devices, paths, times); that lies in done/.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

FORMAT = 1
SHARD_ROWS = 65536
Identity = dict[str, Any]


@dataclass(frozen=True)
class Manifest:
    """The content of manifest.json.

    `model` names the checkpoint as it was given and what its settings resolved to, so that a search can use the
    same one; `auto` says what each `auto` chose and why. Neither is part of the identity.
    """

    format: int
    run_id: str
    identity: Identity
    shard_rows: int
    model: dict[str, Any]
    auto: dict[str, Any]


class Difference(NamedTuple):
    """One setting that two identities disagree on; `None` stands for a setting that is not there."""

    setting: str
    stored: object
    asked: object


def canonical_json(value: object) -> str:
    """The one spelling of a JSON value: sorted keys, no spaces, UTF-8 left as it is."""
    return json.dumps(value, ensure_ascii=False, sort_keys=True, separators=(",", ":"), allow_nan=False)


def run_id(identity: Identity) -> str:
    """SHA-256 of the canonical JSON, in hexadecimal."""
    return hashlib.sha256(canonical_json(identity).encode()).hexdigest()


def identity_of(content: dict[str, Any]) -> tuple[str, Identity]:
    """Complete an identity with the format, as JSON will give it back; its hash comes first."""
    identity: Identity = json.loads(canonical_json({"format": FORMAT, **content}))
    return run_id(identity), identity


def differences(stored: Identity, asked: Identity) -> list[Difference]:
    """The settings in which two identities differ, by dotted name, in order of name."""
    before, after = dict(_flatten(stored)), dict(_flatten(asked))
    names = sorted(before.keys() | after.keys())
    return [
        Difference(name, before.get(name), after.get(name)) for name in names if before.get(name) != after.get(name)
    ]


def _flatten(value: object, prefix: str = "") -> Iterator[tuple[str, object]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _flatten(inner, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, value
