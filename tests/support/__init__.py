"""What several tests share: checkpoints, runs, stores, proxies, servers and processes."""
