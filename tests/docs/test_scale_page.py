"""docs/scale.md has the tables of benchmarks/scale.py, and its plan follows from the same rates."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "scale.md").read_text(encoding="utf-8")
PLANNED = 1_290_000_000


@pytest.fixture
def scale(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import scale

    yield scale
    del sys.modules["scale"]


def test_the_page_has_the_tables_of_the_script(scale) -> None:
    assert [line for line in scale.table(scale.Prices()) if line and line not in PAGE] == []


def test_the_plan_has_the_numbers_of_the_script(scale) -> None:
    load = PLANNED * scale.LOAD_VCPU_HOURS
    for text in (
        f"{PLANNED * scale.RUN_BYTES / 1e12:.2f} TB in {-(-PLANNED // scale.SHARD_ROWS):,} shards",
        f"{PLANNED * scale.INDEX_BYTES / 1e12:.2f} TB",
        f"distilbert: {PLANNED / scale.GPU_RATES['distilbert'] / 3600:.0f} H200 hours",
        f"{PLANNED / scale.CPU_RATES['distilbert'] / 3600:,.0f} vCPU hours",
        f"{load / 720 / scale.LOAD_SHARE * 60:.0f} minutes at 60% of the vCPUs, from {load:.0f} vCPU hours (a)",
    ):
        assert text in PAGE, text


def test_the_rates_are_those_of_the_benchmark(scale) -> None:
    from draw import speeds

    measured = speeds("### On a CPU with AVX512")
    assert {model: 2 * rate for model, rate in scale.CPU_RATES.items()} == {
        model: measured[model]["sparse-ingest, auto"] for model in scale.CPU_RATES
    }
