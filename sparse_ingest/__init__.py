"""sparse-ingest: text corpora to learned-sparse vectors to OpenSearch, losing nothing, proven to the last bit."""
