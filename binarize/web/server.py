"""A server of the page on this machine alone."""

from __future__ import annotations

import errno
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from binarize.errors import BinarizeError

PAGE = Path(__file__).parent / "page"
"""The built page; absent in a clone until ``make web``."""

_HEADERS = {
    # Browsers share memory between the threads of a page only if it is isolated from other sites.
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Embedder-Policy": "require-corp",
    "Cross-Origin-Resource-Policy": "same-origin",
    # Nothing may be sent elsewhere, by the worker neither.
    "Content-Security-Policy": "default-src 'none'; script-src 'self' 'wasm-unsafe-eval'; worker-src 'self'; "
    "connect-src 'self'; img-src 'self' blob: data:; style-src 'self' 'unsafe-inline'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-store",  # another model may be served at the same address later
}


class _Handler(SimpleHTTPRequestHandler):
    """Serves the page, and what ``models`` holds instead of the page's own."""

    extensions_map = {  # the system's table may map .js to text/plain, which browsers refuse
        **SimpleHTTPRequestHandler.extensions_map,
        ".js": "text/javascript",
        ".mjs": "text/javascript",
        ".wasm": "application/wasm",
        ".onnx": "application/octet-stream",
    }

    def __init__(self, *args: Any, models: Path, **kwargs: Any) -> None:
        self._models = models
        super().__init__(*args, **kwargs)

    def translate_path(self, path: str) -> str:
        page = self.directory
        self.directory = str(self._models)
        own = super().translate_path(path)
        self.directory = page
        return own if Path(own).is_file() else super().translate_path(path)

    def list_directory(self, path: Any) -> None:
        self.send_error(404)

    def end_headers(self) -> None:
        for name, value in _HEADERS.items():
            self.send_header(name, value)
        super().end_headers()

    def log_message(self, *_: Any) -> None:
        """Log nothing."""


def check_page() -> None:
    """Raise BinarizeError if the page is not built."""
    if not (PAGE / "index.html").is_file():
        raise BinarizeError("web: this installation has no page; in a clone, build it with `make web` (needs Node).")


def page_server(port: int = 0, models: Path | None = None) -> ThreadingHTTPServer:
    """Return a server of the page on 127.0.0.1, which listens; its address is ``server_address``.

    Args:
        port: 0 for a free one.
        models: A folder of `write_models`, whose files replace the page's own.

    Raises:
        BinarizeError: If the page is not built, or the port is not free.
    """
    check_page()
    handler = partial(_Handler, directory=str(PAGE), models=PAGE if models is None else models)
    try:
        return ThreadingHTTPServer(("127.0.0.1", port), handler)
    except OSError as error:
        if error.errno not in (errno.EADDRINUSE, errno.EACCES):
            raise
        raise BinarizeError(
            f"web: the port {port} cannot be used ({error.strerror}); give another --port, or 0 for a free one."
        ) from error
