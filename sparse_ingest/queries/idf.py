"""`idf`: a corpus and a tokenizer in, the weight of each token out, for queries without a model.

The weight is Lucene's inverse document frequency, as in OpenSearch's tables: ln(1 + (N - n + 0.5) / (n + 0.5)) for a
token in n of N documents that have a token. (The largest weight of the `bert-uncased` analyzer, 15.5895386, is
this for n = 1 and the 8,841,823 passages of MS MARCO.) Special tokens and tokens of no document have weight 1.0, the
server's default. Texts are tokenized as queries. Duplicate ids are not detected.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from sparse_ingest.checkpoints.layouts import read_checkpoint
from sparse_ingest.checkpoints.sides import NO_WORDS
from sparse_ingest.corpora.options import CorpusOptions, IdfOptions
from sparse_ingest.corpora.sources import Corpus, bad_document
from sparse_ingest.errors import CorpusError, UsageError
from sparse_ingest.pipeline import ModelSettings, Pipeline, options_from, pipeline_of
from sparse_ingest.queries.weight_table import plain_tokenizer, read_vocabulary, to_float32
from sparse_ingest.records import in_batches
from sparse_ingest.reporting import Reporter, reporter_of
from sparse_ingest.storage.durable import write_atomic

UNSEEN_WEIGHT = 1.0
BATCH_TEXTS = 512
BATCH_CHARACTERS = 1 << 20
NAMED_BAD = 20  # bad documents that are printed


class IdfReport(NamedTuple):
    """The counts of `idf`: documents with a token, without one, and skipped; tokens in the table and in documents."""

    out: Path
    documents: int
    empty: int
    skipped: int
    vocabulary: int
    seen: int


def write_idf(
    corpus: object,
    out: Path | str,
    *,
    model: str | Path | ModelSettings | None = None,
    pipeline: Pipeline | str | Path | None = None,
    options: IdfOptions | None = None,
    progress: Reporter | bool = False,
    **settings: object,
) -> IdfReport:
    """Count a corpus and write the table atomically.

    Args:
        corpus: As for `encode`.
        out: The file to write, idf.json.
        model: The tokenizer of its document side is used.
        pipeline: May replace `model`.
        options: All options in one object, instead of single keywords.
        progress: True for a tqdm bar, or a `Reporter`; silent by default.
        **settings: Fields of `IdfOptions`.

    Raises:
        UsageError: no model, or the file exists.
        CorpusError: a bad document (unless these are skipped), or no document with a token.
    """
    chosen, reporter = options_from(IdfOptions, options, settings, "write_idf"), reporter_of(progress)
    named = pipeline_of(model, pipeline).model
    if not named.document:
        raise UsageError("No model: give --model or --pipeline.")
    out = Path(out)
    _refuse_out(out, chosen.force)
    checkpoint = read_checkpoint(named.document, named.revision)
    if not checkpoint.document.has_words:
        raise UsageError(f"{checkpoint.name} has no tokens to count. {NO_WORDS}")
    folder = checkpoint.transformer
    vocabulary = read_vocabulary(folder)
    tokenizer = plain_tokenizer(folder, lower_case=bool(named.lower_case))
    special = {token_id for token_id, token in tokenizer.get_added_tokens_decoder().items() if token.special}
    reporter.begin("documents")
    frequencies: Counter[int] = Counter()
    counts: Counter[str] = Counter()
    for batch in in_batches(_texts(chosen.open(corpus), chosen, counts, reporter), BATCH_TEXTS, BATCH_CHARACTERS):
        for encoding in tokenizer.encode_batch_fast(batch, add_special_tokens=False):
            token_ids = set(encoding.ids) - special
            frequencies.update(token_ids)
            counts["documents" if token_ids else "empty"] += 1
        reporter.advance(len(batch))
    documents, empty, skipped = (counts[name] for name in ("documents", "empty", "skipped"))
    if not documents:
        raise CorpusError(
            f"No document has a token ({empty} without one, {skipped} skipped). Check --corpus and --text-field."
        )
    table = {
        token: to_float32(weight_of(frequencies[token_id], documents)) if frequencies[token_id] else UNSEEN_WEIGHT
        for token_id, token in enumerate(vocabulary)
        if token is not None
    }
    _write(out, table, chosen.force)
    seen = sum(token is not None and frequencies[token_id] > 0 for token_id, token in enumerate(vocabulary))
    return IdfReport(out, documents, empty, skipped, len(table), seen)


def weight_of(frequency: int, documents: int) -> float:
    """Return the weight of a token that `frequency` of `documents` documents contain."""
    return math.log(1 + (documents - frequency + 0.5) / (frequency + 0.5))


def _texts(corpus: Corpus, options: CorpusOptions, counts: Counter[str], reporter: Reporter) -> Iterator[str]:
    """Yield the texts of a corpus. Bad documents are an error, or are counted as "skipped"."""
    for message in corpus.notes:
        reporter.note(message)
    for row, _ in islice(corpus.rows(), options.limit):
        if row.document is not None:
            yield row.document.text
        elif options.on_bad_document == "fail":
            raise bad_document(row)
        else:
            counts["skipped"] += 1
            if counts["skipped"] <= NAMED_BAD:
                reporter.note(f"Skipped: {row.place}: {row.reason}")
    for message in corpus.merged():
        reporter.warn(message)


def _refuse_out(out: Path, force: bool) -> None:
    if out.exists() and (not force or not out.is_file()):
        advice = "Give --force to replace it, or another --out." if out.is_file() else "Name a file with --out."
        raise UsageError(f"{out} already exists. {advice}")
    if not out.parent.is_dir():
        raise UsageError(f"The folder {out.parent} for {out.name} does not exist. Create it, or pass another --out.")


def _write(out: Path, table: dict[str, Any], force: bool) -> None:
    # ASCII: a server reads the file in the character set of its machine.
    content = json.dumps(table, indent=0).encode() + b"\n"
    write_atomic(out, content, exclusive=not force)
    if not force and out.read_bytes() != content:
        raise UsageError(f"{out} was written by another process and is kept. Give another --out, or --force.")
