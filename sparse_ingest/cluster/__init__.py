"""The only package that knows OpenSearch: connections, indexes, mappings, bulk loads and search requests."""
