"""Recipes that generate images: full-precision networks, and their 1-bit forms."""
