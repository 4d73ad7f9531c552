"""The commands and code of the README and the documentation pages run, in the order of the pages."""

from __future__ import annotations

import contextlib
import io
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.checkpoints import PACKAGED
from support.kept_models import keep_models
from support.shells import shell, warm_command

import sparse_ingest
from sparse_ingest.checkpoints.locate import locate

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
README = (ROOT / "README.md").read_text(encoding="utf-8")
# Pages whose code blocks run in this order, in one folder.
GUIDES = ("getting-started", "guides/reports", "guides/corpora", "guides/models", "guides/changing-corpora",
          "guides/searching", "guides/services", "guides/evaluating", "guides/switching-models",
          "guides/past-one-machine", "how-it-works/run-folder")  # fmt: skip


def blocks(page: str, languages: str) -> list[tuple[str, str]]:
    """Return language and content of each code block in these languages."""
    return re.findall(rf"^```({languages})\n(.*?)^```$", page, flags=re.MULTILINE | re.DOTALL)


def page_of(name: str) -> str:
    return (DOCS / f"{name}.md").read_text(encoding="utf-8")


def adapted(page: str, url: str, index: str) -> str:
    """Return the page with the index and address of the test, and models that need no download."""
    changes = {
        r"http://127\.0\.0\.1:9200": url,
        r"--pipeline splade-mini|--pipeline inference-free-distilbert-nq": "--pipeline demo",
        r"--pipeline splade-distilbert-mrl": "--model ../other-model",
        r"rasyosef/splade-mini": "package:cognition/model",
        r'"splade-mini"': '"demo"',
        r'(--index |--alias |URL/|index="|open_index\(")(articles|drafts|library)': rf"\1{index}-\2",
    }
    for before, after in changes.items():
        page = re.sub(before, after, page)
    return page


@pytest.fixture(scope="module", autouse=True)
def _kept_models() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        keep_models(patch)
        yield


def write_other_model(folder: Path) -> None:
    """Copy the packaged model with another activation in its layers, so that its vectors differ."""
    shutil.copytree(locate(PACKAGED)[0], folder)
    config = folder / "config.json"
    config.write_text(config.read_text().replace('"gelu"', '"relu"'))


def run_pages(pages: dict[str, str], folder: Path, url: str) -> dict[str, str]:
    """Run the blocks of all pages in one folder. Return what each page prints."""
    (folder / "bin").mkdir()
    (folder / "work").mkdir()
    printed = dict.fromkeys(pages, "")
    with contextlib.chdir(folder / "work"), warm_command(folder / "bin") as server:
        for name, page in pages.items():
            for language, code in blocks(page, "sh|python"):
                if language == "sh":
                    printed[name] += shell(code, folder / "work", folder / "bin", url, server)
                else:
                    with contextlib.redirect_stdout(io.StringIO()) as out:
                        exec(compile(code, name, "exec"), {})  # noqa: S102
                    printed[name] += out.getvalue()
    return printed


