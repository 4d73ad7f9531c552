"""Token maps: the keys of tokens in a sparse_vector (SEISMIC) field, which distinguishes 32,768 keys.

The key of a token is its id, unless a load has ids of 32,768 or more. Then the ids that occur are numbered in ascending
order, and the map is in the stamp of the index before its first document. Later loads append ids, so the key of a token
never changes. In `_meta` the map is `bitmap`, with bit n of byte b for id 8b + n, compressed by zlib, in base64; and
`appended`, a list of ids.
"""

from __future__ import annotations

import base64
import zlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypedDict

import numpy as np
import numpy.typing as npt

from sparse_ingest.storage.foreign_json import checked

# From id 32,768 on, releases 3.3 to 3.8 crash or score wrongly (16 bits with a sign), and later ones confuse two ids.
MAX_KEYS = 1 << 15
_MAX_BITMAP_BYTES = 1 << 20  # 8 million token ids


class _Meta(TypedDict):
    bitmap: str
    appended: list[int]


class TokenMap(NamedTuple):
    """The token ids of an index by key: `first` in ascending order, then those that later loads `appended`."""

    first: npt.NDArray[np.int64]
    appended: Sequence[int] = ()

    @property
    def ids(self) -> list[int]:
        """The token id of each key."""
        return [*self.first.tolist(), *self.appended]

    def extended(self, token_ids: npt.NDArray[np.int64]) -> TokenMap:
        """Return the map with the ids that it lacks appended, in ascending order."""
        return self._replace(appended=(*self.appended, *np.setdiff1d(token_ids, self.ids).tolist()))

    def as_meta(self) -> dict[str, Any]:
        """Return the JSON object for `_meta`."""
        bits = np.zeros(int(self.first.max(initial=-1)) + 1, dtype=np.bool_)
        bits[self.first] = True
        packed = zlib.compress(np.packbits(bits, bitorder="little").tobytes(), 9)
        return {"bitmap": base64.b64encode(packed).decode(), "appended": list(self.appended)}


def read_token_map(meta: Mapping[str, Any] | None) -> TokenMap | None:
    """Return the map in a stamp; None if there is none. Raise ValueError if it cannot be read."""
    if meta is None:
        return None
    content = checked(meta, _Meta)
    decoder = zlib.decompressobj()
    try:
        packed = decoder.decompress(base64.b64decode(content["bitmap"], validate=True), _MAX_BITMAP_BYTES)
    except zlib.error as error:
        raise ValueError(f"its token_map is damaged: {error}") from error
    if not decoder.eof:
        raise ValueError("its token_map is damaged: the bitmap is too long or incomplete")
    bits = np.unpackbits(np.frombuffer(packed, dtype=np.uint8), bitorder="little")
    found = TokenMap(np.flatnonzero(bits).astype(np.int64), tuple(content["appended"]))
    possible = all(0 <= token_id < 8 * _MAX_BITMAP_BYTES for token_id in found.appended)
    if len(found.ids) > MAX_KEYS or len(set(found.ids)) < len(found.ids) or not possible:
        raise ValueError("its token_map is damaged: it has repeated, impossible or too many ids")
    return found


def token_id_keys(vocabulary: Sequence[str | None], token_map: TokenMap | None = None) -> list[str | None]:
    """Return the key of each token id in a sparse_vector field; None for an id that has no token or no key.

    Without a map these are the ids below 32,768.
    """
    keys: list[str | None] = [None] * len(vocabulary)
    for key, token_id in enumerate(token_map.ids if token_map else range(min(len(vocabulary), MAX_KEYS))):
        if token_id < len(vocabulary) and vocabulary[token_id] is not None:
            keys[token_id] = str(key)
    return keys
