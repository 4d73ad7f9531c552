"""The 13 collections of NanoBEIR, from Hugging Face datasets to folders in BEIR's layout.

The data set has the configurations corpus and queries (`_id`, `text`) and qrels (`query-id`, `corpus-id`: one document
or a list), each with a split for every collection.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from sparse_ingest.errors import CorpusError, SparseIngestError, UsageError, first_line, needs_extra
from sparse_ingest.storage.waiting import call_with_timeout

DATA_SET = "sentence-transformers/NanoBEIR-en"
# In the order of the model cards.
COLLECTIONS = (
    "ClimateFEVER", "DBPedia", "FEVER", "FiQA2018", "HotpotQA", "MSMARCO", "NFCorpus", "NQ", "QuoraRetrieval",
    "SCIDOCS", "ArguAna", "SciFact", "Touche2020",
)  # fmt: skip


def collections_named(names: tuple[str, ...]) -> list[str]:
    """Return the collections by name, in any case and with or without `Nano`; `all` are all 13. Raise UsageError."""
    known = {"all": COLLECTIONS, **{name.lower(): (name,) for name in COLLECTIONS}}
    chosen: dict[str, None] = {}
    for name in names:
        found = known.get(name.lower().removeprefix("nano"))
        if not found:
            raise UsageError(f"{name!r} is not a collection of NanoBEIR; expected all, {', '.join(COLLECTIONS)}.")
        chosen.update(dict.fromkeys(found))
    return list(chosen)


def write_nano_beir(name: str, folder: Path, data_set: str = DATA_SET) -> None:
    """Write one collection to a new folder.

    Raises:
        CorpusError: the data set cannot be read, or has another layout than NanoBEIR.
        MissingExtraError: the library datasets is not installed.
    """
    (folder / "qrels").mkdir(parents=True)
    for configuration in ("corpus", "queries"):
        with (folder / f"{configuration}.jsonl").open("w", encoding="utf-8") as file:
            for row in _rows(data_set, configuration, name, ("_id", "text")):
                # The evaluator of the model cards omits empty texts.
                if row["text"]:
                    file.write(json.dumps({"_id": row["_id"], "text": row["text"]}, ensure_ascii=False) + "\n")
    with (folder / "qrels" / "test.jsonl").open("w", encoding="utf-8") as file:
        for row in _rows(data_set, "qrels", name, ("query-id", "corpus-id")):
            documents = row["corpus-id"]
            for doc_id in documents if isinstance(documents, list) else [documents]:
                file.write(json.dumps({"query-id": row["query-id"], "corpus-id": doc_id, "score": 1}) + "\n")


def _rows(data_set: str, configuration: str, name: str, columns: tuple[str, ...]) -> Iterator[Mapping[str, Any]]:
    with needs_extra("encode", "NanoBEIR"):
        from datasets import load_dataset

    place = f"{data_set}, configuration {configuration}, split Nano{name}"
    try:
        rows = call_with_timeout(lambda: load_dataset(data_set, configuration, split=f"Nano{name}"), place)
    except SparseIngestError:
        raise
    except Exception as error:  # of any reader or connection of the library
        raise CorpusError(f"{place} cannot be read: {first_line(error)}. Check the name and the connection.") from error
    missing = [column for column in columns if column not in rows.column_names]
    if missing:
        raise CorpusError(f"{place} has no column {missing[0]!r}; its columns are {', '.join(rows.column_names)}.")
    yield from rows
