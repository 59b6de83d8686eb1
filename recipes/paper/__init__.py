"""Recipes that reproduce the published rows of BI-DiffSR's tables, one file a row."""
