"""Documents a second of `sparse-ingest` and of sentence-transformers, on the same documents in one run.

    python benchmarks/encode.py [--model package:cognition/model] [--corpus CORPUS.jsonl] [--documents 200] [--rounds 3]

Without --corpus the passages of `sparse-ingest demo` are encoded. Both encoders run in this process, in turn, in
float32 (or --dtype), after a warm-up; a row is the median of the rounds. Prints one table, and how far the weights of
the two are apart.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from sentence_transformers import SparseEncoder

from sparse_ingest.checkpoints.layouts import read_checkpoint
from sparse_ingest.checkpoints.settings import resolve_settings
from sparse_ingest.corpora.files import FieldNames, open_corpus
from sparse_ingest.models.documents import DocumentEncoder, Encoded
from sparse_ingest.pipeline import ModelSettings


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="package:cognition/model")
    parser.add_argument("--corpus")
    parser.add_argument("--documents", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--device", default="cpu")
    given = parser.parse_args()

    texts = read_texts(given.corpus, given.documents)
    checkpoint = read_checkpoint(given.model)
    settings = resolve_settings(ModelSettings(document=given.model), checkpoint)
    ours = DocumentEncoder(checkpoint, settings, device=given.device, dtype=given.dtype)
    theirs = SparseEncoder(
        str(checkpoint.folder), device=given.device, model_kwargs={"dtype": getattr(torch, given.dtype)}
    )

    def encode_theirs() -> torch.Tensor:
        found = theirs.encode_document(texts, batch_size=32, save_to_cpu=True)
        assert isinstance(found, torch.Tensor)
        return found

    encoders: dict[str, Callable[[], object]] = {
        "sentence-transformers, batch 32": encode_theirs,
        "sparse-ingest": lambda: ours.encode(texts),
    }
    encoded = ours.encode(texts)
    difference = largest_difference(encoded, encode_theirs())
    rates: dict[str, list[float]] = {name: [] for name in encoders}
    for _ in range(given.rounds):
        for name, encode in encoders.items():
            began = time.perf_counter()
            encode()
            rates[name].append(len(texts) / (time.perf_counter() - began))

    mean = encoded.tokens / len(texts)
    print(f"{len(texts)} documents, {mean:.0f} tokens each, {given.model}, {given.dtype} on {given.device}, "
          f"{os.cpu_count()} CPUs, {given.rounds} rounds")  # fmt: skip
    print(f"{'encoder':<34}{'docs/s':>10}{'min':>10}{'max':>10}{'tokens/s':>12}{'ratio':>8}")
    base = statistics.median(rates["sentence-transformers, batch 32"])
    for name, found in rates.items():
        median = statistics.median(found)
        print(
            f"{name:<34}{median:>10.1f}{min(found):>10.1f}{max(found):>10.1f}"
            f"{median * mean:>12.0f}{median / base:>8.1f}"
        )
    print(f"largest difference of a weight: {difference:.2g}")


def read_texts(corpus: str | None, count: int) -> list[str]:
    """The texts to encode."""
    if corpus is None:
        from pydoc_data.topics import topics

        from sparse_ingest.demo import passages

        return [f"{passage.title} {passage.text}" for passage in passages(topics)][:count]
    rows = open_corpus([str(Path(corpus))], fields=FieldNames()).rows()
    return [row.document.text for row, _ in rows if row.document][:count]


def largest_difference(encoded: Encoded, reference: torch.Tensor) -> float:
    """The largest distance of two weights of the same document and token, one at a time to keep memory small."""
    dense = reference.to_dense().to(torch.float32).numpy() if reference.is_sparse else reference.numpy()
    largest = 0.0
    for row, expected in enumerate(dense):
        start, end = encoded.indptr[row], encoded.indptr[row + 1]
        found = np.zeros_like(expected)
        found[encoded.token_ids[start:end]] = encoded.weights[start:end]
        largest = max(largest, float(np.abs(found - expected).max()))
    return largest


if __name__ == "__main__":
    main()
