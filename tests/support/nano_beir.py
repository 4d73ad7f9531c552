"""A data set in the layout of sentence-transformers/NanoBEIR-en: Parquet files by configuration and split."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

# Collection -> documents, queries, and the relevant documents of each query.
CONTENT = {
    "NanoMSMARCO": (
        {
            "m1": "The Eiffel Tower is an iron tower in Paris, built for the fair of 1889.",
            "m2": "Bread rises because yeast makes gas from sugar.",
            "m3": "A river carries water from the mountains to the sea.",
            "m4": "Paris is the capital of France.",
            "m5": "",
        },
        {"q1": "who built a tower in paris", "q2": "why does bread rise", "q3": "capital of france"},
        {"q1": ["m1"], "q2": ["m2"], "q3": ["m4", "m1"]},
    ),
    "NanoNQ": (
        {
            "n1": "The heart pumps blood through the body.",
            "n2": "Whales are mammals that live in the sea and breathe air.",
            "n3": "A violin has four strings and is played with a bow.",
        },
        {"p1": "which animal of the sea breathes air", "p2": "how many strings does a violin have"},
        {"p1": ["n2"], "p2": ["n3"]},
    ),
}


def write_nano_beir_repository(folder: Path, *, lists: bool = True) -> Path:
    """Write the data set.

    With `lists`, the judgments of a query are one row with a list, otherwise one row each.
    """
    configurations = []
    for configuration in ("corpus", "queries", "qrels"):
        (folder / configuration).mkdir(parents=True)
        splits = []
        for split, (documents, queries, answers) in CONTENT.items():
            if configuration == "qrels":
                pairs = [
                    (query, answer) for query, found in answers.items() for answer in (found if not lists else [found])
                ]
                columns = {"query-id": [query for query, _ in pairs], "corpus-id": [answer for _, answer in pairs]}
            else:
                texts = documents if configuration == "corpus" else queries
                columns = {"_id": list(texts), "text": list(texts.values())}
            name = f"{configuration}/{split}-00000-of-00001.parquet"
            pq.write_table(pa.table(columns), folder / name)
            splits.append(f"  - split: {split}\n    path: {configuration}/{split}-*\n")
        configurations.append(f"- config_name: {configuration}\n  data_files:\n{''.join(splits)}")
    (folder / "README.md").write_text(f"---\nconfigs:\n{''.join(configurations)}---\n")
    return folder
