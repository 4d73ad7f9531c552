"""The numbers that the model cards print, from the models themselves: `make test-hub`, where a hub is in reach.

Never run where this was written. A card's numbers come from a GPU of its time, so a thousandth is allowed.
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
def test_the_example_of_the_card(example: Example) -> None:
    found = measure(read_pipeline(example.pipeline), example.queries, example.documents)
    assert found.dimensions == DIMENSIONS
    assert (len(found.queries), len(found.documents)) == (len(example.queries), len(example.documents))
    assert all(found.queries) and all(found.documents)
    if example.similarities is not None:
        # 0.0000 is a document that shares no token at all with the query.
        expected = [pytest.approx(row, rel=1e-3, abs=5e-5) for row in example.similarities]
        assert found.similarities == expected


@pytest.mark.parametrize("card", ACTIVE_DIMENSIONS, ids=lambda card: f"{card.pipeline}-{card.collection}")
def test_the_active_dimensions_of_the_card(card: ActiveDimensions) -> None:
    found = measure_active_dimensions(card.pipeline, card.collection)
    # A weight near zero may fall on either side of it.
    assert found == pytest.approx((card.queries, card.documents), rel=5e-3)


def test_the_pair_of_efficient_splade_finds_what_it_was_trained_for() -> None:
    """Its card prints no example: on another card's the relevant passage must come first, by far."""
    example = next(one for one in EXAMPLES if one.pipeline == "splade-distilbert-mrl")
    found = measure(read_pipeline("efficient-splade-large"), example.queries, example.documents)
    assert found.dimensions == DIMENSIONS
    (row,) = found.similarities
    assert row[0] == max(row) > 2 * sorted(row)[1]