def test_the_readme_runs(opensearch_url: str, index_name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPARSE_INGEST_URL", opensearch_url)
    printed = run_pages({"README": adapted(README, opensearch_url, index_name)}, tmp_path, opensearch_url)["README"]
    assert "The index matches the run." in printed
    assert printed.count("Sourdough") >= 3
    assert re.search(r"^\{'\w+': \d", printed, re.MULTILINE)
    assert re.search(r"^True$", printed, re.MULTILINE)


def test_the_guides_run(opensearch_url: str, index_name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPARSE_INGEST_URL", opensearch_url)
    pages = {name: adapted(page_of(name), opensearch_url, index_name) for name in GUIDES}
    write_other_model(tmp_path / "other-model")
    printed = run_pages(pages, tmp_path, opensearch_url)
    assert "3 documents" in printed["getting-started"] and "Photosynthesis" in printed["getting-started"]
    assert "3 rows: 3 documents" in printed["guides/corpora"]
    assert "BertForMaskedLM" in printed["guides/models"]
    assert "The index matches the run." in printed["guides/changing-corpora"]
    assert "q1 Q0 2 1 " in printed["guides/searching"]
    # The text that `show` encodes as a document.
    assert re.search(r"^ +bread +2\.6586\n(.*\n)* +food .* expansion\n", printed["guides/searching"], re.MULTILINE)
    assert re.search(r"^     rank \d of \d hits$", printed["guides/searching"], re.MULTILINE)
    assert printed["guides/services"].startswith("2 ")
    assert re.search(r"^nDCG@10 .* 0 +0 +1$", printed["guides/evaluating"], re.MULTILINE)
    assert re.match(r"Wrote articles\.html\.\nWrote articles-index\.html\.\n\S+ \d ", printed["guides/reports"])
    switching = printed["guides/switching-models"]
    assert "The index matches the run." in switching
    # The command that goes back, and what it prints.
    [(to, back)] = set(re.findall(r"To go back: sparse-ingest load --alias (\S+) --to (\S+)", switching))
    assert f"Alias {to!r} serves {back!r}; before: " in switching
    assert re.search(rf"index  {back} \(alias {to}\)\n(.*\n)* +model  .*cognition", switching)
    assert printed["how-it-works/run-folder"].splitlines()[0].startswith("1 ['")


def test_every_page_with_shell_or_python_blocks_is_tested() -> None:
    with_blocks = {
        str(path.relative_to(DOCS).with_suffix(""))
        for path in DOCS.rglob("*.md")
        if blocks(path.read_text(encoding="utf-8"), "sh|python")
    }
    assert with_blocks == set(GUIDES)


def test_every_block_names_its_language() -> None:
    for path in (ROOT / "README.md", *DOCS.rglob("*.md")):
        fences = re.findall(r"^```(.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
        assert all(fences[::2]), f"{path}: a block has no language"


def test_the_readme_has_at_most_9_kb() -> None:
    assert len(README.encode()) <= 9_000


def test_every_command_is_in_the_readme() -> None:
    from sparse_ingest.cli.main import cli

    for name, entry in cli.commands.items():
        assert entry.help, name
        assert f"`{name}`" in README, name


@pytest.mark.parametrize("path", ["README.md", "CONTRIBUTING.md", "docs/getting-started.md"])
def test_the_make_targets_of_a_page_exist(path: str) -> None:
    targets = re.findall(r"^([a-z-]+):.*## ", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    used = re.findall(r"(?:^|`)make ([a-z-]+)", (ROOT / path).read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert used
    assert set(used) <= set(targets)


def test_links_of_the_readme_exist() -> None:
    for target in re.findall(r"\]\(([^)#]+)", README):
        assert (ROOT / target).exists(), target


def test_the_api_page_has_every_public_name_once() -> None:
    listed = re.findall(r"^::: sparse_ingest\.[\w.]+\.(\w+)$", page_of("reference/python-api"), re.MULTILINE)
    assert sorted(listed) == sorted(sparse_ingest.__all__)


def test_the_pages_of_settings_and_variables_list_all() -> None:
    from dataclasses import fields

    from sparse_ingest.cluster.connection import Connection
    from sparse_ingest.pipeline import Pipeline, packaged_folder

    variables = page_of("reference/environment")
    for setting in fields(Connection):
        assert f"`{setting.metadata['env']}`" in variables, setting.name
    page = page_of("reference/pipeline-file")
    for table in fields(Pipeline):
        section = page.partition(f"## [{table.name}]\n")[2].partition("\n## ")[0]
        for setting in fields(getattr(Pipeline(), table.name)):
            assert re.search(rf"`{setting.name}`", section), f"[{table.name}] {setting.name}"
    for path in packaged_folder().glob("*.toml"):
        assert f"`{path.stem}`" in page, path.stem


def test_the_page_of_models_has_the_family_names_that_inspect_prints() -> None:
    from sparse_ingest.checkpoints.families import FAMILIES

    section = page_of("guides/models").partition("\n## Families\n")[2].partition("\n## ")[0]
    assert re.findall(r"^\| `(.+?)` \|", section, re.MULTILINE) == list(FAMILIES)


def test_the_example_pipeline_file_is_valid(tmp_path: Path) -> None:
    [(_, example)] = blocks(page_of("reference/pipeline-file"), "toml")
    (tmp_path / "p.toml").write_text(example)
    assert sparse_ingest.read_pipeline(str(tmp_path / "p.toml")).load.top_k == 200


def test_the_chart_has_the_numbers_of_the_benchmark() -> None:
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        from draw import ENCODERS, MODELS, speeds
    finally:
        sys.path.pop(0)
    drawn = (DOCS / "assets" / "speed.svg").read_text()
    for model in MODELS:
        rates = {encoder: rate for encoder, rate in speeds()[model].items() if encoder in ENCODERS}
        assert len(rates) >= 4 and "sparse-ingest, auto" in rates
        for encoder, rate in rates.items():
            assert f">{rate:,.0f}<" in drawn or f">{rate:.1f}<" in drawn, (model, encoder, rate)
