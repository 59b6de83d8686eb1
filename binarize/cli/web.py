"""`binarize web`: enlarge and draw images in the browser."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from binarize.cli.options import MODEL, RevisionOption, ScaleOption
from binarize.cli.streams import echo

_PORT, _MAX_PORT = 8471, 65535
_PORT_HELP = "The port of 127.0.0.1; 0: a free one."
_BROWSER = "Open the page in the browser."


def web(
    model: Annotated[Path | None, typer.Option("--model", "-m", show_default=False, help=MODEL)] = None,
    revision: RevisionOption = None,
    scale: ScaleOption = None,
    port: Annotated[int, typer.Option(min=0, max=_MAX_PORT, help=_PORT_HELP)] = _PORT,
    browser: Annotated[bool, typer.Option("--browser/--no-browser", help=_BROWSER)] = True,
) -> None:
    """Serve a page that upscales or draws images in the browser.

    The network runs in the browser, on its GPU or the CPU. Images do not leave it. The page is served on 127.0.0.1, to
    this machine alone, until Ctrl-C. A model of your own must be binary, and its sampler DDIM.

    ```
    binarize web
    binarize web --model my-model --port 9000 --no-browser
    ```
    """
    if model is None and (revision is not None or scale is not None):
        raise typer.BadParameter("--revision and --scale need --model.")

    import tempfile
    import webbrowser

    from binarize.models.location import at_revision, draws_images, scale_of
    from binarize.web.server import page_server

    source = None if model is None else at_revision(model, revision)
    draws = source is not None and draws_images(source, scale)
    if source is not None:
        if not draws:
            scale_of(source, scale)
        # Imported before the temporary folder exists: Ctrl-C during an import ends the program without cleaning up.
        from binarize.models.loading import load_generator, load_pipeline
        from binarize.web.models import write_models

    with tempfile.TemporaryDirectory(prefix="binarize-") as folder, page_server(port, Path(folder)) as server:
        if source is not None:
            own = load_generator(source) if draws else load_pipeline(source, scale=scale)
            write_models(Path(folder), {source.name: own})
        address = f"http://127.0.0.1:{server.server_address[1]}/{'?draw' if draws else ''}"
        echo(f"{address} (Ctrl-C stops it)")
        if browser:
            webbrowser.open(address)
        server.serve_forever()
