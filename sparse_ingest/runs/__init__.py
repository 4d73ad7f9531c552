"""The run folder: sparse vectors on disk, complete under their final names, with the identity that made them."""
