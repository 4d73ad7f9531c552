"""Every form of corpus, encoded by tasks on two nodes of Ray: the same bytes as one process."""

from __future__ import annotations

import codecs
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support.checkpoints import make_masked_lm
from support.forms import FORMS, content_of, write_form
from support.run_contents import contents, lasting

from sparse_ingest.encoding.encode import encode

ray = pytest.importorskip("ray", reason="the extra ray is not installed")
from support.ray_nodes import two_nodes  # noqa: E402

pytestmark = pytest.mark.slow
ROWS = [
    {"_id": f"d{row}", "title": f'a "title", {row}', "text": f"the river\nstone {row} é " * (row % 9)}
    for row in range(700)
]
LASTING = ("manifest.json", "vocab.json", "complete.json", "shards/", "skipped/")


@pytest.fixture(scope="module")
def nodes() -> Iterator[None]:
    """Two nodes with one CPU each, to which this process is connected."""
    with two_nodes() as cluster:
        ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
        yield
        ray.shutdown()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_masked_lm(tmp_path_factory.mktemp("model")))


def one_file(form: str) -> Callable[[Path], list[Path]]:
    return lambda folder: [write_form(folder, form, ROWS)]


def with_mark_and_crlf(form: str) -> Callable[[Path], list[Path]]:
    def write(folder: Path) -> list[Path]:
        path = folder / f"corpus{form}"
        path.write_bytes(codecs.BOM_UTF8 + content_of(form, ROWS).replace(b"\r\n", b"\n").replace(b"\n", b"\r\n"))
        return [path]

    return write


def several_files(folder: Path) -> list[Path]:
    parts = ((".jsonl", 0, 230), (".csv.gz", 230, 231), (".parquet", 231, 500), (".arrows", 500, 700))
    return [write_form(folder, form, ROWS[start:end], f"part-{start:03}") for form, start, end in parts]


CORPORA = {
    **{form: one_file(form) for form in FORMS},
    **{f"{form} with BOM and CRLF": with_mark_and_crlf(form) for form in (".jsonl", ".csv", ".tsv")},
    "several files": several_files,
}


@pytest.mark.parametrize("write", CORPORA.values(), ids=list(CORPORA))
def test_two_nodes_give_the_bytes_of_one_process(
    nodes: None, model: str, tmp_path: Path, write: Callable[[Path], list[Path]]
) -> None:
    corpus = write(tmp_path)
    settings = {"model": model, "shard_rows": 50, "dtype": "float32", "device": "cpu"}
    alone = encode(corpus, tmp_path / "alone", **settings)
    run = encode(corpus, tmp_path / "nodes", executor="ray", workers=2, **settings)
    first, second = (
        {name: content for name, content in contents(one.path).items() if name.startswith(LASTING)}
        for one in (alone, run)
    )
    assert second == first
    assert len(run.done_shards()) == 14
    assert lasting(run) == lasting(alone)
