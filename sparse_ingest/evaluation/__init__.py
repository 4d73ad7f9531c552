"""Search and measures without a server: numpy only."""
