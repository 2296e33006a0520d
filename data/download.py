"""Download one file within limits, with a progress bar on stderr; what was sent is the caller's to check.

Redirects are followed, and proxies and certificates are taken from the environment. A reply is held to its declared
length. A download that broke off is not resumed.
"""

from __future__ import annotations

from dataclasses import dataclass
from http.client import HTTPException, HTTPResponse
from time import monotonic
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from bnfold.errors import InputError

__all__ = ["CHUNK", "Order", "download"]

CHUNK = 2**14


@dataclass(frozen=True)
class Order:
    """What is downloaded, and how much of it is put up with.

    Attributes:
        title: stands beside the progress bar.
        what: the file as a sentence names it ("the makemore list").
        instead: what a user can do where it cannot be had ("name another --url").
        silence, longest: seconds without a byte, and altogether.
        most: bytes.
    """

    title: str
    what: str
    instead: str
    silence: float
    longest: float
    most: int


def download(url: str, order: Order) -> bytes:
    """Return what an address sends.

    Raises:
        InputError: not an http(s) address, no connection, an error from the server, or a reply that is cut off, too
            slow or too large.
    """
    if not url.startswith(("https://", "http://")):
        raise InputError(f"{url} is no http or https address")
    try:
        with urlopen(Request(url, headers={"User-Agent": "bnfold"}), timeout=order.silence) as reply:
            return _receive(reply, url, order)
    except InputError:
        raise
    except HTTPError as error:
        raise InputError(f"{url} answered {error.code} {error.reason}; {order.instead}") from None
    except URLError as error:
        raise InputError(
            f"{url} cannot be reached ({error.reason}); check the network or {order.instead}"
        ) from None
    except TimeoutError:
        raise InputError(
            f"{url} was silent for {order.silence:.0f} s; try again or {order.instead}"
        ) from None
    except (OSError, HTTPException, ValueError) as error:
        raise InputError(f"{url} cannot be downloaded ({error!r}); try again or {order.instead}") from None


def _receive(reply: HTTPResponse, url: str, order: Order) -> bytes:
    """Return the body of `reply`, held to its declared length and to the limits on size and time."""
    declared = reply.length
    content, deadline = bytearray(), monotonic() + order.longest
    with _progress() as progress:
        bar = progress.add_task(order.title, total=declared)
        while chunk := reply.read1(CHUNK):
            content += chunk
            progress.update(bar, completed=len(content))
            if len(content) > order.most:
                raise InputError(f"{url} sends more than {order.most:,} bytes, so it is not {order.what}")
            if monotonic() > deadline:
                raise InputError(f"{url} took more than {order.longest:.0f} s; try again or {order.instead}")
    if declared is not None and len(content) < declared:
        raise InputError(f"{url} broke off after {len(content):,} of {declared:,} bytes; try again")
    return bytes(content)


def _progress() -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    return Progress(*columns, console=Console(stderr=True))
