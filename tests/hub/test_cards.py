"""Compare vectors with the figures printed on model cards. Run by `make test-hub`; needs access to a model hub.

Not run during development, which had no hub. Tolerance: 0.001, because the cards were measured on GPUs.
"""

from __future__ import annotations

import pytest
from support.hub_cards import (
    ACTIVE_DIMENSIONS,
    DIMENSIONS,
    EXAMPLES,
    ActiveDimensions,
    Example,
    measure,
    measure_active_dimensions,
)

from sparse_ingest.pipeline import read_pipeline

pytestmark = pytest.mark.hub


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example.pipeline)
def test_similarities_match_the_example_on_the_card(example: Example) -> None:
    found = measure(read_pipeline(example.pipeline), example.queries, example.documents)
    assert found.dimensions == DIMENSIONS
    assert (len(found.queries), len(found.documents)) == (len(example.queries), len(example.documents))
    assert all(found.queries) and all(found.documents)
    if example.similarities is not None:
        # The card prints 0.0000 for a document that shares no token with the query.
        expected = [pytest.approx(row, rel=1e-3, abs=5e-5) for row in example.similarities]
        assert found.similarities == expected


@pytest.mark.parametrize("card", ACTIVE_DIMENSIONS, ids=lambda card: f"{card.pipeline}-{card.collection}")
def test_active_dimensions_match_the_card(card: ActiveDimensions) -> None:
    found = measure_active_dimensions(card.pipeline, card.collection)
    # A weight near zero may round to zero on one of the two devices.
    assert found == pytest.approx((card.queries, card.documents), rel=5e-3)


def test_efficient_splade_ranks_the_relevant_passage_first() -> None:
    """Its card prints no example, so use the example of another card."""
    example = next(one for one in EXAMPLES if one.pipeline == "splade-distilbert-mrl")
    found = measure(read_pipeline("efficient-splade-large"), example.queries, example.documents)
    assert found.dimensions == DIMENSIONS
    (row,) = found.similarities
    assert row[0] == max(row) > 2 * sorted(row)[1]
