"""The run folder: sparse vectors on disk, and the settings that they were encoded with."""
