"""Compare an index with the run that was loaded into it."""
