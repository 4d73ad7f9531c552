"""The contenders of benchmarks/encode.py, each in a process of its own, and where it needs one in an environment too.

    python benchmarks/encoders.py '{"encoder": "ours", "model": FOLDER, "texts": FILE.json, "device": "cpu", ...}'

Builds its encoder, encodes a few texts to warm up and prints one JSON object; then it encodes all of them for every
line on stdin and prints one JSON object each time. Imports and the building do not count. What else it imports is only
there where its encoder needs it.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

Job = dict[str, Any]
COMPARED = 16  # documents whose terms are compared
HEAVY = 0.1  # terms above this weight are


class Contender(NamedTuple):
    """How to encode texts, how to see the terms of some, and what to say of the settings."""

    encode: Callable[[Sequence[str]], object]
    terms: Callable[[Sequence[str]], list[list[int]]]
    settings: str
    facts: dict[str, float] = {}  # noqa: RUF012


def main() -> None:
    """Do the job of the first argument."""
    job: Job = json.loads(sys.argv[1])
    texts = json.loads(Path(job["texts"]).read_text())
    contender = ENCODERS[job["encoder"]](job, texts)
    contender.encode(texts[:COMPARED])
    terms = contender.terms(texts[:COMPARED])
    say({"settings": contender.settings, "terms": terms, **contender.facts})
    for _ in sys.stdin:
        began, used = time.perf_counter(), time.process_time()
        contender.encode(texts)
        seconds, cpu_seconds = time.perf_counter() - began, time.process_time() - used
        say({"seconds": seconds, "cpu_seconds": cpu_seconds, "peak_bytes": peak_bytes()})


def say(answer: Job) -> None:
    """One line to the driver."""
    print(json.dumps(answer), flush=True)


def peak_bytes() -> int:
    """The most memory that this process ever had."""
    import resource

    status = Path("/proc/self/status")
    if status.exists():
        # getrusage would count what the process that started this one had.
        return int(next(line.split()[1] for line in status.read_text().splitlines() if line.startswith("VmHWM"))) << 10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def ours(job: Job, texts: Sequence[str]) -> Contender:
    """This package, from text to sparse rows; with "device_only" from token ids, which lie in memory."""
    from sparse_ingest.checkpoints.layouts import read_checkpoint
    from sparse_ingest.checkpoints.settings import resolve_settings
    from sparse_ingest.models.documents import DocumentEncoder
    from sparse_ingest.models.precision import SAMPLE, choose_dtype
    from sparse_ingest.pipeline import ModelSettings

    checkpoint = read_checkpoint(job["model"])
    settings = resolve_settings(ModelSettings(document=job["model"], max_length=job["max_length"]), checkpoint)

    def build(dtype: str) -> DocumentEncoder:
        return DocumentEncoder(checkpoint, settings, device=job["device"], dtype=dtype)

    dtype = job["dtype"]
    if dtype == "auto":
        dtype = choose_dtype(build, job["device"], texts[:SAMPLE])["dtype"]
    encoder = build(dtype)
    encoded = encoder.encode(texts)
    facts = {"tokens": encoded.tokens, "flops": flops(encoder, encoder._tokenizer(texts).lengths.tolist())}

    def terms(some: Sequence[str]) -> list[list[int]]:
        found = encoder.encode(some)
        pairs = zip(found.indptr[:-1], found.indptr[1:], strict=True)
        return [found.token_ids[a:b][found.weights[a:b] > HEAVY].tolist() for a, b in pairs]

    encode: Callable[[Sequence[str]], object] = encoder.encode
    if job.get("device_only"):
        token_ids = encoder._tokenizer(texts).token_ids

        def encode(some: Sequence[str]) -> object:
            return encoder._maker.make(token_ids[: len(some)], encoder.batch_tokens, lambda documents, tokens: None)

    return Contender(encode, terms, dtype, facts)


def flops(encoder: Any, lengths: list[int]) -> float:
    """Arithmetic of the linear layers, of attention and of the vocabulary projection, without padding."""
    import torch

    body, config = encoder._maker.body, encoder._maker.body._model.config
    linear = [module for module in body._model.modules() if isinstance(module, torch.nn.Linear)]
    # The projection is one of them.
    weights = sum(module.in_features * module.out_features for module in linear)
    width = getattr(config, "hidden_size", None) or config.dim
    layers = getattr(config, "num_hidden_layers", None) or config.n_layers
    return float(sum(2 * weights * length + 4 * layers * width * length * length for length in lengths))


def end_to_end(job: Job, texts: Sequence[str]) -> Contender:
    """The command `encode`: from a file of texts to a run folder of Parquet files."""
    import shutil
    import tempfile

    from sparse_ingest.cli.main import cli

    folder = Path(tempfile.mkdtemp(prefix="sparse-ingest-bench-"))
    corpus = folder / "corpus.jsonl"
    corpus.write_text("".join(json.dumps({"id": str(n), "text": text}) + "\n" for n, text in enumerate(texts)))

    def encode(some: Sequence[str]) -> object:
        shutil.rmtree(folder / "run", ignore_errors=True)
        arguments = ["encode", "--model", job["model"], "--corpus", str(corpus), "--out", str(folder / "run"), "--json"]
        settings = ["--device", job["device"], "--dtype", job["dtype"], "--max-length", str(job["max_length"])]
        return cli.main([*arguments, *settings, "--limit", str(len(some))], standalone_mode=False)

    return Contender(encode, lambda some: [], job["dtype"])


def sentence_transformers(job: Job, texts: Sequence[str]) -> Contender:
    """SparseEncoder; without a batch size the fastest dtype and batch size of a trial."""
    import torch
    from sentence_transformers import SparseEncoder

    def build(dtype: str) -> Any:
        encoder = SparseEncoder(job["model"], device=job["device"], model_kwargs={"dtype": getattr(torch, dtype)})
        encoder.max_seq_length = job["max_length"]
        return encoder

    def encoded(encoder: Any, some: Sequence[str], batch: int) -> Any:
        return encoder.encode_document(list(some), batch_size=batch, save_to_cpu=True)

    batch, dtype = job.get("batch", 0), job.get("dtype", "float32")
    if not batch:
        trial = list(texts[: job["trial"]])
        rates: dict[tuple[str, int], float] = {}
        for dtype in job["dtypes"]:
            encoder = build(dtype)
            for batch in job["batches"]:
                encoded(encoder, trial[:batch], batch)
                took = [_seconds(lambda: encoded(encoder, trial, batch)) for _ in range(2)]  # noqa: B023
                rates[dtype, batch] = min(took)
        dtype, batch = min(rates, key=lambda choice: rates[choice])
    encoder = build(dtype)

    def terms(some: Sequence[str]) -> list[list[int]]:
        rows = encoded(encoder, some, batch).to_dense()
        return [torch.nonzero(row > HEAVY).flatten().tolist() for row in rows]

    return Contender(lambda some: encoded(encoder, some, batch), terms, f"{dtype}, batch {batch}")


def yasem(job: Job, texts: Sequence[str]) -> Contender:
    """yasem's SpladeEmbedder with its defaults, and float32 on a CPU, where its float16 is slower."""
    import numpy as np
    from yasem import SpladeEmbedder

    half = job["device"] != "cpu"
    encoder = SpladeEmbedder(job["model"], device=job["device"], max_seq_length=job["max_length"], use_fp16=half)

    def terms(some: Sequence[str]) -> list[list[int]]:
        return [np.flatnonzero(row > HEAVY).tolist() for row in encoder.encode(list(some))]

    return Contender(
        lambda some: encoder.encode(list(some), convert_to_csr_matrix=True, convert_to_numpy=False),
        terms, f"{'float16' if half else 'float32'}, batch 32",
    )  # fmt: skip


def peak(job: Job, texts: Sequence[str]) -> Contender:
    """No encoder: products of large square matrices, for the share of the hardware."""
    import torch

    device, dtype = torch.device(job["device"]), getattr(torch, job["dtype"])
    size = 8192 if device.type == "cuda" else 2048
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))

    def product(_: object) -> None:
        for _turn in range(4):
            torch.mm(left, right)
        if device.type == "cuda":
            torch.cuda.synchronize()

    product(None)
    rate = 8 * size**3 / statistics.median(_seconds(lambda: product(None)) for _ in range(3))
    return Contender(product, lambda some: [], job["dtype"], {"flops_per_s": rate})


def _seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


ENCODERS: dict[str, Callable[[Job, Sequence[str]], Contender]] = {
    "ours": ours,
    "end to end": end_to_end,
    "sentence-transformers": sentence_transformers,
    "yasem": yasem,
    "peak": peak,
}

if __name__ == "__main__":
    main()
