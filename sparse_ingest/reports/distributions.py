"""Distributions of a run: terms per document, weights, lengths of texts, and lengths of posting lists.

In: a run. Out: counts in bars, with mean, median and 95th percentile. Vectors are read in one pass; memory holds a
number per token id, per count of terms and per float16, and a row group. Above MAX_DOCUMENTS only evenly spaced shards
are read. Texts are long, so their lengths are always those of a sample.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
import numpy.typing as npt

from sparse_ingest.reporting import Reporter
from sparse_ingest.runs.checking import shard_parts, shard_vectors
from sparse_ingest.runs.run import Run
from sparse_ingest.runs.shards import MAX_FLOAT16, drop_bits, parse_fields

MAX_DOCUMENTS = 10_000_000  # whose vectors are read, about 50,000 documents/s
TEXT_DOCUMENTS, TEXT_SHARDS = 100_000, 16  # whose texts are read
LONGEST = 20  # posting lists that are named
_BARS = 24
_TAIL = 0.995  # the last bar has the values above this quantile
Numbers = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Bar:
    """The number of values from `low` to below `high`; `high` is None for all above."""

    low: float
    high: float | None
    count: int


@dataclass(frozen=True)
class Distribution:
    """The distribution of `count` values."""

    count: int
    mean: float
    median: float
    p95: float
    largest: float
    bars: list[Bar]


@dataclass(frozen=True)
class PostingList:
    """A token, the documents with it, their share of all documents, and the mean of its weights."""

    token: str
    documents: int
    share: float
    mean_weight: float


@dataclass(frozen=True)
class Distributions:
    """The distributions of the documents of `shards` shards.

    `characters` is the length of texts in a sample; None if the run has no texts. `vocabulary` is the number of token
    ids with a token, and `used` of those that any document has. A distribution is None without values.
    """

    shards: int
    documents: int
    terms: Distribution | None
    weights: Distribution | None
    characters: Distribution | None
    postings: Distribution | None
    longest: list[PostingList]
    vocabulary: int
    used: int


def read_distributions(run: Run, rows: Mapping[int, int], reporter: Reporter) -> Distributions:
    """Read the vectors of a run, and the texts of some of its documents; `rows` has the documents of each shard.

    Raises:
        RunError: a shard is missing or damaged.
    """
    shards, vocabulary, total = list(rows), run.vocabulary(), sum(rows.values())
    read = _spaced(shards, max(1, len(shards) * MAX_DOCUMENTS // total)) if total > MAX_DOCUMENTS else shards
    reporter.begin("documents", sum(rows[shard] for shard in read))
    terms = np.zeros(1, dtype=np.int64)
    weights = np.zeros(1 << 16, dtype=np.int64)  # by the bits of a float16
    postings, sums = np.zeros(len(vocabulary), dtype=np.int64), np.zeros(len(vocabulary))
    for vectors in chain.from_iterable(shard_vectors(run, shard) for shard in read):
        terms = _added(terms, np.diff(vectors.indptr))
        kept = vectors.weights
        halves = kept if kept.dtype == np.float16 else drop_bits(np.minimum(kept, np.float32(MAX_FLOAT16)))
        weights = _added(weights, halves.view(np.uint16))
        postings = _added(postings, vectors.token_ids)
        sums += np.bincount(vectors.token_ids, weights=kept, minlength=len(sums))
        reporter.advance(len(vectors.doc_ids))
    documents = int(terms.sum())
    lengths, of_length = np.unique(postings[postings > 0], return_counts=True)
    used = int((postings > 0).sum())
    longest = np.argsort(-postings, kind="stable")[: min(LONGEST, used)].tolist()
    return Distributions(
        shards=len(read),
        documents=documents,
        terms=_distribution(np.arange(len(terms)), terms),
        weights=_distribution(np.arange(1 << 16, dtype=np.uint16).view(np.float16).astype(np.float64), weights),
        characters=_distribution(*np.unique(_text_lengths(run, shards, total), return_counts=True)),
        postings=_distribution(lengths, of_length, edges=_series(postings.max(initial=0))),
        longest=[
            PostingList(vocabulary[one] or "", int(postings[one]), postings[one] / documents, sums[one] / postings[one])
            for one in longest
        ],
        vocabulary=sum(token is not None for token in vocabulary),
        used=used,
    )


def _text_lengths(run: Run, shards: Sequence[int], total: int) -> Numbers:
    """Return the characters of the texts of all documents, or of the first ones of evenly spaced shards."""
    lengths: list[int] = []
    chosen = _spaced(shards, TEXT_SHARDS) if total > TEXT_DOCUMENTS else shards
    for number, shard in enumerate(chosen, start=1):
        for part in shard_parts(run, shard):
            carried = map(parse_fields, part.fields, part.vectors.doc_ids)
            texts = (fields.get("text") for fields in carried)
            lengths += [len(text) for text in texts if isinstance(text, str)]
            if len(lengths) >= TEXT_DOCUMENTS * number // len(chosen):
                break
    return np.array(lengths, dtype=np.int64)


def _spaced(shards: Sequence[int], most: int) -> list[int]:
    """Return at most `most` shards, evenly spaced."""
    return [shards[place * len(shards) // most] for place in range(most)] if len(shards) > most else list(shards)


def _added(counts: Numbers, values: npt.NDArray[np.integer]) -> Numbers:
    """Return `counts`, longer if needed, with the number of each value added at its place."""
    found = np.bincount(values, minlength=len(counts))
    found[: len(counts)] += counts
    return found


def _distribution(
    values: npt.NDArray[np.generic], counts: Numbers, edges: Sequence[float] | None = None
) -> Distribution | None:
    """Return the distribution of ascending values, each of which occurs `counts` times; None if there are none."""
    there = counts > 0
    known, counts = values[there].astype(np.float64), counts[there]
    if not len(known):
        return None
    before = np.cumsum(counts)
    count = int(before[-1])
    median, p95, tail = (float(known[np.searchsorted(before, share * count)]) for share in (0.5, 0.95, _TAIL))
    edges = edges or _edges(float(known[0]), tail, whole=values.dtype.kind in "iu")
    places = np.searchsorted(edges, known, side="right") - 1
    totals = np.bincount(places, weights=counts, minlength=len(edges)).astype(np.int64).tolist()
    bars = [Bar(low, high, total) for low, high, total in zip(edges, [*edges[1:], None], totals, strict=True)]
    if not bars[-1].count:
        bars.pop()
    mean = float((known * counts).sum()) / count
    return Distribution(count, mean, median, p95, float(known[-1]), bars)


def _edges(low: float, high: float, *, whole: bool) -> list[float]:
    """Return the lower ends of bars of a round width, from `low` to above `high`; the last bar has no upper end."""
    width = round_up((high - low) / _BARS) if high > low else 0.0
    width = max(width, 1.0) if whole else width or high
    first, last = int(low // width), int(high // width) + 1
    return [float(f"{place * width:.12g}") for place in range(first, last + 1)]


def _series(largest: int) -> list[float]:
    """Return 1, 2, 5, 10, 20, ... to the first number above `largest`."""
    found = [float(digit * 10**power) for power in range(19) for digit in (1, 2, 5)]
    return found[: 1 + sum(one <= largest for one in found)]


def round_up(value: float) -> float:
    """Return the smallest of 1, 2, 5 times a power of ten that is at least `value`, which is above zero."""
    power = 10.0 ** np.floor(np.log10(value))
    return float(next(digit * power for digit in (1, 2, 5, 10) if digit * power >= value * (1 - 1e-9)))
