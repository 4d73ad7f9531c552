"""Measure rankings with ir-measures (nDCG@10, RR, R@100, Success@1, P(rel=2)@5), and test two for a difference.

A query without hits counts as zero; a query without qrels is omitted. Documents with equal scores are ordered as in
trec_eval, the larger id first, for every measure.
"""

from __future__ import annotations

import ast
import difflib
import re
import subprocess
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from sparse_ingest.errors import UsageError, first_line, needs_extra
from sparse_ingest.records import batched
from sparse_ingest.searching.hits import Ranked

DEFAULT_MEASURES = ("nDCG@10", "RR@10", "RR", "R@100", "AP@100")
DEFAULT_DEPTH = 100
RESAMPLES = 9_999
CHANGES = 10  # queries of a comparison that differ most
SEED = 0
_BLOCK = 1000  # rankings measured together
_SWAPS = 500  # drawn together: 8 MB for 1,000 queries

Qrels = Mapping[str, Mapping[str, int]]


class Measured(NamedTuple):
    """The values of each measure by its requested name: per query, and over all queries."""

    per_query: dict[str, dict[str, float]]
    mean: dict[str, float]


class Change(NamedTuple):
    """A query whose value of a measure differs between two rankings."""

    query_id: str
    text: str
    first: float
    second: float


class Comparison(NamedTuple):
    """The difference of one measure between two rankings of `queries` queries.

    `difference` is the mean of first minus second; `t_test` and `randomisation` are two-sided p-values. `wins` are
    queries with a higher first value, `losses` with a lower one, `ties` with an equal one. `changes` are the queries
    that differ most, the largest first.
    """

    measure: str
    queries: int
    first: float
    second: float
    difference: float
    t_test: float
    randomisation: float
    wins: int = 0
    losses: int = 0
    ties: int = 0
    changes: Sequence[Change] = ()


def parse_measures(names: Iterable[str]) -> dict[str, Any]:
    """Return the measures of ir-measures by their given names.

    Raises:
        UsageError: a name is unknown to the library, or its parameters are invalid.
        MissingExtraError: the library is not installed.
    """
    library = _library()
    measures = {}
    for name in names:
        try:
            measures[name] = _measure_of(name, library)
            params = measures[name].params
            # trec_eval exits the process at a cutoff of 0, and levels of relevance start at 1.
            in_range = params.get("cutoff", 1) >= 1 and params.get("rel", 1) >= 1
            supported = in_range and library.DefaultPipeline.supports(measures[name])
        except LookupError:
            raise UsageError(_unknown(name, library)) from None
        except (ValueError, TypeError, SyntaxError, AttributeError, AssertionError, RecursionError):
            supported = False
        if not supported:
            raise UsageError(
                f"{name!r} cannot be computed: ir-measures expects a name with parameters, usually a cutoff, such as "
                "nDCG@10 or P(rel=2)@5, and for a few measures another library."
            )
    return measures


def _measure_of(name: str, library: Any) -> Any:
    """Return the measure of a name with parameters and a cutoff. Raise `LookupError` for an unknown name.

    `parse_measure` of ir-measures 0.4.3 fails from Python 3.14 on.
    """
    node, given, cutoff = ast.parse(name.strip(), mode="eval").body, {}, None
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.MatMult):
        cutoff = _constant(node.right)
        node = node.left
    if isinstance(node, ast.Call):
        if node.args:
            raise ValueError("a parameter without a name")
        given = {each.arg or "": _constant(each.value) for each in node.keywords}
        node = node.func
    if not isinstance(node, ast.Name):
        raise ValueError("no name")
    kind = library.measures.registry[node.id]
    return kind(**given) if cutoff is None else kind(**given, **{kind.AT_PARAM: cutoff})


def _constant(node: ast.expr | None) -> Any:
    """Return the value of a constant, or of a dictionary of constants. Raise `ValueError` for another expression."""
    if isinstance(node, ast.Dict):
        return {_constant(key): _constant(value) for key, value in zip(node.keys, node.values, strict=True)}
    if isinstance(node, ast.Constant):
        return node.value
    raise ValueError("no constant")


def depth_of(names: Iterable[str]) -> int:
    """Return how many hits per query these measures need: the largest cutoff, and at least 100."""
    cutoffs = [measure.params.get("cutoff") for measure in parse_measures(names).values()]
    return max([DEFAULT_DEPTH, *(cutoff for cutoff in cutoffs if isinstance(cutoff, int))])


