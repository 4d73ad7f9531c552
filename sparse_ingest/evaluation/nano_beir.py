"""`evaluate` on NanoBEIR: a model on up to 13 small collections, with the results that model cards print.

Collections are encoded in float32 and searched exactly. As in sentence-transformers, measures are averaged over
collections, terms over queries and documents, and FLOPS covers all queries and all documents. AP@100 differs from
a card's map@100 if a query has more than 100 relevant documents: trec_eval divides by all of them, others by 100.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from sparse_ingest.corpora.nano_beir import DATA_SET, write_nano_beir
from sparse_ingest.evaluation.evaluate import Evaluation, evaluate
from sparse_ingest.evaluation.options import EvaluateOptions
from sparse_ingest.evaluation.terms import TermCounts, flops, pooled, sparsity
from sparse_ingest.pipeline import Pipeline
from sparse_ingest.reporting import Reporter, reporter_of
from sparse_ingest.searching.encoded import encode
from sparse_ingest.searching.search import open_run

# Measures of model cards by ir-measures' names: accuracy@k is Success@k, mrr is RR, map is AP.
CARD_MEASURES = (
    *(f"{name}@{cutoff}" for name in ("Success", "P", "R") for cutoff in (1, 3, 5, 10)),
    "nDCG@10", "RR@10", "AP@100",
)  # fmt: skip


def evaluate_nano_beir(
    names: Sequence[str],
    folder: Path,
    *,
    pipeline: Pipeline,
    options: EvaluateOptions,
    data_set: str = DATA_SET,
    device: str = "auto",
    progress: Reporter | bool = False,
) -> Iterator[tuple[str, Evaluation]]:
    """Evaluate on one collection after another, with run folders in `folder`. All are downloaded first."""
    settings, reporter = replace(pipeline.encode, weights="float32"), reporter_of(progress)
    if settings.dtype == "auto":
        # As on model cards.
        settings = replace(settings, dtype="float32")
    pipeline = replace(pipeline, encode=settings)
    for name in names:
        write_nano_beir(name, folder / f"Nano{name}", data_set)
    for place, name in enumerate(names, start=1):
        reporter.note(f"{place}/{len(names)}  Nano{name}")
        collection = folder / f"Nano{name}"
        corpus, out = str(collection / "corpus.jsonl"), collection / "run"
        encoded = encode(corpus, out, pipeline=pipeline, device=device, progress=reporter)
        run = open_run(encoded, pipeline=pipeline, force=True)
        yield f"Nano{name}", evaluate(run, queries=collection, qrels=collection, options=options)


def figures(evaluations: Sequence[Evaluation], measures: Sequence[str]) -> dict[str, float]:
    """Return the results over some collections, by printed name."""
    rows = []
    for one in evaluations:
        row = {name: one.measures[name] for name in measures}
        if one.bm25:
            row |= {f"BM25 {name}": one.bm25.measured.mean[name] for name in measures}
        rows.append(row)
    found = {name: sum(row[name] for row in rows) / len(rows) for name in rows[0]}
    queries = pooled(one.query_terms for one in evaluations)
    documents = pooled(one.document_terms or TermCounts() for one in evaluations)  # always counted for a run
    for name, counts in (("query", queries), ("corpus", documents)):
        side = sparsity(counts, evaluations[0].vocabulary)
        found |= {f"{name}_active_dims": side.active_dimensions, f"{name}_sparsity_ratio": side.sparsity}
    return found | {"flops": flops(queries, documents)}
