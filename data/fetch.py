"""Download the lecture's own list of names into the cache.

The list belongs to <https://github.com/karpathy/makemore> and is not part of this project, so each user
fetches it. Whatever a server sends is accepted only if its SHA-256 is the one of the list the lecture's
figures were made with; until then an earlier download stays in place. A download may take `LONGEST_WAIT`
seconds and `MOST_BYTES` bytes, and may be silent for `TIMEOUT` seconds. `data.download` says the rest.
"""

from __future__ import annotations

from pathlib import Path

from bnfold.errors import InputError
from bnfold.output import replacing
from data.download import Order, download
from data.names import is_makemore, locate_makemore

__all__ = ["MAKEMORE_URL", "fetch_makemore"]

MAKEMORE_URL = "https://raw.githubusercontent.com/karpathy/makemore/master/names.txt"
TIMEOUT = 10.0
LONGEST_WAIT = 60.0
MOST_BYTES = 2**22


def fetch_makemore(url: str = MAKEMORE_URL) -> Path:
    """Download the list from `url`, check it and return the path it is at; a progress bar goes to stderr.

    Raises:
        InputError: not an http(s) address, no connection, an error from the server, a reply that is cut off,
            too slow, too large, or not the list.
    """
    what, instead = "the makemore list", "name another --url"
    content = download(url, Order("makemore names", what, instead, TIMEOUT, LONGEST_WAIT, MOST_BYTES))
    if not is_makemore(content):
        raise InputError(
            f"{url} sent {len(content):,} bytes that are not the makemore list (its SHA-256 differs)"
        )
    path = locate_makemore()
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        temporary.write_bytes(content)
    return path