def measure(ranked: Iterable[Ranked], qrels: Qrels, measures: Sequence[str] = DEFAULT_MEASURES) -> Measured:
    """Measure rankings against qrels. Only the order and ties of scores matter.

    Raise `UsageError` if a measure is unknown.
    """
    library = _library()
    parsed = parse_measures(measures)
    # Two names may mean one measure (MRR@10 is RR@10).
    names = {one: [name for name, other in parsed.items() if other == one] for one in parsed.values()}
    per_query: dict[str, dict[str, float]] = {name: {} for name in measures}
    totals = {one: one.aggregator() for one in names}
    judged_ones = (ranking for ranking in ranked if ranking.query_id in qrels)
    for block in batched(judged_ones, _BLOCK):
        # The library counts judged queries that are not in `found` as zero, so `judged` has only those of the block.
        # Empty rankings are omitted from `found`: Judged@10 would divide by their length.
        judged = {ranking.query_id: dict(qrels[ranking.query_id]) for ranking in block}
        found = {ranking.query_id: _without_ties(ranking) for ranking in block if ranking.doc_ids}
        for metric in _metrics(library.evaluator(list(names), judged), found):
            totals[metric.measure].add(metric.value)
            for name in names[metric.measure]:
                per_query[name][metric.query_id] = metric.value
    return Measured(per_query, {name: float(totals[one].result()) for name, one in parsed.items()})


def compare(
    first: Mapping[str, Mapping[str, float]],
    second: Mapping[str, Mapping[str, float]],
    texts: Mapping[str, str] | None = None,
) -> list[Comparison]:
    """Test each measure's values by query (`Measured.per_query`) of two rankings for a difference.

    Paired tests: Student's t-test by scipy, and a randomization test, which swaps the two values of random queries
    9,999 times, from a fixed seed, and counts how often the means differ at least as much. `texts` of queries are for
    `Comparison.changes`.
    """
    with needs_extra("evaluate", "Comparing two rankings"):
        from scipy.stats import ttest_rel
    import numpy as np

    queries = list(first[next(iter(first))])
    one, other = (
        np.array([[values[name][query_id] for name in first] for query_id in queries]) for values in (first, second)
    )
    differences = one - other
    observed, as_large = np.abs(differences.sum(axis=0)), np.ones(len(first))
    random = np.random.default_rng(SEED)
    for start in range(0, RESAMPLES, _SWAPS):
        swaps = random.integers(0, 2, (min(_SWAPS, RESAMPLES - start), len(queries))) * 2.0 - 1
        # Sums in another order differ in their last digits.
        as_large += (np.abs(swaps @ differences) >= observed * (1 - 1e-12)).sum(axis=0)
    comparisons = []
    for place, name in enumerate(first):
        column = differences[:, place]
        # Without a difference the t-test would divide by zero.
        equal = len(queries) < 2 or not column.any()
        by_t_test = 1.0 if equal else float(ttest_rel(one[:, place], other[:, place]).pvalue)
        means = float(one[:, place].mean()), float(other[:, place].mean())
        by_chance = float(as_large[place] / (RESAMPLES + 1))
        wins, losses = int((column > 0).sum()), int((column < 0).sum())
        changes = [
            Change(queries[at], (texts or {}).get(queries[at], ""), float(one[at, place]), float(other[at, place]))
            for at in np.argsort(-np.abs(column), kind="stable")[:CHANGES].tolist() if column[at]
        ]  # fmt: skip
        counts, difference = (wins, losses, len(queries) - wins - losses), means[0] - means[1]
        comparisons.append(Comparison(name, len(queries), *means, difference, by_t_test, by_chance, *counts, changes))
    return comparisons


def _without_ties(ranking: Ranked) -> dict[str, float]:
    """Return ranks from the end as scores: the library's providers break ties differently."""
    ordered = sorted(zip(ranking.scores, ranking.doc_ids, strict=True), reverse=True)
    return {doc_id: float(len(ordered) - place) for place, (_, doc_id) in enumerate(ordered)}


def _metrics(evaluator: Any, found: Mapping[str, Mapping[str, float]]) -> Iterator[Any]:
    try:
        yield from evaluator.iter_calc(found)
    except (OSError, subprocess.SubprocessError, RuntimeError, ValueError, ArithmeticError) as error:
        # Some measures are computed by programs of the library, such as gdeval, which needs numeric ids.
        raise UsageError(f"ir-measures cannot compute one of the measures: {first_line(error)}.") from error


def _unknown(name: str, library: Any) -> str:
    known = {str(one).lower(): str(one) for one in library.measures.registry}
    asked = re.match(r"\w*", name)
    close = difflib.get_close_matches(asked[0].lower() if asked else "", known, n=3, cutoff=0.6)
    hint = f"; similar: {', '.join(known[one] for one in close)}" if close else ""
    return (
        f"{name!r} is not a measure of ir-measures{hint}. Use its names, such as nDCG@10, RR, R@100, AP@100, P@5; "
        "what model cards call accuracy@k is Success@k."
    )


def _library() -> Any:
    with needs_extra("evaluate", "Measuring"):
        import ir_measures
    return ir_measures
