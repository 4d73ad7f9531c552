"""The index size that `encode` estimates is within 10% of the merged index, on a real server with real texts."""

from __future__ import annotations

import re
from pathlib import Path
from pydoc_data.topics import topics

import pytest
from support.forked import command
from support.run_contents import write

from sparse_ingest.cluster.client import Client, Connection
from sparse_ingest.encoding import estimate
from sparse_ingest.loading.load import load
from sparse_ingest.pipeline import Pipeline

_UNITS = {"bytes": 1, "KB": 1e3, "MB": 1e6}


def rows() -> list[dict[str, object]]:
    """Return 600 paragraphs of the Python language reference, with fields that a load maps."""
    found = [
        {"_id": f"{topic}/{place}", "title": topic, "text": text.strip(), "topic": topic, "place": place}
        for topic, paragraphs in sorted(topics.items())
        for place, text in enumerate(paragraphs.split("\n\n"))
        if 60 < len(text.strip()) < 300
    ]
    return found[:600]


@pytest.mark.slow  # retention leases expire after up to 30 s
def test_the_estimated_size_is_within_10_percent_of_the_merged_index(
    client: Client, index_name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(estimate, "DOCUMENTS", 500)
    corpus, runs = write(tmp_path / "corpora" / "corpus.jsonl", rows()), {}
    for name, options in {
        "text": (),
        "fields": ("--keep", "topic", "--keep", "place", "--reuse", tmp_path / "text"),
        "no-text": ("--no-text", "--reuse", tmp_path / "text"),
    }.items():
        answer = command("encode", "--model", "package:cognition/model", "--corpus", corpus, "--out", tmp_path / name,
                         "--dtype", "float32", "--json", *options)  # fmt: skip
        assert answer.code == 0, answer.err
        number, unit = re.search(r"a merged index of about ([\d.,]+) (\w+)", answer.err).groups()  # type: ignore[union-attr]
        runs[name] = float(number.replace(",", "")) * _UNITS[unit]
    # Load all, then merge all: so their retention leases expire together. The third load finds them merged.
    reports = [
        {
            name: load(tmp_path / name, index=f"{index_name}-{name}", pipeline=Pipeline(),
                       connection=Connection(client.address), merge=merge)
            for name in runs
        }
        for merge in (False, True, True)
    ]  # fmt: skip
    for name, estimated in runs.items():
        _, first, second = (report[name] for report in reports)
        assert first.merged_to_bytes == pytest.approx(estimated, rel=0.1), name
        assert second.merged_from_bytes == second.merged_to_bytes == first.merged_to_bytes
        assert second.merged
