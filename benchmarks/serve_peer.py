"""The service that benchmarks/serve.py compares with: FastAPI, sentence-transformers and opensearch-py, one process.

As the three projects' own examples are written: a plain function per request, which FastAPI calls in its threads.
"""

from __future__ import annotations

import argparse
from typing import Any

import uvicorn
from fastapi import FastAPI
from opensearchpy import OpenSearch
from sentence_transformers import SparseEncoder
from sentence_transformers.base.modules import Transformer
from sentence_transformers.sparse_encoder.modules import SparseStaticEmbedding, SpladePooling
from transformers import AutoTokenizer


def main() -> None:
    """Serve until a signal."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--url", required=True)
    parser.add_argument("--index", required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--idf")
    parser.add_argument("--port", type=int, required=True)
    given = parser.parse_args()
    if given.idf:
        tokenizer = AutoTokenizer.from_pretrained(given.model)
        modules: list[Any] = [SparseStaticEmbedding.from_json(given.idf, tokenizer=tokenizer)]
    else:
        modules = [Transformer(given.model, transformer_task="fill-mask"), SpladePooling("max")]
    encoder = SparseEncoder(modules=modules, device="cpu")
    client, app = OpenSearch(given.url, pool_maxsize=40), FastAPI()

    def search(q: str, k: int = 10) -> dict[str, Any]:
        tokens = dict(encoder.decode(encoder.encode_query(q)))
        clause = {"neural_sparse": {"sparse": {"query_tokens": tokens}}}
        answer = client.search(
            index=given.index, body={"size": k, "query": clause, "_source": {"excludes": ["sparse"]}}
        )
        found = answer["hits"]["hits"]
        return {"hits": [{"id": hit["_id"], "score": hit["_score"], "fields": hit["_source"]} for hit in found]}

    def health() -> dict[str, str]:
        return {"status": "ok"}

    # Not as decorators: `make check` types this file, and does not install FastAPI.
    app.add_api_route("/search", search)
    app.add_api_route("/healthz", health)

    encoder.encode_query("warm")
    uvicorn.run(app, port=given.port, log_level="warning")


if __name__ == "__main__":
    main()
