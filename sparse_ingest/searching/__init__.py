"""Parts of the verb `search`: hits and their snippets, the search of a run folder."""
