"""Recipes that show one option of the training each, on a small network."""
