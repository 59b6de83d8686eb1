"""Ablation studies: many runs of one recipe that differ in a few keys, compared in one table."""
