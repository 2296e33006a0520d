"""Serve a folder on this machine alone, with the types that a browser insists on."""

from __future__ import annotations

from contextlib import suppress
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from bnfold.errors import InputError

__all__ = ["open_server", "serve"]


class _Handler(SimpleHTTPRequestHandler):
    """Files as they are, asked for again every time; types do not depend on what the system has registered."""

    extensions_map = {  # noqa: RUF012  a table of the standard library's class
        "": "application/octet-stream",
        ".html": "text/html; charset=utf-8",
        ".css": "text/css; charset=utf-8",
        ".js": "text/javascript; charset=utf-8",
        ".mjs": "text/javascript; charset=utf-8",
        ".json": "application/json",
        ".wasm": "application/wasm",
    }

    def end_headers(self) -> None:
        self.send_header("Cache-Control", "no-cache")
        super().end_headers()

    def log_message(self, *_: Any) -> None:
        """Say nothing about each request."""


def open_server(folder: Path, port: int) -> ThreadingHTTPServer:
    """Return a server of a folder on 127.0.0.1, not yet serving; port 0 takes any that is free.

    Raises:
        InputError: the port is taken or may not be used.
    """
    try:
        return ThreadingHTTPServer(("127.0.0.1", port), partial(_Handler, directory=str(folder)))
    except OSError as error:
        raise InputError(f"port {port} cannot be used ({error.strerror}); --port names another") from error


def serve(folder: Path, port: int) -> None:
    """Serve a folder until Ctrl-C."""
    with open_server(folder, port) as server, suppress(KeyboardInterrupt):
        print(f"http://127.0.0.1:{server.server_port}/  (Ctrl-C ends it)", flush=True)
        server.serve_forever()
