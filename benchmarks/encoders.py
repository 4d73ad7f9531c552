"""The contenders of benchmarks/encode.py, each in its own process and, if needed, its own environment.

    python benchmarks/encoders.py '{"encoder": "ours", "model": FOLDER, "texts": FILE.json, "device": "cpu", ...}'

Builds its encoder, encodes a few texts to warm up and prints one JSON object. Then it encodes all texts for every line
on stdin, in calls of "call" documents if that is given, and prints one JSON object each time. Imports and building do
not count. Other packages are imported only by the encoder that needs them.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import Any

from contenders import HEAVY, Contender, Job, Took, heavy_terms, in_calls, mean_cost, peak_bytes, timed

WARM = 2048  # documents that fill a batch of a GPU, so that its memory is allocated
COMPARED = 16  # number of documents whose terms are compared
REPEATED = 20  # maximum repetitions of the texts, and the target duration in seconds
REPEATED_S = 8
LEAST_REPEATED = 512  # documents of such a run, so that encoding outweighs startup noise
GPU_DTYPES = ("float32", "float16", "bfloat16")
PEAK_S = 5  # for measuring the rate of a product
FINALISTS = 4  # settings that are tried again after the first trial


def main() -> None:
    """Run the job of the first argument."""
    job: Job = json.loads(sys.argv[1])
    texts = json.loads(Path(job["texts"]).read_text())
    contender = ENCODERS[job["encoder"]](job, texts)
    contender.encode(texts[:COMPARED])
    if job["device"].startswith("cuda") and job["encoder"] != "end to end":
        contender.encode(texts[:WARM])
    terms = contender.terms(texts[:COMPARED])
    send({"settings": contender.settings, "terms": terms, **contender.facts})
    for _ in sys.stdin:
        took = mean_cost(lambda: in_calls(contender.encode, texts, job.get("call")))
        send({**took._asdict(), "peak_bytes": peak_bytes(job["device"])})


def send(answer: Job) -> None:
    """Print one JSON line for the driver."""
    print(json.dumps(answer), flush=True)


def ours(job: Job, texts: Sequence[str]) -> Contender:
    """Build this package, from text to sparse rows; with "device_only" from token ids in memory."""
    from sparse_ingest.models.documents import DocumentEncoder
    from sparse_ingest.models.precision import SAMPLE, choose_dtype

    checkpoint, settings = _model(job)

    def build(dtype: str) -> DocumentEncoder:
        # With calls of few documents as in SparseEncoder, otherwise as in a run.
        return DocumentEncoder(checkpoint, settings, device=job["device"], dtype=dtype, all_cores=bool(job.get("call")))

    dtype = job["dtype"]
    if dtype == "auto":
        dtype = choose_dtype(build, job["device"], texts[:SAMPLE])["dtype"]
    encoder = build(dtype)

    def terms(some: Sequence[str]) -> list[list[int]]:
        found = encoder.encode(some).vectors
        pairs = zip(found.indptr[:-1], found.indptr[1:], strict=True)
        return [found.token_ids[a:b][found.weights[a:b] > HEAVY].tolist() for a, b in pairs]

    encode: Callable[[Sequence[str]], object] = encoder.encode
    if job.get("device_only"):
        token_ids = [ids for ids, _ in encoder.tokenize(texts)]

        def encode(some: Sequence[str]) -> object:
            return encoder.maker.make(token_ids[: len(some)], encoder.batch_tokens, lambda documents, tokens: None)

    return Contender(encode, terms, dtype)


def _model(job: Job) -> tuple[Any, Any]:
    """Return the checkpoint and its settings, with the same truncation as the other encoders."""
    from sparse_ingest.checkpoints.layouts import read_checkpoint
    from sparse_ingest.checkpoints.settings import resolve_settings
    from sparse_ingest.pipeline import ModelSettings

    checkpoint = read_checkpoint(job["model"])
    return checkpoint, resolve_settings(ModelSettings(document=job["model"], max_length=job["max_length"]), checkpoint)


def work(job: Job, texts: Sequence[str]) -> Contender:
    """Count tokens of all texts, and operations of linear layers and attention without padding. Not an encoder."""
    from torch import nn

    from sparse_ingest.models.masked_lms import build_model
    from sparse_ingest.models.tokenizer import Tokenizer

    checkpoint, settings = _model(job)
    lengths = [len(ids) for ids, _ in Tokenizer(checkpoint.transformer, settings)(texts)]
    model = build_model(checkpoint, trust_remote_code=False)
    projection, config = model.get_output_embeddings(), model.config
    layers = [module for module in model.modules() if isinstance(module, nn.Linear) and module is not projection]
    weights = sum(layer.in_features * layer.out_features for layer in layers)
    width = getattr(config, "hidden_size", None) or config.dim
    depth = getattr(config, "num_hidden_layers", None) or config.n_layers
    facts = {
        "tokens": sum(lengths),
        "body_flops": sum(2 * weights * length + 4 * depth * width * length**2 for length in lengths),
        "head_flops": 2 * projection.in_features * projection.out_features * sum(lengths),
        # Skipped on a CPU: dtypes without instructions of their own are slow.
        "rates": {dtype: peak({**job, "dtype": dtype}, []).facts["flops_per_s"] for dtype in GPU_DTYPES}
        if job["device"].startswith("cuda") else {},
    }  # fmt: skip
    return Contender(lambda some: None, lambda some: [], "", facts)


def end_to_end(job: Job, texts: Sequence[str]) -> Contender:
    """Build the command `encode`: from a file of texts to a run of Parquet files, with several processes if requested.

    The file repeats the texts, and the time of a run of a few documents is subtracted: that is startup, which a large
    corpus pays once. The CPU time and memory of several processes are not known here.
    """
    import shutil
    import tempfile

    import numpy as np

    from sparse_ingest.cli.main import cli

    folder, processes = Path(tempfile.mkdtemp(prefix="end-to-end-", dir=Path(job["texts"]).parent)), job["processes"]
    corpus = folder / "corpus.jsonl"
    with corpus.open("w") as file:
        for number in range(REPEATED * len(texts)):
            file.write(json.dumps({"id": str(number), "text": texts[number % len(texts)]}) + "\n")
    settings = ["--device", ",".join([job["device"]] * processes), "--dtype", job["dtype"], "--quiet"]
    settings += ["--max-length", str(job["max_length"])]
    startup = Took(0, 0)
    times = 0  # repetitions

    def run(documents: int) -> Took:
        shutil.rmtree(folder / "run", ignore_errors=True)
        arguments = ["encode", "--model", job["model"], "--corpus", str(corpus), "--out", str(folder / "run")]
        arguments += ["--limit", str(documents)]
        if processes > 1:
            # Several shards per process, so that none waits long for the last one.
            arguments += ["--shard-rows", str(max(1024, documents // (4 * processes)))]
        return timed(lambda: cli.main([*arguments, *settings], standalone_mode=False))

    def encode(some: Sequence[str]) -> Took:
        nonlocal startup, times
        if len(some) <= COMPARED:
            return run(COMPARED)
        if not times:
            startup = run(COMPARED)
            once = max(0.1, run(len(some)).seconds - startup.seconds)
            times = min(REPEATED, max(1, round(REPEATED_S / once), LEAST_REPEATED // len(some)))
        seconds, cpu_seconds = np.subtract(run(times * len(some)), startup) / times
        return Took(float(seconds), float(cpu_seconds) if processes == 1 else 0.0)

    return Contender(encode, lambda some: [], job["dtype"], {"other_processes": processes > 1})


def sentence_transformers(job: Job, texts: Sequence[str]) -> Contender:
    """Build SparseEncoder in one setting."""
    encoder, batch = _sparse_encoder(job, job["dtype"], job.get("attention", "sdpa")), job["batch"]

    def encode(some: Sequence[str]) -> Any:
        return encoder.encode_document(list(some), batch_size=batch, save_to_cpu=True)

    def terms(some: Sequence[str]) -> list[list[int]]:
        return heavy_terms(encode(some).to_dense())

    attention = f", {job['attention']}" if job.get("attention", "sdpa") != "sdpa" else ""
    plain = "" if find_spec("sentence_transformers") else ", transformers alone"
    return Contender(encode, terms, f"{job['dtype']}, batch {batch}{attention}{plain}")


def trial(job: Job, texts: Sequence[str]) -> Contender:
    """Find the fastest setting of sentence-transformers: all on some texts, the best few on all. Not an encoder."""
    some, ends = list(texts[: job["trial"]]), time.monotonic() + job.get("seconds", math.inf)
    batches = _up_to(job.get("call") or len(texts), job["batches"])
    attentions = ["sdpa", "eager", *(["flash_attention_2"] if find_spec("flash_attn") else [])]
    encoders: dict[tuple[str, str], Any] = {}
    rates: dict[tuple[str, str, int], float] = {}
    fastest = 0.0

    def rate(dtype: str, attention: str, batch: int, on: list[str]) -> float:
        encode = partial(encoders[dtype, attention].encode_document, batch_size=batch, save_to_cpu=True)
        return len(on) / timed(lambda: in_calls(encode, on, job.get("call"))).seconds

    for dtype, attention in product(job["dtypes"], attentions):
        if rates and time.monotonic() > ends:
            print(f"{dtype}, {attention}: not tried: time limit reached", file=sys.stderr)
            continue
        try:
            encoders[dtype, attention] = _sparse_encoder(job, dtype, attention)
            warm = max(rate(dtype, attention, 1, some[:2]) for _ in range(2))
        except Exception as error:  # an attention that this model, dtype or device does not support
            print(f"{dtype}, {attention}: not tried, {error}", file=sys.stderr)
            continue
        if warm < (fastest := max(fastest, warm)) / 4:  # bfloat16 on a CPU without instructions for it
            print(f"{dtype}, {attention}: {warm:.2f} documents/s at first, not tried further", file=sys.stderr)
            continue
        for batch in batches:
            if not rates or time.monotonic() < ends:
                rates[dtype, attention, batch] = rate(dtype, attention, batch, some)
    finalists = sorted(rates, key=lambda setting: rates[setting])[-FINALISTS:]
    # Alternating, so that other load on the machine affects all of them.
    again = [
        (rate(*setting, list(texts)), setting) for _ in range(2) for setting in finalists if time.monotonic() < ends
    ]
    dtype, attention, batch = max(again)[1] if again else finalists[-1]
    best = {"dtype": dtype, "attention": attention, "batch": batch}
    return Contender(lambda some: None, lambda some: [], "", {"best": best})


def openvino(job: Job, texts: Sequence[str]) -> Contender:
    """Build SparseEncoder with OpenVINO in float32 and the fastest batch size; it pads each batch to one length."""
    from sentence_transformers import SparseEncoder

    encoder = SparseEncoder(job["model"], device="cpu", backend="openvino", model_kwargs={"export": True})
    encoder.max_seq_length = job["max_length"]

    def encode(some: Sequence[str], batch: int) -> Any:
        return encoder.encode_document(list(some), batch_size=batch, save_to_cpu=True)

    def seconds(batch: int) -> float:
        encode(texts[:batch], batch)  # OpenVINO compiles for a shape
        return timed(lambda: in_calls(partial(encode, batch=batch), texts, job.get("call"))).seconds

    batch = min(_up_to(job.get("call") or len(texts), [1, 4, 16, 32]), key=seconds)

    def terms(some: Sequence[str]) -> list[list[int]]:
        return heavy_terms(encode(some, batch).to_dense())

    return Contender(partial(encode, batch=batch), terms, f"float32, batch {batch}")


def _up_to(most: int, batches: Sequence[int]) -> list[int]:
    return [batch for batch in batches if batch <= most] or [most]


class PlainSplade:
    """SPLADE with transformers alone, in place of sentence-transformers where that is not installed.

    Like there, texts are sorted by length, padded per batch, and pooled with a maximum over complete logits.
    """

    def __init__(self, job: Job, settings: dict[str, Any]) -> None:
        from transformers import AutoModelForMaskedLM, AutoTokenizer

        self._job = job
        self._tokenizer = AutoTokenizer.from_pretrained(job["model"])
        self._model = AutoModelForMaskedLM.from_pretrained(job["model"], **settings).to(job["device"]).eval()

    def encode_document(self, texts: list[str], *, batch_size: int, save_to_cpu: bool) -> Any:
        """Return a sparse tensor with a row for each text."""
        import torch

        order = sorted(range(len(texts)), key=lambda place: -len(texts[place]))
        rows: list[Any] = [None] * len(texts)
        with torch.inference_mode():
            for first in range(0, len(texts), batch_size):
                places = order[first : first + batch_size]
                given = self._tokenizer(
                    [texts[place] for place in places],
                    padding=True, truncation=True, max_length=self._job["max_length"], return_tensors="pt",
                ).to(self._job["device"])  # fmt: skip
                logits = self._model(**given).logits.masked_fill(given["attention_mask"].unsqueeze(-1) == 0, 0)
                weights = torch.log1p(torch.relu(logits.amax(dim=1))).to_sparse()
                for place, row in zip(places, weights.cpu() if save_to_cpu else weights, strict=True):
                    rows[place] = row
        return torch.stack(rows)


def _sparse_encoder(job: Job, dtype: str, attention: str) -> Any:
    import torch

    settings = {"dtype": getattr(torch, dtype), "attn_implementation": attention}
    if not find_spec("sentence_transformers"):
        return PlainSplade(job, settings)
    from sentence_transformers import SparseEncoder

    encoder = SparseEncoder(job["model"], device=job["device"], model_kwargs=settings)
    encoder.max_seq_length = job["max_length"]
    return encoder


def yasem(job: Job, texts: Sequence[str]) -> Contender:
    """Build the yasem SpladeEmbedder with its defaults, but float32 on a CPU, where its float16 is slower."""
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


def light_splade(job: Job, texts: Sequence[str]) -> Contender:
    """Build light-splade's SpladeEncoder with its defaults: float32, batch 32."""
    import numpy as np
    from light_splade import SpladeEncoder

    encoder = SpladeEncoder(job["model"], device=job["device"])

    def encode(some: Sequence[str], form: str = "csr_matrix") -> Any:
        return encoder.encode(list(some), max_seq_length=job["max_length"], return_type=form)

    def terms(some: Sequence[str]) -> list[list[int]]:
        return [np.flatnonzero(row > HEAVY).tolist() for row in encode(some, "numpy")]

    return Contender(encode, terms, "float32, batch 32")


