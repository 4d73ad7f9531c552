"""The parts of the verb `encode`: what a shard holds, what is counted, duplicates, estimates and dry runs."""
