"""The only package that talks to OpenSearch: connections, indexes, mappings, bulk loads and search requests."""
