"""Download the lecture's own list of names into the cache.

The list belongs to <https://github.com/karpathy/makemore> and is not part of this project, so each user
fetches it. Whatever a server sends is accepted only if its SHA-256 is the one of the list the lecture's
figures were made with; until then an earlier download stays in place. A download may take `LONGEST_WAIT`
seconds and `MOST_BYTES` bytes, and may be silent for `TIMEOUT` seconds. Redirects are followed and proxies
are taken from the environment; a download that broke off is not resumed.
"""

from __future__ import annotations

from http.client import HTTPException, HTTPResponse
from pathlib import Path
from time import monotonic
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from bnfold.errors import InputError
from bnfold.output import replacing
from data.names import is_makemore, locate_makemore

__all__ = ["MAKEMORE_URL", "fetch_makemore"]

MAKEMORE_URL = "https://raw.githubusercontent.com/karpathy/makemore/master/names.txt"
TIMEOUT = 10.0
LONGEST_WAIT = 60.0
MOST_BYTES = 2**22
CHUNK = 2**14


def fetch_makemore(url: str = MAKEMORE_URL) -> Path:
    """Download the list from `url`, check it and return the path it is at; a progress bar goes to stderr.

    Raises:
        InputError: not an http(s) address, no connection, an error from the server, a reply that is cut off,
            too slow, too large, or not the list.
    """
    if not url.startswith(("https://", "http://")):
        raise InputError(f"{url} is no http or https address")
    content = _download(url)
    if not is_makemore(content):
        raise InputError(
            f"{url} sent {len(content):,} bytes that are not the makemore list (its SHA-256 differs)"
        )
    path = locate_makemore()
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        temporary.write_bytes(content)
    return path


def _download(url: str) -> bytes:
    try:
        with urlopen(Request(url, headers={"User-Agent": "bnfold"}), timeout=TIMEOUT) as reply:
            return _receive(reply, url)
    except InputError:
        raise
    except HTTPError as error:
        raise InputError(f"{url} answered {error.code} {error.reason}; --url names another address") from None
    except URLError as error:
        raise InputError(
            f"{url} cannot be reached ({error.reason}); check the network or name another --url"
        ) from None
    except TimeoutError:
        raise InputError(f"{url} was silent for {TIMEOUT:.0f} s; try again or name another --url") from None
    except (OSError, HTTPException, ValueError) as error:
        raise InputError(f"{url} cannot be downloaded ({error!r}); try again or name another --url") from None


def _receive(reply: HTTPResponse, url: str) -> bytes:
    """Return the body of `reply`, held to its declared length and to the limits on size and time."""
    declared = reply.length
    content, deadline = bytearray(), monotonic() + LONGEST_WAIT
    with _progress() as progress:
        bar = progress.add_task("makemore names", total=declared)
        while chunk := reply.read1(CHUNK):
            content += chunk
            progress.update(bar, completed=len(content))
            if len(content) > MOST_BYTES:
                raise InputError(
                    f"{url} sends more than {MOST_BYTES:,} bytes, so it is not the makemore list"
                )
            if monotonic() > deadline:
                raise InputError(
                    f"{url} took more than {LONGEST_WAIT:.0f} s; try again or name another --url"
                )
    if declared is not None and len(content) < declared:
        raise InputError(f"{url} broke off after {len(content):,} of {declared:,} bytes; try again")
    return bytes(content)


def _progress() -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    return Progress(*columns, console=Console(stderr=True))
