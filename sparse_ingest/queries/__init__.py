"""Query text to query weights without torch."""
