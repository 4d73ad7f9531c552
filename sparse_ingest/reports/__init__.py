"""Reports: the figures of a run and of its loads, as one HTML file."""
