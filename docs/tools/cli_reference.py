"""MkDocs hook: writes the page about the command line from the commands themselves, so that it cannot go stale."""

from __future__ import annotations

import os
import subprocess
import sys

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

PAGE = "reference/cli.md"


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Add the generated page to the pages that MkDocs found.

    Args:
        files: The pages and assets so far; changed in place.
        config: The configuration that the build runs with.

    Raises:
        PluginError: If typer cannot import ``binarize.cli`` or describe its commands; the message is typer's.
    """
    files.append(File.generated(config, PAGE, content=_describe()))
    return files


def _describe() -> str:
    typer = [sys.executable, "-m", "typer", "binarize.cli"]
    command = [*typer, "utils", "docs", "--name", "binarize", "--title", "Command line"]
    # Typer wraps and colours by the terminal it runs in; a page must not depend on that.
    environment = os.environ | {"COLUMNS": "120", "NO_COLOR": "1", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode != 0:
        raise PluginError(
            f"cannot describe the command line with {' '.join(command)}\n{done.stderr}"
            "If it is the import that failed, python -c 'import binarize.cli' says why."
        )
    return done.stdout
