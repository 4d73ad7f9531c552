"""The command `encode`: shards, counts, duplicate ids, estimates and dry runs."""
