"""The search engines: the kind of field, the request body and the settings of each. A new engine is a row here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Unpack

from sparse_ingest.cluster.dialects import DIALECTS, Product
from sparse_ingest.cluster.limits import check_pruned, check_seismic, check_two_phase
from sparse_ingest.cluster.search_bodies import (
    BodyOptions,
    Engine,
    SearchBody,
    Weights,
    neural_sparse_body,
    seismic_body,
    sparse_vector_body,
    two_phase_body,
)
from sparse_ingest.errors import PipelineError
from sparse_ingest.pipeline import EngineName, QuerySettings


class EngineRules(NamedTuple):
    """An engine: its kind of field, its request by product, and the name of its table in [query] and `Engine`."""

    kind: str
    bodies: Mapping[Product, Callable[..., SearchBody]]
    collapses: bool = True
    settings: str = ""
    check: Callable[[Mapping[str, Any]], object] = dict


# The first engine of a kind of field is the default. The two-phase processor refuses sparse_vector fields, and their
# clusters never answer exactly.
ENGINES: dict[EngineName, EngineRules] = {
    "exact": EngineRules("rank_features", {"opensearch": neural_sparse_body, "elasticsearch": sparse_vector_body}),
    "two-phase": EngineRules("rank_features", {"opensearch": two_phase_body}, False, "two_phase", check_two_phase),
    "seismic": EngineRules("sparse_vector", {"opensearch": seismic_body}, True, "seismic", check_seismic),
    "pruned": EngineRules("rank_features", {"elasticsearch": sparse_vector_body}, True, "pruned", check_pruned),
}


def engines_of(kind: str, product: Product) -> list[EngineName]:
    """Return the engines that a product has for a kind of field."""
    return [name for name, rules in ENGINES.items() if rules.kind == kind and product in rules.bodies]


def choose_engine(settings: QuerySettings, kind: str, product: Product = "opensearch") -> EngineName:
    """Return the engine of [query], by default the first of the kind of field.

    Raises:
        PipelineError: the product or the kind of field lacks the engine, or a setting of any engine is invalid.
    """
    for rules in ENGINES.values():
        if rules.settings:
            rules.check(getattr(settings, rules.settings))
    engines = engines_of(kind, product)
    name = settings.engine or engines[0]
    if product not in ENGINES[name].bodies:
        raise PipelineError(
            f"{DIALECTS[product].name} has no engine {name}; it has {' and '.join(engines)}. Omit --engine (or engine "
            "in [query])."
        )
    if name not in engines:
        raise PipelineError(
            f"The engine {name} cannot search a {kind} field; {' and '.join(engines)} can. "
            "Omit --engine (or engine in [query]), or load into a field of the other kind with load --kind."
        )
    return name


def engine_body(weights: Weights, engine: Engine, *, size: int, **options: Unpack[BodyOptions]) -> SearchBody:
    """Return the request of a search with an engine.

    Args:
        weights: Query weights by token. With `engine.keys` they are converted to those keys.
        engine: The engine, its field and its settings.
        size: Number of hits.
        **options: `filter`, `collapse`, `explain`, `max_clauses`; see `BodyOptions`.

    Raises:
        UsageError: the weights, the engine's settings or their combination are invalid.
    """
    rules = ENGINES[engine.name]
    settings = {"settings": getattr(engine, rules.settings)} if rules.settings else {}
    return rules.bodies[engine.product](weights, field=engine.field, size=size, **settings, **options)
