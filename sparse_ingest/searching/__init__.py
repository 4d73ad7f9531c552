"""Parts of `search`: hits and their snippets, the search of a run folder or an index."""
