"""python -m export.page: a page that invents names in the browser, and shows the fold.

    python -m export.page ckpt.onnx [-o ckpt.page] [--checkpoint ckpt.pt] [--runtime FILE.tgz] [--serve] [--port 8000]

The folder holds all that the page needs. The first run downloads onnxruntime-web (33 MB) into the cache; later runs,
and the page itself, need no network. It is served on this machine alone, until Ctrl-C. A browser does not run it from a
file.

Exit code 0, or 2 with one line on stderr.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from bnfold.command import Parser
from bnfold.errors import InputError, run_command
from export.page import locate_page, write_page
from export.page.serve import serve


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the parsed command line."""
    parser = Parser(prog="python -m export.page", description="A page that invents names in the browser.")
    add = parser.add_argument
    add("model", type=Path, help="what python -m export wrote", metavar="ONNX")
    add("-o", "--output", type=Path, metavar="FOLDER", help="where to write (ckpt.page beside it)")
    add(
        "--checkpoint",
        type=Path,
        metavar="FILE",
        help="the net before the fold, to show the fold (ckpt.pt beside it)",
    )
    add("--runtime", type=Path, metavar="TGZ", help="onnxruntime-web as npm pack makes it (downloaded)")
    add("--serve", action="store_true", help="serve the page on this machine until Ctrl-C")
    add("--port", type=int, default=8000, metavar="N", help="on which port; 0 for any that is free (8000)")
    return parser.parse_args(arguments)


def run(options: argparse.Namespace) -> None:
    """Write the folder, say what is not in it, and serve it if that is wished."""
    if not 0 <= options.port < 2**16:
        raise InputError(f"--port {options.port}: it takes a number from 0 to 65535")
    folder = options.output or locate_page(options.model)
    missing = write_page(options.model, folder, options.checkpoint, options.runtime)
    if missing:
        print(f"the page does not show the fold: {missing}; --checkpoint names the one it was made from")
    print(f"wrote {folder}", flush=True)
    if options.serve:
        serve(folder, options.port)
    else:
        print(f"next: python -m http.server --bind 127.0.0.1 --directory {folder}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    return run_command(lambda: run(parse(arguments)))


if __name__ == "__main__":
    sys.exit(main())
