"""Two parts of benchmarks/gpu.sh: the bytes of two processes on one device, and where the time goes.

    python benchmarks/gpu.py equal --device cuda:0      two processes at the same time, and one alone
    python benchmarks/gpu.py profile --device cuda:0    a table of torch's profiler

The models have random weights in a shape of benchmarks/shapes.py. Only torch, transformers and msgspec are needed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from shapes import make_shape, read_texts


def main() -> None:
    """Run the part of the first argument."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["equal", "profile", "hash"])
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--dtype", default="float16")
    parser.add_argument("--shape", default="tiny")
    parser.add_argument("--documents", type=int, default=4096)
    parser.add_argument("--model", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.part == "hash":
        print(digest(given))
        return
    with tempfile.TemporaryDirectory(prefix="sparse-ingest-bench-") as folder:
        given.model = str(make_shape(given.shape, Path(folder) / given.shape))
        show_profile(given) if given.part == "profile" else compare(given)


def build(given: argparse.Namespace) -> Any:
    """Return the encoder."""
    from encoders import _model

    from sparse_ingest.models.documents import DocumentEncoder

    checkpoint, settings = _model({"model": given.model, "max_length": 128})
    return DocumentEncoder(checkpoint, settings, device=given.device, dtype=given.dtype)


def digest(given: argparse.Namespace) -> str:
    """Return the SHA-256 of all token ids and weights."""
    found = build(given).encode(read_texts(None, given.documents)).vectors
    parts = (found.indptr.tobytes(), found.token_ids.tobytes(), found.weights.tobytes())
    return hashlib.sha256(b"".join(parts)).hexdigest()


def compare(given: argparse.Namespace) -> None:
    """Print the hashes of two processes that run at the same time, and of one alone; exit with 1 if they differ."""
    command = [sys.executable, __file__, "hash", "--model", given.model, "--device", given.device]
    command += ["--dtype", given.dtype, "--documents", str(given.documents)]
    found = {}
    for processes in (2, 1):
        started = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(processes)]
        found[processes] = {process.communicate()[0].strip() for process in started}
        if any(process.returncode for process in started):
            sys.exit("a process failed; its errors are above")
    print("\n| processes at the same time | SHA-256 of the vectors |\n|---|---|")
    for processes, hashes in found.items():
        print(f"| {processes} | {' and '.join(sorted(hashes))} |")
    if len(set().union(*found.values())) > 1:
        sys.exit("the bytes differ; expected the same ones")


def show_profile(given: argparse.Namespace) -> None:
    """Print the kernels with the most time, and the memory of the device."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    encoder, texts = build(given), read_texts(None, given.documents)
    on_gpu = given.device.startswith("cuda")
    encoder.encode(texts)
    # On a CPU the encoder computes in threads of its own; kernels of a GPU are recorded for all threads.
    threads = None if on_gpu else torch._C._profiler._ExperimentalConfig(profile_all_threads=True)
    activities = [ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]
    with profile(activities=activities, experimental_config=threads) as recorded:
        encoder.encode(texts)
    of = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    events = sorted(recorded.key_averages(), key=lambda event: getattr(event, of), reverse=True)
    total = sum(getattr(event, of) for event in events) or 1
    print("\n| operation | calls | ms | share |\n|---|---|---|---|")
    for event in events[:20]:
        spent = getattr(event, of)
        name = event.key.replace("|", "/")[:80]
        print(f"| `{name}` | {event.count:,} | {spent / 1e3:,.1f} | {spent / total:.1%} |")
    if on_gpu:
        print(f"\n{json.dumps({'peak MB': round(torch.cuda.max_memory_allocated() / 1e6)})}")


if __name__ == "__main__":
    main()
