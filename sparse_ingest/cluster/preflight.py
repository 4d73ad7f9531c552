"""Preflight: find every document that a cluster would refuse, before the first request is sent.

In: the parts of the shards to load, whose arrays were checked when they were read (runs/shards.py). Out: a
`PreflightReport`, or one error that counts each broken rule and names its first documents. One pass, constant memory.

Not covered: titles and texts that the mapping does not accept; a load reports those one by one.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from json.encoder import encode_basestring
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from sparse_ingest.cluster.client import Client
from sparse_ingest.cluster.kept_fields import KeptFields
from sparse_ingest.cluster.scores import LOWEST_WEIGHT, weight_codes
from sparse_ingest.errors import ClusterError, RunError, short_repr
from sparse_ingest.records import MAX_ID_BYTES, SparseRows, field_path, is_within
from sparse_ingest.runs.shards import ShardPart, parse_fields

NAMED_DOCUMENTS = 20  # documents that an error names for each rule
MAX_TOKEN_BYTES = 32766  # of a term in Lucene
MAX_REQUEST_BYTES = 100 << 20  # the default of http.max_content_length
MAX_CODE_SUM = (1 << 31) - 1  # Lucene's length of a document: the sum of the codes of its weights, in 31 bits
_CODES = 1 << 16
_LOWEST_CODE = int(weight_codes(np.array([LOWEST_WEIGHT]))[0])
_INFINITE_CODE = int(weight_codes(np.array([np.inf]))[0])


@dataclass(frozen=True)
class IndexLimits:
    """Limits on the documents of an index. `kept` reads their fields in the same pass; None if none are sent."""

    field: str
    vocabulary: Sequence[str | None]
    kind: Literal["rank_features", "sparse_vector"] = "rank_features"
    max_bytes: int = MAX_REQUEST_BYTES
    kept: KeptFields | None = None


class PreflightReport(NamedTuple):
    """Counts of a run without errors. `codes[c]` counts the weights whose upper 9 bits are the code c.

    `token_ids` has each id that occurs once, in ascending order.
    """

    documents: int
    terms: int
    codes: npt.NDArray[np.int64]
    token_ids: npt.NDArray[np.int64]


def check_documents(parts: Iterable[ShardPart], limits: IndexLimits) -> PreflightReport:
    """Check every document once, or raise `RunError` with a count and the first documents of each broken rule."""
    checker = _DocumentChecker(limits)
    for part in parts:
        checker.check(part)
    checker.refuse()
    return PreflightReport(checker.documents, int(checker.codes.sum()), checker.codes, np.flatnonzero(checker.occurs))


def request_limit(client: Client) -> int:
    """Return the largest request that every node accepts, in bytes; the default if the cluster does not report it."""
    name = "max_content_length_in_bytes"
    try:
        answer = client.call("GET", "/_nodes/http", params={"filter_path": f"nodes.*.http.{name}"})
    except ClusterError:
        return MAX_REQUEST_BYTES
    limits = [int(node["http"][name]) for node in (answer or {}).get("nodes", {}).values()]
    return min(limits, default=MAX_REQUEST_BYTES)


class _DocumentChecker:
    """Collects broken rules and the histogram of weights."""

    def __init__(self, limits: IndexLimits) -> None:
        self.documents = 0
        self.codes = np.zeros(_CODES, dtype=np.int64)
        self.occurs = np.zeros(len(limits.vocabulary), dtype=np.bool_)  # by token id
        self._limits = limits
        # By the message of a broken rule.
        self._counts: Counter[str] = Counter()
        self._examples: dict[str, list[str]] = {}
        names, field = limits.vocabulary, limits.field
        keys = map(str, range(len(names))) if limits.kind == "sparse_vector" else (token or "" for token in names)
        self._lengths = np.array([len(key.encode()) for key in keys], dtype=np.int64)
        self._no_token = np.array([token is None for token in names], dtype=np.bool_)
        self._too_long = self._lengths > MAX_TOKEN_BYTES
        self._any_unusable = bool((self._no_token | self._too_long).any())
        first = field.partition(".")[0]  # without the closing quote, since "sparse.x" clashes with sparse
        self._needles = {spell(first)[:-1] for spell in (encode_basestring, json.dumps)}
        if limits.kind != "sparse_vector":
            counts = Counter(token for token in names if token is not None)
            for token in (token for token, count in counts.items() if count > 1):
                self._note("tokens that have several ids", repr(token))

    def check(self, part: ShardPart) -> None:
        """Check the rows of one part."""
        self.documents += len(part.rows)
        self._check_ids(part.vectors.doc_ids)
        if len(part.vectors.weights):
            self._check_terms(part.vectors)
        self._check_fields(part)

    def refuse(self) -> None:
        """Raise `RunError` if a rule was broken."""
        if not self._examples:
            return
        lines = []
        for rule, examples in self._examples.items():
            more = self._counts[rule] - len(examples)
            lines.append(f"\n  {rule}: {', '.join(examples)}{f', and {more} more' if more else ''}")
        raise RunError(
            f"The cluster would refuse documents of this run, so nothing was sent.{''.join(lines)}\n"
            "Change the settings named above, or fix the corpus and encode it again."
        )

    def _check_ids(self, doc_ids: Sequence[str]) -> None:
        # A character takes at most four bytes, so only long ids are encoded.
        lengths = list(map(len, doc_ids))
        if min(lengths, default=1) == 0 or max(lengths, default=0) > MAX_ID_BYTES // 4:
            for doc_id in doc_ids:
                if not 0 < len(doc_id.encode()) <= MAX_ID_BYTES:
                    self._note(f"ids that are empty or longer than {MAX_ID_BYTES} bytes", short_repr(doc_id))

    def _check_terms(self, vectors: SparseRows) -> None:
        token_ids, codes = vectors.token_ids, weight_codes(vectors.weights)
        self.occurs[token_ids] = True
        counts = np.bincount(codes, minlength=_CODES)
        self.codes += counts
        if counts[:_LOWEST_CODE].any():
            for place in np.flatnonzero(codes < _LOWEST_CODE).tolist():
                example = f"token id {token_ids[place]} ({vectors.weights[place]:g})"
                self._note(f"weights below {LOWEST_WEIGHT:.8g}", f"{_document(vectors, place)} {example}")
        lengths = np.diff(vectors.indptr)
        if lengths.max() > MAX_CODE_SUM // _INFINITE_CODE:
            before = np.concatenate(([0], np.cumsum(codes, dtype=np.int64)))
            sums = before[vectors.indptr[1:]] - before[vectors.indptr[:-1]]
            for row in np.flatnonzero(sums > MAX_CODE_SUM).tolist():
                example = f"{short_repr(vectors.doc_ids[row])} ({lengths[row]} terms)"
                self._note("documents with more terms than Lucene can add up", example)
        if self._any_unusable:
            self._note_terms("token ids without a token in vocab.json", vectors, self._no_token[token_ids])
            self._note_terms(f"tokens longer than {MAX_TOKEN_BYTES} bytes", vectors, self._too_long[token_ids])

    def _check_fields(self, part: ShardPart) -> None:
        vectors = part.vectors
        # Parsing every object would cost more than all the rest: look for the name first.
        found = {row for needle in self._needles for row, carried in enumerate(part.fields) if needle in carried}
        for row in sorted(found):
            if clashes(parse_fields(part.fields[row], vectors.doc_ids[row]), self._limits.field):
                self._note(
                    f"documents that carry a field {self._limits.field!r}, the name of the sparse field (pass "
                    "another --field, or encode with a --keep that omits it)",
                    short_repr(vectors.doc_ids[row]),
                )
        if self._limits.kept is not None and self._limits.kept.is_needed:
            for rule, example in self._limits.kept.read(vectors.doc_ids, part.fields):
                self._note(rule, example)
        terms = np.diff(vectors.indptr)
        characters = np.fromiter(map(len, part.fields), dtype=np.int64, count=len(part.fields))
        # An upper bound first; a term costs quotes, colon, comma and at most 16 characters of a number.
        most = 4 * characters + terms * (self._lengths.max(initial=0) + 20)
        for row in np.flatnonzero(most > self._limits.max_bytes).tolist():
            token_ids = vectors.row(row)[0]
            least = len(part.fields[row].encode()) + int(self._lengths[token_ids].sum()) + 5 * len(token_ids)
            if least > self._limits.max_bytes:
                self._note(
                    f"documents larger than the {self._limits.max_bytes} bytes that a request may have",
                    f"{short_repr(vectors.doc_ids[row])} ({least} bytes or more)",
                )

    def _note_terms(self, rule: str, vectors: SparseRows, broken: npt.NDArray[np.bool_]) -> None:
        for place in np.flatnonzero(broken).tolist():
            self._note(rule, f"{_document(vectors, place)} (id {vectors.token_ids[place]})")

    def _note(self, rule: str, example: str) -> None:
        self._counts[rule] += 1
        examples = self._examples.setdefault(rule, [])
        if len(examples) < NAMED_DOCUMENTS:
            examples.append(example)


def clashes(carried: object, name: str) -> bool:
    """Return whether fields contain the sparse field, or a value other than an object on the path to it."""
    if not isinstance(carried, dict):
        return True
    for key, value in carried.items():
        path = field_path(key)
        if is_within(path, name):
            return True
        if name.startswith(f"{path}.") and clashes(value, name.removeprefix(f"{path}.")):
            return True
    return False


def _document(vectors: SparseRows, place: int) -> str:
    """Return the id of the document that a term belongs to."""
    return short_repr(vectors.doc_ids[int(np.searchsorted(vectors.indptr, place, side="right")) - 1])
