"""The stages `load` and `publish`, which read a run folder and write into an index."""
