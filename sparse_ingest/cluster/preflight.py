"""What OpenSearch would refuse of a run, found before the first request.

In: the parts of the shards that are to be loaded, the rules that follow from the index. Out: a `Survey` (what was
seen, among it a histogram of the weights, which seismic.py fits its parameters to), or one error that counts every
broken rule and names the first documents of each. One pass in flat memory: whole arrays are looked at, single rows
only where an array holds something wrong.
Not covered: values of carried fields that the mapping does not take; a load reports those one by one.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from json.encoder import encode_basestring
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from sparse_ingest.cluster.client import Client
from sparse_ingest.cluster.scores import LOWEST_WEIGHT, weight_codes
from sparse_ingest.errors import ClusterError, RunError
from sparse_ingest.records import SparseRows

NAMED = 20  # documents that an error names for each rule
MAX_ID_BYTES = 512
MAX_TOKEN_BYTES = 32766  # of a term in Lucene
MAX_REQUEST_BYTES = 100 << 20  # http.max_content_length, unless the cluster says otherwise
# Lucene adds the codes of a document's weights up as its length, in 31 bits.
MAX_CODE_SUM = (1 << 31) - 1
_CODES = 1 << 16
_LOWEST_CODE = int(weight_codes(np.array([LOWEST_WEIGHT]))[0])
_INFINITE_CODE = int(weight_codes(np.array([np.inf]))[0])  # above it: NaN, then everything negative
_INFINITE_HALF = 0x7C00  # the same of float16 bits
_NAME_CHARACTERS = 80


class Part(Protocol):
    """Some rows of a shard."""

    @property
    def vectors(self) -> SparseRows: ...  # noqa: D102
    @property
    def fields(self) -> Sequence[str]: ...  # noqa: D102


@dataclass(frozen=True)
class Rules:
    """What the documents are measured by. `mappings` is that of the index, or of the body that will create it."""

    field: str
    vocabulary: Sequence[str | None]
    mappings: Mapping[str, Any]
    kind: Literal["rank_features", "sparse_vector"] = "rank_features"
    max_bytes: int = MAX_REQUEST_BYTES


class Survey(NamedTuple):
    """What a run holds; `codes[c]` counts the weights whose upper 9 bits are the code c."""

    documents: int
    terms: int
    codes: npt.NDArray[np.int64]


@dataclass
class _Broken:
    """One broken rule: what it says of a document, how often, and the first examples."""

    says: str
    count: int = 0
    examples: list[str] = field(default_factory=list)


def inspect(parts: Iterable[Part], rules: Rules) -> Survey:
    """Look at every document once.

    Raises:
        RunError: a rule is broken; all of them are named, with counts and the first documents.
    """
    inspector = _Inspector(rules)
    for part in parts:
        inspector.look_at(part)
    inspector.refuse()
    codes = inspector.codes()
    return Survey(inspector.documents, int(codes.sum()), codes)


def request_limit(client: Client) -> int:
    """The largest request that every node takes, in bytes; the default where the cluster does not tell."""
    name = "max_content_length_in_bytes"
    try:
        answer = client.call("GET", "/_nodes/http", params={"filter_path": f"nodes.*.http.{name}"})
    except ClusterError:
        return MAX_REQUEST_BYTES
    limits = [int(node["http"][name]) for node in (answer or {}).get("nodes", {}).values()]
    return min(limits, default=MAX_REQUEST_BYTES)


class _Inspector:
    """Collects what is wrong."""

    def __init__(self, rules: Rules) -> None:
        self.documents = 0
        self._codes = np.zeros(_CODES, dtype=np.int64)
        self._halves = np.zeros(_CODES, dtype=np.int64)  # of float16 weights, by their bits
        self._rules = rules
        self._broken: dict[str, _Broken] = {}
        names = rules.vocabulary
        if rules.kind == "sparse_vector":
            lengths = [len(str(token_id)) for token_id in range(len(names))]
        else:
            lengths = [0 if token is None else len(token.encode()) for token in names]
        self._longest = max(lengths, default=0)
        # What no document may use, by token id.
        self._no_token = np.array([token is None for token in names], dtype=np.bool_)
        self._too_long = np.array(lengths, dtype=np.int64) > MAX_TOKEN_BYTES
        self._lengths = np.array(lengths, dtype=np.int64)
        self._unusable = self._no_token | self._too_long
        self._any_unusable = bool(self._unusable.any())
        self._needles = {encode_basestring(name) for name in (rules.field, rules.field.partition(".")[0])}
        self._needles |= {json.dumps(name) for name in (rules.field, rules.field.partition(".")[0])}
        self._look_at_vocabulary()

    def look_at(self, part: Part) -> None:
        """Check the rows of one part."""
        vectors = part.vectors
        if not len(vectors.doc_ids) == len(part.fields) == len(vectors.indptr) - 1 or not (
            len(vectors.token_ids) == len(vectors.weights) == vectors.indptr[-1]
        ):
            raise RunError(
                f"A shard holds {len(vectors.token_ids)} token ids and {len(vectors.weights)} weights for "
                f"{len(vectors.doc_ids)} documents. The run is damaged: encode it again."
            )
        self.documents += len(vectors.doc_ids)
        self._look_at_ids(vectors.doc_ids)
        if len(vectors.weights):
            self._look_at_weights(vectors)
            self._look_at_tokens(vectors)
        self._look_at_fields(part)

    def codes(self) -> npt.NDArray[np.int64]:
        """How often each code was seen."""
        halves = np.arange(_INFINITE_HALF, dtype=np.uint16).view(np.float16)
        codes = self._codes.copy()
        np.add.at(codes, weight_codes(halves), self._halves[:_INFINITE_HALF])
        return codes

    def refuse(self) -> None:
        """Raise when a rule was broken."""
        if not self._broken:
            return
        lines = []
        for broken in self._broken.values():
            more = f", and {broken.count - len(broken.examples)} more" if broken.count > len(broken.examples) else ""
            lines.append(f"\n  {broken.says}: {', '.join(broken.examples)}{more}")
        raise RunError(
            f"OpenSearch would refuse documents of this run, so nothing was sent.{''.join(lines)}\n"
            "Correct the corpus or the settings that this names and encode again."
        )

    def _look_at_vocabulary(self) -> None:
        names = self._rules.vocabulary
        known = [token for token in names if token is not None]
        if self._rules.kind == "sparse_vector":
            return
        if len(set(known)) < len(known):
            seen: set[str] = set()
            for token in known:
                if token in seen:
                    self._note("twice", "token strings that stand for two ids", repr(token))
                seen.add(token)

    def _look_at_ids(self, doc_ids: Sequence[str]) -> None:
        # A character takes at most four bytes: only long ids need be encoded to be measured.
        lengths = list(map(len, doc_ids))
        if min(lengths, default=1) == 0 or max(lengths, default=0) > MAX_ID_BYTES // 4:
            for doc_id in doc_ids:
                if not 0 < len(doc_id.encode()) <= MAX_ID_BYTES:
                    self._note("ids", f"ids that are empty or longer than {MAX_ID_BYTES} bytes", _short(doc_id))

    def _look_at_weights(self, vectors: SparseRows) -> None:
        if vectors.weights.dtype == np.float16:
            counts = np.bincount(vectors.weights.view(np.uint16), minlength=_CODES)
            self._halves += counts
            lowest, infinite = 1, _INFINITE_HALF
        else:
            counts = np.bincount(weight_codes(vectors.weights), minlength=_CODES)
            self._codes += counts[:_CODES]
            lowest, infinite = _LOWEST_CODE, _INFINITE_CODE
        if counts[:lowest].any() or counts[infinite:].any():
            codes = weight_codes(vectors.weights)
            for place in np.flatnonzero((codes < _LOWEST_CODE) | (codes >= _INFINITE_CODE)).tolist():
                says = f"weights that are no finite numbers from {LOWEST_WEIGHT:.8g}"
                self._note("weights", says, f"{_at(vectors, place)} ({vectors.weights[place]:g})")
        lengths = np.diff(vectors.indptr)
        if lengths.max() > MAX_CODE_SUM // _INFINITE_CODE:
            before = np.concatenate(([0], np.cumsum(weight_codes(vectors.weights), dtype=np.int64)))
            sums = before[vectors.indptr[1:]] - before[vectors.indptr[:-1]]
            for row in np.flatnonzero(sums > MAX_CODE_SUM).tolist():
                says = "documents with more terms than OpenSearch can add up"
                self._note("terms", says, f"{_short(vectors.doc_ids[row])} ({lengths[row]} terms)")

    def _look_at_tokens(self, vectors: SparseRows) -> None:
        token_ids = vectors.token_ids
        if token_ids.max() >= len(self._unusable):
            for place in np.flatnonzero(token_ids >= len(self._unusable)).tolist():
                says = f"token ids that are not in vocab.json, which has {len(self._unusable)}"
                self._note("unknown", says, f"{_short(_row(vectors, place))} (id {token_ids[place]})")
        elif self._any_unusable and self._unusable[token_ids].any():
            for place in np.flatnonzero(self._no_token[token_ids]).tolist():
                says = "token ids that are no token by vocab.json"
                self._note("no token", says, f"{_short(_row(vectors, place))} (id {token_ids[place]})")
            for place in np.flatnonzero(self._too_long[token_ids]).tolist():
                says = f"tokens longer than {MAX_TOKEN_BYTES} bytes"
                self._note("long", says, f"{_short(_row(vectors, place))} (id {token_ids[place]})")
        # Ascending within a row; a row may begin with any id.
        falls = np.flatnonzero(token_ids[1:] <= token_ids[:-1]) + 1
        for place in np.setdiff1d(falls, vectors.indptr).tolist():
            says = "token ids that are not ascending, or stand twice in a document"
            self._note("order", says, f"{_short(_row(vectors, place))} (id {token_ids[place]})")

    def _look_at_fields(self, part: Part) -> None:
        vectors = part.vectors
        # Parsing every object would cost more than all the rest: look for the name first.
        found = {row for needle in self._needles for row, carried in enumerate(part.fields) if needle in carried}
        for row in sorted(found):
            if clashes(json.loads(part.fields[row]), self._rules.field):
                says = (
                    f"documents that carry a field {self._rules.field!r}, the name of the sparse field (choose another "
                    "one with --field, or leave that field out with encode --keep)"
                )
                self._note("clash", says, _short(vectors.doc_ids[row]))
        terms = np.diff(vectors.indptr)
        characters = np.fromiter(map(len, part.fields), dtype=np.int64, count=len(part.fields))
        # An upper bound first; a term costs quotes, colon, comma and at most 16 characters of a number.
        for row in np.flatnonzero(4 * characters + terms * (self._longest + 20) > self._rules.max_bytes).tolist():
            token_ids = vectors.row(row)[0]
            usable = token_ids[token_ids < len(self._lengths)]
            least = len(part.fields[row].encode()) + int(self._lengths[usable].sum()) + 5 * len(token_ids)
            if least > self._rules.max_bytes:
                says = f"documents that are larger than the {self._rules.max_bytes} bytes that a request may have"
                self._note("bytes", says, f"{_short(vectors.doc_ids[row])} ({least} bytes or more)")

    def _note(self, rule: str, says: str, example: str) -> None:
        broken = self._broken.setdefault(rule, _Broken(says))
        broken.count += 1
        if len(broken.examples) < NAMED:
            broken.examples.append(example)


def clashes(carried: object, name: str) -> bool:
    """Whether a document's fields hold the sparse field's name, or something that is no object on the way to it."""
    if not isinstance(carried, dict):
        return True
    if name in carried:
        return True
    first, dot, rest = name.partition(".")
    return bool(dot) and first in carried and clashes(carried[first], rest)


def _row(vectors: SparseRows, place: int) -> str:
    """The id of the document that a term belongs to."""
    return vectors.doc_ids[int(np.searchsorted(vectors.indptr, place, side="right")) - 1]


def _at(vectors: SparseRows, place: int) -> str:
    return f"{_short(_row(vectors, place))} token id {vectors.token_ids[place]}"


def _short(doc_id: str) -> str:
    return repr(doc_id if len(doc_id) <= _NAME_CHARACTERS else f"{doc_id[:_NAME_CHARACTERS]}…")
