"""Evaluate a model on your own retrieval task with mteb, without a network.

    pip install "sparse-ingest[demo]" mteb
    python examples/mteb_task.py [MODEL]

`BakingRetrieval` is an mteb task with the documents, queries and relevance judgments below. `SparseSearch` implements
mteb's search protocol: it indexes a corpus and scores queries without dense vectors. It works with every plain text
retrieval task of mteb, such as `mteb.get_task("NFCorpus")`, which is downloaded.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import mteb
import numpy as np
from datasets import Dataset
from mteb.abstasks import AbsTaskRetrieval
from mteb.abstasks.task_metadata import TaskMetadata
from mteb.models import ModelMeta

import sparse_ingest as si

if TYPE_CHECKING:
    from mteb.types import CorpusDatasetType, QueryDatasetType, RetrievalOutputType

DOCUMENTS = {
    "rise": ("Why bread rises", "Yeast eats the sugar in the dough and gives off gas, which lifts the bread."),
    "sourdough": ("Sourdough", "A sourdough starter is flour and water in which wild yeast and bacteria live."),
    "crust": ("Crust", "Steam in the oven keeps the surface of a loaf soft until it has grown."),
    "salt": ("Salt", "Salt tightens the dough and slows the yeast down."),
    "rivers": ("Rivers", "A river carries stones and sand from the mountains to the sea."),
    "dams": ("Dams", "A dam holds back the water of a river to make electricity."),
    "birds": ("Birds", "Many birds fly south in autumn, because they find no food in winter."),
    "lamps": ("Lamps", "An electric lamp turns current into light."),
}
QUERIES = {
    "q1": "how does bread rise",
    "q2": "what lives in a sourdough starter",
    "q3": "electricity from rivers",
    "q4": "why do birds migrate",
}
# Relevance of a document for a query; unlisted documents are not relevant.
RELEVANCE = {"q1": {"rise": 2, "salt": 1}, "q2": {"sourdough": 2}, "q3": {"dams": 2, "rivers": 1}, "q4": {"birds": 2}}


class BakingRetrieval(AbsTaskRetrieval):
    """A retrieval task with inline data instead of a data set from a hub."""

    metadata = TaskMetadata(
        name="BakingRetrieval",
        description="Eight short documents, mostly about bread.",
        dataset={"path": "local/baking", "revision": "1"},
        type="Retrieval",
        category="t2t",
        modalities=["text"],
        eval_splits=["test"],
        eval_langs=["eng-Latn"],
        main_score="ndcg_at_10",
    )

    def load_data(self, num_proc: int | None = None, **kwargs: Any) -> None:
        """Build the corpus, the queries and the relevance judgments of the only split."""
        corpus = [{"id": doc_id, "title": title, "text": text} for doc_id, (title, text) in DOCUMENTS.items()]
        queries = [{"id": query_id, "text": text} for query_id, text in QUERIES.items()]
        split = {
            "corpus": Dataset.from_list(corpus),
            "queries": Dataset.from_list(queries),
            "relevant_docs": RELEVANCE,
            "top_ranked": None,
        }
        self.dataset = {"default": {"test": split}}
        self.data_loaded = True


class SparseSearch:
    """A `SparseEncoder` as mteb's `SearchProtocol`: encodes the corpus once and scores all of it for each query."""

    def __init__(self, model: str) -> None:
        self._encoder = si.SparseEncoder(model)
        name = model if "/" in model and ":" not in model else f"local/{model.rpartition('/')[2]}"
        self.mteb_model_meta = ModelMeta.create_empty(
            {"name": name, "revision": "local", "model_type": ["sparse"], "similarity_fn_name": "dot"}
        )
        self._doc_ids: list[str] = []
        self._documents: si.SparseVectors | None = None

    def index(self, corpus: CorpusDatasetType, **kwargs: Any) -> None:
        """Encode a corpus with the columns id, text and title."""
        titles = corpus["title"] if "title" in corpus.column_names else [""] * len(corpus)
        texts = [f"{title} {text}" if title else text for title, text in zip(titles, corpus["text"], strict=True)]
        self._doc_ids = list(corpus["id"])
        self._documents = self._encoder.encode_document(texts)

    def search(
        self, queries: QueryDatasetType, *, top_k: int, top_ranked: dict[str, list[str]] | None = None, **kwargs: Any
    ) -> RetrievalOutputType:
        """Return the `top_k` best documents of each query with scores, limited to `top_ranked` if given."""
        assert self._documents is not None, "call index() first"
        vectors = self._encoder.encode_query(queries["text"])
        results: RetrievalOutputType = {}
        for row, query_id in enumerate(queries["id"]):
            scores = self._encoder.similarity(vectors[row], self._documents)[0]
            best = np.argsort(-scores, kind="stable").tolist()
            if top_ranked is not None:
                allowed = set(top_ranked[query_id])
                best = [place for place in best if self._doc_ids[place] in allowed]
            results[query_id] = {self._doc_ids[place]: float(scores[place]) for place in best[:top_k]}
        return results


def main(model: str = "package:cognition/model") -> None:
    """Evaluate a model and print its nDCG@10."""
    result = mteb.evaluate(SparseSearch(model), BakingRetrieval(), cache=None, show_progress_bar=False)
    scores = result.task_results[0].scores["test"][0]
    print(f"nDCG@10 of {model}: {scores['ndcg_at_10']:.4f}")


if __name__ == "__main__":
    main(*sys.argv[1:2])
