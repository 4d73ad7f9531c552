"""Helpers shared by several tests: checkpoints, runs, stores, proxies, servers and processes."""
