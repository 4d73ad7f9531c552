"""English text from this machine: docstrings of the standard library and of installed packages.

SEISMIC needs vectors with concentrated weights, which random vectors lack. A passage is one paragraph of a docstring;
duplicates are dropped. Passages are in the order of file names, so two runs in one environment give the same bytes.
Every 50th docstring gives no passage: its first sentence is a query. Input: the environment only. Output: a corpus and
queries as JSON lines, and a line that lists the packages.
"""

from __future__ import annotations

import ast
import hashlib
import json
import re
import sysconfig
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

QUERY_EVERY = 50
MIN_WORDS, MAX_WORDS = 5, 200  # shorter ones are headings or signatures, longer ones tables


def make_corpus(folder: Path, passages: int, queries: int) -> str:
    """Write corpus.jsonl and queries.jsonl into `folder`; return a description of them."""
    seen: set[bytes] = set()
    packages: Counter[str] = Counter()
    asked = 0
    with (folder / "corpus.jsonl").open("w") as corpus, (folder / "queries.jsonl").open("w") as questions:
        for number, (package, place, text) in enumerate(docstrings()):
            if len(seen) == passages:
                break
            if number % QUERY_EVERY == 0:
                sentence = " ".join(text.partition("\n\n")[0].split()).partition(". ")[0]
                if asked < queries and 4 <= len(sentence.split()) <= 20:
                    questions.write(json.dumps({"_id": f"q{asked}", "text": sentence}) + "\n")
                    asked += 1
                continue
            for paragraph, part in enumerate(paragraphs(text)):
                digest = hashlib.sha256(part.encode()).digest()[:16]
                if digest in seen or len(seen) == passages:
                    continue
                seen.add(digest)
                packages[package] += 1
                corpus.write(json.dumps({"_id": f"{place}/{paragraph}", "text": part}) + "\n")
    most = ", ".join(f"{name} {count}" for name, count in packages.most_common(12))
    return f"{len(seen)} passages and {asked} queries from the docstrings of {len(packages)} packages ({most} and more)"


def docstrings() -> Iterator[tuple[str, str, str]]:
    """Yield package, position and text of every docstring, in the order of file names."""
    roots = sorted({sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), sysconfig.get_path("stdlib")})
    for root in map(Path, roots):
        for path in sorted(root.rglob("*.py")):
            relative = path.relative_to(root)
            if "site-packages" in relative.parts or "dist-packages" in relative.parts:
                continue
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    tree = ast.parse(path.read_bytes())
            except (SyntaxError, ValueError, RecursionError):
                continue  # a template or a parser test, not valid Python
            for node in ast.walk(tree):
                if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and (
                    text := ast.get_docstring(node)
                ):
                    yield relative.parts[0].removesuffix(".py"), f"{relative}:{getattr(node, 'lineno', 0)}", text


def paragraphs(text: str) -> Iterator[str]:
    """Yield the paragraphs of prose, each on one line."""
    for paragraph in re.split(r"\n\s*\n", text):
        words = paragraph.split()
        letters = sum(word.strip(".,:;()`'\"*").isalpha() for word in words)
        # Skip doctests, tables and rulers.
        if MIN_WORDS <= len(words) <= MAX_WORDS and letters * 2 >= len(words) and ">>>" not in paragraph:
            yield " ".join(words)
