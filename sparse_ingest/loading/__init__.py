"""The parts of `load` and `verify`: they know the run folder and OpenSearch alike, so no room may know them."""
