"""`--dtype auto`: the fastest dtype that keeps the weights and terms of float32.

Candidates have a fixed order per device; nothing is timed. Each encodes the first documents of the corpus, for about a
minute, and the first candidate that keeps enough of float32's weights and terms is chosen. The choice is stored in the
run and used when it is resumed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from sparse_ingest.models.documents import DocumentEncoder
from sparse_ingest.models.linear import has_amx, has_fast_bfloat16, has_fast_int16, has_vnni
from sparse_ingest.models.memory import DocumentTooLarge, until_it_fits
from sparse_ingest.models.vectors import NotFinite
from sparse_ingest.records import SparseRows

SAMPLE = 256  # documents
# At most this many tokens of them, which a large model reads in a minute on two cores.
SAMPLE_TOKENS = 16384
KEPT_MASS = 0.999  # of float32's sum of weights, on terms that the candidate has too
KEPT_TERMS = 0.99  # of float32's terms above TERM_WEIGHT
TERM_WEIGHT = 0.1


def faster_dtypes(device: str, *, projects: bool = True) -> tuple[str, ...]:
    """Return the dtypes that are faster than float32 on a device, fastest first.

    `projects`: the model has a vocabulary projection, which the int8 types are for.

    On a CPU with VNNI integers are the fastest, in the linear layers too: on Zen 5 int8-int8 is 1.4 times as fast as
    int8-bfloat16 for DistilBERT, 1.1 times for BERT-mini, and as fast for BERT-tiny. AMX multiplies faster than VNNI,
    in bfloat16 too. The body is faster in bfloat16 with AMX, or with AVX512_BF16 at full rate, otherwise slower. The
    head matters more in small models (on Zen 4 int8 is 1.4 times as fast as bfloat16 for BERT-tiny), the body in large
    ones (0.7 times for DistilBERT). With AVX2 alone only int16 is faster than float32. On a GPU both half types are
    equally fast, and float16 has three bits more.
    """
    if device.startswith("cuda"):
        return ("float16", "bfloat16")
    fast_body, fast_head = has_fast_bfloat16(), projects and has_vnni()
    by_speed = {
        "int8-int8": fast_head and not has_amx(), "int8-bfloat16": fast_body and fast_head, "bfloat16": fast_body,
        "int8": fast_head, "int16": has_fast_int16(),
    }  # fmt: skip
    return tuple(dtype for dtype, is_fast in by_speed.items() if is_fast)


def choose_dtype(
    build: Callable[[str], DocumentEncoder], device: str, texts: Sequence[str], *, projects: bool = True
) -> dict[str, Any]:
    """Return the chosen `dtype` and the results of the candidates, for the manifest; as `faster_dtypes`."""
    tried: dict[str, Any] = {}
    choice = {"dtype": "float32", "device": device, "documents": len(texts), "tried": tried}
    faster = faster_dtypes(device, projects=projects)
    if faster and texts:
        expected, texts = _sampled(build("float32"), texts)
        choice["documents"] = len(texts)
        for dtype in faster if texts else ():
            try:
                mass, terms = _kept(expected, until_it_fits(partial(build(dtype).encode, texts)).vectors)
            except NotFinite:
                mass, terms = 0.0, 0.0
            tried[dtype] = {"mass": round(mass, 6), "terms": round(terms, 6)}
            if mass >= KEPT_MASS and terms >= KEPT_TERMS:
                return {**choice, "dtype": dtype}
    return choice


def _sampled(encoder: DocumentEncoder, texts: Sequence[str]) -> tuple[SparseRows, Sequence[str]]:
    """Return the float32 vectors of as many texts as SAMPLE_TOKENS allows, and those texts."""
    tokens = np.cumsum([len(window.token_ids) for window in encoder.tokenize(texts)])
    texts = texts[: max(1, int(np.searchsorted(tokens, SAMPLE_TOKENS, side="right")))]
    while True:
        try:
            return until_it_fits(partial(encoder.encode, texts)).vectors, texts
        except DocumentTooLarge as large:  # the run itself reports it, if it does not fit there either
            texts = [*texts[: large.text], *texts[large.text + 1 :]]


def _kept(expected: SparseRows, found: SparseRows) -> tuple[float, float]:
    """Return which shares of float32's sum of weights, and of its terms above TERM_WEIGHT, the other vectors keep."""
    if not np.isfinite(found.weights).all():
        return 0.0, 0.0
    common = np.isin(_keys(expected), _keys(found), assume_unique=True)
    mass = float(expected.weights.sum(dtype=np.float64))
    heavy = expected.weights > TERM_WEIGHT
    kept_mass = float(expected.weights[common].sum(dtype=np.float64)) / mass if mass else 1.0
    return kept_mass, float(common[heavy].mean()) if heavy.any() else 1.0


def _keys(rows: SparseRows) -> npt.NDArray[np.int64]:
    """Return one number per (text, token)."""
    return np.repeat(np.arange(len(rows.doc_ids)), np.diff(rows.indptr)) << 32 | rows.token_ids
