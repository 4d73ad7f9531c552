"""The only package that talks to clusters: connections, indexes, mappings, bulk loads and search requests."""
