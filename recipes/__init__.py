"""Recipes (being written)."""
