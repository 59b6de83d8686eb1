"""The `binarize` command."""

from binarize.cli.app import app, main

__all__ = ["app", "main"]