def vllm(job: Job, texts: Sequence[str]) -> Contender:
    """Build vLLM's SPLADE model of BERT in float32; it forms its own batches, and returns dense rows."""
    import os
    import tempfile

    from safetensors.torch import load_file, save_file
    from transformers import AutoTokenizer

    os.environ |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
    from vllm import LLM

    folder = Path(tempfile.mkdtemp(prefix="sparse-ingest-bench-"))
    for file in Path(job["model"]).glob("*.json"):
        (folder / file.name).write_bytes(file.read_bytes())
    # vLLM reads the projection under its own name only, also where it is the same as the embeddings.
    tensors, head = load_file(Path(job["model"]) / "model.safetensors"), "cls.predictions"
    tensors[f"{head}.decoder.weight"] = tensors["bert.embeddings.word_embeddings.weight"].clone()
    tensors[f"{head}.decoder.bias"] = tensors[f"{head}.bias"].clone()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    tokenizer, names = AutoTokenizer.from_pretrained(folder), {"architectures": ["BertSpladeSparseEmbeddingModel"]}
    model = LLM(str(folder), runner="pooling", hf_overrides=names, dtype="float32", max_model_len=job["max_length"])

    def encode(some: Sequence[str]) -> list[Any]:
        ids = tokenizer(list(some), truncation=True, max_length=job["max_length"])["input_ids"]
        prompts = [{"prompt_token_ids": one} for one in ids]
        return [found.outputs.data for found in model.encode(prompts, pooling_task="embed", use_tqdm=False)]

    return Contender(encode, lambda some: heavy_terms(encode(some)), "float32", {"other_processes": True})


