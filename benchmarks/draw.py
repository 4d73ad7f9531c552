"""Draw the pictures of the documentation: the speed chart, a terminal session and the search page.

    python benchmarks/draw.py chart                  from the tables in benchmarks/README.md
    python benchmarks/draw.py terminal RUN           from a real search of a run folder, such as demo-run/run
    python benchmarks/draw.py page URL               from a running service, such as of sparse-ingest demo --keep-server

They are written to docs/assets/, the first two as SVG.
"""

from __future__ import annotations

import io
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from urllib.parse import urlencode

ASSETS = Path(__file__).parents[1] / "docs" / "assets"
BENCHMARKS = Path(__file__).parent / "README.md"
SECTION = "### On a CPU with AVX2"  # of the tables that are drawn
ENCODERS = {
    "sparse-ingest, auto": "sparse-ingest",
    "openvino": "sentence-transformers, OpenVINO",
    "sentence-transformers, best": "sentence-transformers, best setting found",
    "sentence-transformers, batch 32": "sentence-transformers, float32, batch 32",
}
MODELS = {"tiny": "BERT-tiny", "mini": "BERT-mini", "distilbert": "DistilBERT"}
MACHINE = "2 cores of an AMD EPYC (AVX2), no GPU; passages cut at 256 tokens; int16 beside float32 of the others"
QUESTION = "how do I leave a loop early"
WIDTH = 100


def speeds(heading: str = SECTION) -> dict[str, dict[str, float]]:
    """Return documents/s by model and encoder from the tables under a heading."""
    found: dict[str, dict[str, float]] = {}
    section = BENCHMARKS.read_text().partition(f"\n{heading}\n")[2].partition("\n### ")[0]
    for title, table in re.findall(r"^\*\*(\S+)\*\* .*?\n\n((?:\|.*\n)+)", section, re.MULTILINE):
        rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]
        found[title] = {row[0]: float(row[2]) for row in rows}
    return found


def draw_chart() -> None:
    """Write speed.svg."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams |= {"svg.hashsalt": "sparse-ingest", "svg.fonttype": "none", "font.family": "sans-serif"}
    from matplotlib import pyplot

    rates = speeds()
    figure, axes = pyplot.subplots(1, len(MODELS), figsize=(10, 2.9), sharey=True)
    for axis, (model, name) in zip(axes, MODELS.items(), strict=True):
        values = [rates[model].get(encoder, 0) for encoder in ENCODERS]
        colors = ["#0f766e"] + ["#94a3b8"] * (len(values) - 1)
        bars = axis.barh(list(ENCODERS.values()), values, color=colors)
        axis.bar_label(bars, [f"{value:,.{int(value < 10)}f}" if value else "" for value in values], padding=3)
        axis.set_title(f"{name}: {values[0] / max(values[1:]):.1f}×", fontsize=10)
        axis.set_xlim(0, max(values) * 1.18)
        axis.xaxis.set_visible(False)
        for side in ("top", "right", "bottom"):
            axis.spines[side].set_visible(False)
    axes[0].invert_yaxis()
    figure.suptitle("Documents/s (×: of the fastest other encoder)", fontsize=11)
    figure.text(0.01, 0.01, MACHINE, fontsize=8, color="#64748b")
    figure.tight_layout(rect=(0, 0.04, 1, 1))
    figure.savefig(ASSETS / "speed.svg", metadata={"Date": None})


def draw_terminal(run: str) -> None:
    """Write terminal.svg: the output of two searches of a run."""
    from rich.console import Console
    from rich.text import Text

    console = Console(record=True, width=WIDTH, file=io.StringIO())
    for options in (["-k", "3"], ["-k", "1", "--explain"]):
        arguments = ["search", "--run", run, QUESTION, *options]
        console.print(Text(f"$ {shlex.join(['sparse-ingest', *arguments])}", style="bold"))
        program = [sys.executable, "-c", "from sparse_ingest.cli.main import main; main()"]
        shown = subprocess.run([*program, *arguments], capture_output=True, text=True, check=True).stdout
        for line in shown.splitlines():
            cut = line if len(line) <= WIDTH else f"{line[: WIDTH - 1]}…"
            console.print(Text(cut, style="bold green" if re.match(r"\s+\d+  \d", line) else ""))
    drawn = console.export_svg(title="sparse-ingest", unique_id="terminal")
    # rich links to fonts on another host.
    drawn = re.sub(r"\s*@font-face \{.*?\}", "", drawn, flags=re.DOTALL).replace("Fira Code, monospace", "monospace")
    (ASSETS / "terminal.svg").write_text(drawn)


def draw_page(url: str) -> None:
    """Write page.png: a question in the search page of a service, beside BM25, in the Chromium of the system."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = chromium.new_page(viewport={"width": 1280, "height": 800})
        page.goto(f"{url}?{urlencode({'q': QUESTION, 'compare': 'bm25'})}")
        page.locator("#view[data-complete]").wait_for()
        page.screenshot(path=ASSETS / "page.png")
        chromium.close()


def main() -> None:
    """Draw the picture given on the command line."""
    match sys.argv[1:]:
        case ["chart"]:
            draw_chart()
        case ["terminal", run]:
            draw_terminal(run)
        case ["page", url]:
            draw_page(url)
        case _:
            sys.exit(__doc__)


if __name__ == "__main__":
    main()
