"""What a server's explanation of a score says of each token.

In: the `_explanation` of a hit, of any sparse body. Out: query weight, stored weight and their product, by token or
token id. Not covered: the scores of parts that are no sparse clause, which are left out.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

# How a segment with clusters explains one token of a score.
CONTRIBUTION = re.compile(r"token '(\d+)' contribution: query_weight=(\d+) \* doc_weight=(\d+)")


class ExplainedTerm(NamedTuple):
    """What one token gave to a score, in the words of the server: query weight, stored weight, their product."""

    token: str
    query_weight: float
    stored_weight: float
    contribution: float


def explained_terms(explanation: Mapping[str, Any], field: str) -> Iterator[ExplainedTerm]:
    """The terms in the `_explanation` of a hit, of any sparse body.

    The tree is one node for each matching token, under a node "sum of:" when the query has more than one. Such a node
    says "Linear function on the F field for the T feature, computed as w * S from:" and has two details: w, the
    weight in the query, and S, what the index stored. Clusters of a sparse_vector field have a node of their own,
    which names the `top_n` heaviest tokens of the query; the score may hold more.
    """
    description, details = explanation["description"], explanation["details"]
    before, after = f"Linear function on the {field} field for the ", " feature, computed as w * S from:"
    # By prefix and suffix: a token may hold any character, also the words of the description.
    if description.startswith(before) and description.endswith(after):
        weight, stored = (float(detail["value"]) for detail in details)
        token = description[len(before) : -len(after)]
        yield ExplainedTerm(token, weight, stored, float(explanation["value"]))
    elif description.startswith("sparse_ann score for doc "):
        yield from _clustered_terms(details)
    else:
        for detail in details:
            yield from explained_terms(detail, field)


def _clustered_terms(details: Sequence[Mapping[str, Any]]) -> Iterator[ExplainedTerm]:
    """The terms of a document in clusters; weights are bytes there, of the ceilings that are named beside them."""
    [raw] = (part for part in details if part["description"].startswith("raw dot product"))
    [scaling] = (part for part in details if part["description"].startswith("quantization rescaling"))
    boost, ceiling_ingest, ceiling_search, levels = (float(part["value"]) for part in scaling["details"])
    for part in raw["details"]:
        if named := CONTRIBUTION.fullmatch(part["description"]):
            asked, stored = int(named[2]) * boost * ceiling_search / levels, int(named[3]) * ceiling_ingest / levels
            yield ExplainedTerm(named[1], asked, stored, float(part["value"]) * float(scaling["value"]))
