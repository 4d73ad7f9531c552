"""Parts of `serve`: the HTTP service of an index or a run, and its search page."""
