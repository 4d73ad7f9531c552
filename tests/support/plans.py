"""A run with Zipf-distributed words, a weight table for its queries, and queries with relevance judgments."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, models, pre_tokenizers

from sparse_ingest.records import Query
from sparse_ingest.runs.run import Run
from support.runs import make_run

WORDS = [f"w{number}" for number in range(800)]
DOCUMENTS = 1500


def made_plan(folder: Path, documents: int = DOCUMENTS) -> tuple[Run, list[Query], dict[str, dict[str, int]]]:
    random = np.random.default_rng(21)
    table = folder / "model"
    table.mkdir()
    tokenizer = Tokenizer(models.WordLevel({word: place for place, word in enumerate(["[UNK]", *WORDS])}, "[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(table / "tokenizer.json"))
    frequencies = 1 / (np.arange(len(WORDS)) + 5)
    shares = frequencies / frequencies.sum()
    idf = {word: float(np.log(1 / share)) for word, share in zip(WORDS, shares, strict=True)}
    (table / "idf.json").write_text(json.dumps(idf))
    vectors: dict[str, dict[str, float]] = {}
    for number in range(documents):
        places = random.choice(len(WORDS), random.integers(20, 60), replace=False, p=shares)
        # A few terms have most of the weight, as in the vectors of a model.
        weights = np.exp(random.normal(-1.5, 1.0, len(places))).clip(0.002, 3.0)
        vectors[f"d{number}"] = {WORDS[place]: float(weight) for place, weight in zip(places, weights, strict=True)}
    # A query has the three heaviest terms of its relevant document and five other words.
    queries, qrels = [], {}
    for number in range(40):
        doc_id = f"d{number * (documents // 48)}"
        heaviest = sorted(vectors[doc_id], key=vectors[doc_id].__getitem__, reverse=True)[:3]
        others = [WORDS[place] for place in random.choice(len(WORDS), 5, replace=False, p=shares)]
        queries.append(Query(f"q{number}", " ".join(heaviest + others)))
        qrels[f"q{number}"] = {doc_id: 1}
    vocabulary = ["[UNK]", *WORDS]
    run = make_run(folder / "run", vectors, shard_rows=700, vocabulary=vocabulary, model=str(table))
    return run, queries, qrels
