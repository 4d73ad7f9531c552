"""The only room that knows OpenSearch: what an index keeps, how it is loaded and how it is asked."""
