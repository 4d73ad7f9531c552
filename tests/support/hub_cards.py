"""Figures and texts printed on model cards, and the same measured with this package.

The hub tests compare the two. They need a model hub and were not run during development, which had none: this code ran
only on local copies of the models (test_on_twins.py). The card of efficient-splade-VI-BT-large has no example.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from sparse_ingest.checkpoints.layouts import read_checkpoint
from sparse_ingest.checkpoints.settings import resolve_pipeline
from sparse_ingest.pipeline import Pipeline, read_pipeline
from sparse_ingest.queries.weight_table import QueryWeights

DIMENSIONS = 30522
BATCH = 256  # texts per batch


class Example(NamedTuple):
    """Queries, documents and similarities (one row per query) of a usage example; None: the card prints only shapes."""

    pipeline: str
    queries: list[str]
    documents: list[str]
    similarities: list[list[float]] | None


class ActiveDimensions(NamedTuple):
    """Average terms of a query and of a document over a NanoBEIR collection, counted as on the card."""

    pipeline: str
    collection: str
    queries: float
    documents: float


class Measured(NamedTuple):
    """The vocabulary size, a vector for each text, and their dot products."""

    dimensions: int
    queries: list[QueryWeights]
    documents: list[QueryWeights]

    @property
    def similarities(self) -> list[list[float]]:
        """Return the dot product of each query with each document, matching tokens by string."""
        return [
            [sum(weight * document.get(token, 0.0) for token, weight in query.items()) for document in self.documents]
            for query in self.queries
        ]


EXAMPLES = (
    Example(
        "splade-distilbert-mrl",
        ["meaning of the name bernard"],
        [
            "English Meaning: The name Bernard is an English baby name. In English the meaning of the name "
            "Bernard is: Strong as a bear. See also Bjorn. American Meaning: The name Bernard is an "
            "American baby name. In American the meaning of the name Bernard is: Strong as a bear.",
            "To the Citizens of St. Bernard We chose as our motto a simple but profound declaration: "
            "â\x80\x9cWelcome to your office.â\x80\x9d Those words remind us that we are no more "
            "than the caretakers of the office of Clerk of Court for the Parish of St. Bernard.",
            "Get Your Prior Years Tax Information from the IRS. IRS Tax Tip 2012-18, January 27, 2012. "
            "Sometimes taxpayers need a copy of an old tax return, but can't find or don't have their own "
            "records. There are three easy and convenient options for getting tax return transcripts and "
            "tax account transcripts from the IRS: on the web, by phone or by mail.",
        ],
        [[18.6221, 10.0646, 0.0000]],
    ),
    Example(
        "splade-mini",
        ["definition of fermentation in the lab"],
        [
            "Fermentation is a metabolic pathway that produce ATP molecules under anaerobic conditions "
            "(only undergoes glycolysis), NAD+ is used directly in glycolysis to form ATP molecules, which "
            "is not as efficient as cellular respiration because only 2ATP molecules are formed during the "
            "glycolysis.",
            "Essay on Yeast Fermentation ... Yeast Fermentation Lab Report The purpose of this experiment "
            "was to observe the process in which cells must partake in a respiration process called "
            "anaerobic fermentation and as the name suggests, oxygen is not required.",
            "\ufeffYeast Fermentation Lab Report The purpose of this experiment was to observe the process "
            "in which cells must partake in a respiration process called anaerobic fermentation and as the "
            "name suggests, oxygen is not required.",
        ],
        [[20.0220, 17.1372, 15.9159]],
    ),
    Example(
        "opensearch-doc-v3-gte-limit",
        ["Which planet is known as the Red Planet?"],
        [
            "Venus is often called Earth's twin because of its similar size and proximity.",
            "Mars, known for its reddish appearance, is often referred to as the Red Planet.",
            "Saturn, famous for its rings, is sometimes mistaken for the Red Planet.",
        ],
        [[6.8167, 15.0012, 13.5434]],
    ),
    Example(
        "inference-free-distilbert-nq",
        ["is send in the clowns from a musical"],
        [
            'Send In the Clowns "Send In the Clowns" is a song written by Stephen Sondheim for the 1973 '
            "musical A Little Night Music, an adaptation of Ingmar Bergman's film Smiles of a Summer "
            "Night. It is a ballad from Act Two, in which the character Desirée reflects on the ironies "
            "and disappointments of her life. Among other things, she looks back on an affair years "
            "earlier with the lawyer Fredrik, who was deeply in love with her but whose marriage proposals "
            "she had rejected. Meeting him after so long, she realizes she is in love with him and finally "
            "ready to marry him, but now it is he who rejects her: he is in an unconsummated marriage with "
            "a much younger woman. Desirée proposes marriage to rescue him from this situation, but he "
            "declines, citing his dedication to his bride. Reacting to his rejection, Desirée sings "
            "this song. The song is later reprised as a coda after Fredrik's young wife runs away with his "
            "son, and Fredrik is finally free to accept Desirée's offer.[1]",
            "query",
        ],
        None,
    ),
)
# Collections used by the cards and available on the hub; that of splade-mini is not published.
ACTIVE_DIMENSIONS = (
    ActiveDimensions("splade-distilbert-mrl", "NanoMSMARCO", 20.5, 81.8767),
    ActiveDimensions("splade-distilbert-mrl", "NanoNFCorpus", 18.3, 156.0484),
    ActiveDimensions("splade-distilbert-mrl", "NanoNQ", 22.2, 103.7253),
    ActiveDimensions("inference-free-distilbert-nq", "NanoMSMARCO", 7.22, 168.1093),
    ActiveDimensions("inference-free-distilbert-nq", "NanoNFCorpus", 5.66, 200.1534),
    ActiveDimensions("inference-free-distilbert-nq", "NanoNQ", 10.32, 192.0973),
)


def measure(pipeline: Pipeline, queries: list[str], documents: list[str]) -> Measured:
    """Encode queries and documents with a pipeline, in float32 on the CPU."""
    from sparse_ingest.models.query_encoders import query_encoder

    encoder = _document_encoder(pipeline)
    return Measured(
        len(encoder.vocabulary), query_encoder(pipeline.model).encode(queries), list(_by_token(encoder, documents))
    )


def measure_active_dimensions(name: str, collection: str) -> tuple[float, float]:
    """Return the average terms of a query and of a document of a packaged pipeline over a NanoBEIR collection."""
    from sparse_ingest.models.query_encoders import query_encoder

    pipeline = read_pipeline(name)
    encoder, queries = _document_encoder(pipeline), _texts(collection, "queries")
    counts = [len(document) for document in _by_token(encoder, _texts(collection, "corpus"))]
    weights = query_encoder(pipeline.model).encode(queries)
    return sum(map(len, weights)) / len(weights), sum(counts) / len(counts)


def _document_encoder(pipeline: Pipeline) -> Any:
    from sparse_ingest.models.documents import DocumentEncoder

    assert pipeline.model.document
    checkpoint = read_checkpoint(pipeline.model.document, pipeline.model.revision)
    resolved = resolve_pipeline(pipeline, checkpoint)
    return DocumentEncoder(checkpoint, resolved.model, device="cpu", dtype="float32")


def _by_token(encoder: Any, texts: list[str]) -> Iterator[QueryWeights]:
    for start in range(0, len(texts), BATCH):
        vectors = encoder.encode(texts[start : start + BATCH]).vectors
        for place in range(len(vectors.doc_ids)):
            ids, weights = (array.tolist() for array in vectors.row(place))
            yield {encoder.vocabulary[token_id]: weight for token_id, weight in zip(ids, weights, strict=True)}


def _texts(collection: str, subset: str) -> list[str]:
    """Return non-empty texts of a collection, as the evaluator of sentence-transformers reads them."""
    from datasets import load_dataset

    rows = load_dataset("sentence-transformers/NanoBEIR-en", subset, split=collection)
    return [row["text"] for row in rows if row["text"]]
