"""Recipes that show one option of the training each, on the network of small_x2."""
