"""Recipes that show one option of the training each, on the small network of the demonstration."""
