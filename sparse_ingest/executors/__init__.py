"""Run an importable task in several processes, each with a device of its own. Knows no stage."""
