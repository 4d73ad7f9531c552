"""What a model folder is: where it lies, which family it belongs to, what its settings say. No torch."""
