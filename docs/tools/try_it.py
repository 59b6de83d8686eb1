"""MkDocs hook: adds the page of `binarize web` to the site as "Try it", if `make web` has built it."""

from __future__ import annotations

from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

BUILT = Path(__file__).parents[2] / "binarize" / "web" / "page"

FRAME = """
<iframe src="../page/index.html" title="1-bit networks in the browser" loading="lazy"
style="width: 100%; height: 60rem; border: 1px solid var(--md-default-fg-color--lightest)"></iframe>

[Open it alone](page/index.html){ target=_blank }. Most web servers do not isolate pages from other sites, and a browser
then runs the network with one thread. `binarize web` serves the same page for all cores.
"""
ABSENT = """
This copy of the documentation was built without the page. [`binarize web`](howto/deploy.md#in-the-browser) serves it.
"""


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Add the page "Try it" and, if it is built, the folder that it shows.

    Args:
        files: The pages and assets; changed in place.
        config: The configuration of the build.
    """
    built = (BUILT / "enlarge.json").is_file()
    files.append(File.generated(config, "try.md", content=f"# Try it\n{FRAME if built else ABSENT}"))
    for path in sorted(BUILT.rglob("*")) if built else []:
        if path.is_file():
            name = path.relative_to(BUILT).as_posix()
            files.append(File.generated(config, f"page/{name}", abs_src_path=str(path)))
    return files
