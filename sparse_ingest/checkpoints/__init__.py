"""Checkpoints: their location, their family and their settings. No torch."""
