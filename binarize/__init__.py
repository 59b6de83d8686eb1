"""binarize (being written)."""
