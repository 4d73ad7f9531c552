"""BM25 over English texts by the library bm25s, the baseline for a run folder. An index has its own BM25.

Settings are as in Anserini: the Lucene variant, k1 0.9, b 0.4, English stop words and stemmer. The tokens of all
texts are kept in memory.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import partial

from sparse_ingest.errors import needs_extra
from sparse_ingest.records import Query, batched

K1, B = 0.9, 0.4
_BLOCK = 1000  # queries scored together


def rank_texts(
    documents: Iterable[tuple[str, str]], queries: Sequence[Query], size: int
) -> Iterator[tuple[str, list[str], list[float]]]:
    """Search documents (id, text) with BM25; yield query id, document ids and scores, best first.

    Raise `MissingExtraError` if the library or its stemmer is not installed.
    """
    with needs_extra("evaluate", "BM25 over a run folder"):
        import bm25s
        import Stemmer

    tokens = partial(bm25s.tokenize, stopwords="en", stemmer=Stemmer.Stemmer("english"), show_progress=False)
    pairs = list(documents)
    doc_ids = [doc_id for doc_id, _ in pairs]
    index = bm25s.BM25(method="lucene", k1=K1, b=B)
    index.index(tokens([text for _, text in pairs]), show_progress=False)
    del pairs
    for block in batched(queries, _BLOCK):
        asked = tokens([query.text for query in block])
        places, scores = index.retrieve(asked, k=min(size, len(doc_ids)), show_progress=False)
        for query, found, values in zip(block, places.tolist(), scores.tolist(), strict=True):
            # The library pads with documents that share no word.
            hits = [(doc_ids[place], score) for place, score in zip(found, values, strict=True) if score > 0]
            yield query.id, [doc_id for doc_id, _ in hits], [score for _, score in hits]