def peak(job: Job, texts: Sequence[str]) -> Contender:
    """Measure products of large square matrices, for the share of the hardware bound. Not an encoder."""
    import torch

    device, size = torch.device(job["device"]), 8192 if job["device"].startswith("cuda") else 2048
    multiply: Callable[[Any, Any], Any]
    if job["dtype"] == "int8":
        left, right = (torch.randint(-127, 128, (size, size), device=device, dtype=torch.int8) for _ in range(2))
        multiply = torch._int_mm
    else:
        dtype = getattr(torch, job["dtype"])
        left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
        multiply = torch.mm
        if device.type == "cpu":
            products: list[Callable[[Any, Any], Any]] = [torch.mm, _onednn_of(right)]
            multiply = min(products, key=lambda product: timed(lambda: product(left, right)).seconds)

    def multiplied(_: object) -> None:
        for _turn in range(4):
            multiply(left, right)
        if device.type == "cuda":
            torch.cuda.synchronize()

    multiplied(None)
    ends, seconds = time.monotonic() + PEAK_S, [timed(lambda: multiplied(None)).seconds]
    while len(seconds) < 20 and time.monotonic() < ends:
        seconds.append(timed(lambda: multiplied(None)).seconds)
    rate = 8 * size**3 / min(seconds)
    return Contender(multiplied, lambda some: [], job["dtype"], {"flops_per_s": rate})


def _onednn_of(right: Any) -> Callable[[Any, Any], Any]:
    """Return the product that sparse-ingest's linear layers use: on CPUs of AMD that of MKL takes twice as long."""
    from sparse_ingest.models.linear import product_of

    product = product_of(right.T.contiguous())
    product(right)  # compiles
    return lambda left, _: product(left)


ENCODERS: dict[str, Callable[[Job, Sequence[str]], Contender]] = {
    "ours": ours,
    "end to end": end_to_end,
    "sentence-transformers": sentence_transformers,
    "openvino": openvino,
    "vllm": vllm,
    "trial": trial,
    "yasem": yasem,
    "light-splade": light_splade,
    "work": work,
    "peak": peak,
}

if __name__ == "__main__":
    main()
