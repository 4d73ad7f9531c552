"""A local OpenSearch as a child process on loopback: no Docker, no system Java."""
