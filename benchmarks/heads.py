"""Speed of the heads alone: hidden states to weights, without a body, compared with large products of the same dtype.

    python benchmarks/heads.py [--device cpu] [--widths 128,256,768] [--documents 16] [--tokens 127] [--rounds 5]

Each head computes the same random hidden states of one batch over BERT's vocabulary in one thread; the best round
counts. Prints a table of 10^9 operations/s (a product and its sum are two), the ratio to the plain head of the dtype,
and the share of the rate of a large square product of that dtype in torch. Needs the extra `encode`, and `fast` for
compiled heads on a CPU.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec

import torch
from encoders import peak

from sparse_ingest.models.heads.cpu_kernel import Kernel, instructions_for
from sparse_ingest.models.heads.tiles import Head, IntegerHead, TiledHead
from sparse_ingest.models.linear import KERNEL_DTYPES, has_amx, has_avx512_bfloat16, has_vnni
from sparse_ingest.models.packing import Packing

VOCABULARY = 30522


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--widths", default="128,256,768")
    parser.add_argument("--documents", type=int, help="[default: 16 on the CPU, 512 on a GPU]")
    parser.add_argument("--tokens", type=int, default=127)
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    device = torch.device(given.device)
    documents = given.documents or (512 if device.type == "cuda" else 16)
    torch.set_num_threads(1)
    packing = Packing((given.tokens,) * documents, device)
    print("| width | head | GOP/s | to plain | of a product |\n|---|---|---|---|---|")
    for width in map(int, given.widths.split(",")):
        generator = torch.Generator().manual_seed(0)
        rows = torch.randn(given.tokens * documents, width, generator=generator).to(device)
        weight, bias = torch.randn(VOCABULARY, width, generator=generator), torch.randn(VOCABULARY, generator=generator)
        heads = heads_of(device, weight, bias)
        runs = {name: run_of(head, rows.to(dtype), packing) for name, (head, dtype, _) in heads.items()}
        seconds = best_of(given.rounds, runs, device)
        for name, (_, _, factors) in heads.items():
            rate = 2 * rows.shape[0] * width * VOCABULARY / seconds[name] / 1e9
            plain = seconds.get(f"{name.partition(',')[0]}, plain", seconds["float32, plain"])
            share = rate * 1e9 / peak_of(device, factors)
            print(f"| {width} | {name} | {rate:,.0f} | {plain / seconds[name]:.2f} | {share:.0%} |", flush=True)


def heads_of(
    device: torch.device, weight: torch.Tensor, bias: torch.Tensor
) -> dict[str, tuple[Head, torch.dtype, torch.dtype]]:
    """Return every head of this device with the dtype of its rows and of its factors."""
    halves: tuple[torch.dtype, ...] = (torch.float16, torch.bfloat16)
    if device.type == "cpu":
        halves = (torch.bfloat16,) if has_avx512_bfloat16() or has_amx() else ()
    compiles = device.type == "cpu" and find_spec("llvmlite")
    heads: dict[str, tuple[Head, torch.dtype, torch.dtype]] = {}
    for dtype in (torch.float32, *halves):
        name = str(dtype).removeprefix("torch.")
        heads[f"{name}, plain"] = TiledHead(weight, bias, device=device, dtype=dtype), dtype, dtype
        if device.type == "cuda" and dtype != torch.float32:
            from sparse_ingest.models.heads.triton_max import TritonHead

            heads[f"{name}, Triton"] = TritonHead(weight, bias, device=device, dtype=dtype), dtype, dtype
        elif compiles and (instructions := instructions_for(dtype, weight.shape[1])):
            kernel = Kernel(weight.to(dtype), bias, instructions=instructions)
            heads[f"{name}, {instructions}"] = kernel, dtype, dtype
    if device.type == "cpu" and has_vnni():
        heads["int8, plain"] = IntegerHead(weight, bias, torch.int8), torch.float32, torch.int8
    for integers in (torch.int8, torch.int16):
        if compiles and (instructions := instructions_for(integers, weight.shape[1])):
            compiled = IntegerHead(weight, bias, integers, instructions=instructions)
            # Torch multiplies int16 slowly: its head is compared with the plain one and the product of float32.
            factors = torch.float32 if integers == torch.int16 else integers
            heads[f"{KERNEL_DTYPES[integers]}, {instructions}"] = compiled, torch.float32, factors
    return heads


def run_of(head: Head, rows: torch.Tensor, packing: Packing) -> Callable[[], object]:
    """Return a function that runs one batch through a head."""
    return lambda: head(rows, packing)


@cache
def peak_of(device: torch.device, dtype: torch.dtype) -> float:
    """Return operations/s of a large product."""
    found = peak({"device": str(device), "dtype": str(dtype).removeprefix("torch.")}, [])
    return float(found.facts["flops_per_s"])


def best_of(rounds: int, runs: dict[str, Callable[[], object]], device: torch.device) -> dict[str, float]:
    """Return the shortest time of each function, after one warm-up round."""
    best = dict.fromkeys(runs, float("inf"))
    with torch.inference_mode():
        for turn in range(rounds + 1):
            for name, run in runs.items():
                began = time.perf_counter()
                run()
                if device.type == "cuda":
                    torch.cuda.synchronize(device)
                if turn:
                    best[name] = min(best[name], time.perf_counter() - began)
    return best


if __name__ == "__main__":
    main()
