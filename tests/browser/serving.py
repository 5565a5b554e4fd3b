"""The page's folder, as `export.py --to web` writes it, and its server."""

from __future__ import annotations

import contextlib
import functools
import http.server
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from scripts import call


def export_page(checkpoint: Path, folder: Path) -> Path:
    """Write the page of a checkpoint to a folder, and return it; skip the test for what is missing."""
    for package in ("playwright", "onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    runtime = os.environ.get("ONNXRUNTIME_WEB", "")
    if not Path(runtime).exists() or not runtime:
        pytest.skip("ONNXRUNTIME_WEB does not name the tarball that `npm pack onnxruntime-web@1.30.0` fetches")
    import export

    assert call(export, "--checkpoint", checkpoint, "--to", "web", "--output", folder, "--runtime", runtime) == 0
    return folder


@contextlib.contextmanager
def serving(folder: Path) -> Iterator[str]:
    """Serve a page as `python -m http.server` does, and yield its address."""
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    class Server(http.server.ThreadingHTTPServer):
        def handle_error(self, *_):  # the page breaks downloads off when one of them fails
            pass

    with Server(("127.0.0.1", 0), functools.partial(Quiet, directory=folder)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()
