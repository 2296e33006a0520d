"""Fetch onnxruntime-web from the npm registry, one pinned version, whose bytes are known.

The package is downloaded once, into the cache of `data.names`, and held to its SHA-512 every time it is used: whatever
a registry, a mirror or a disk makes of it, only the package that was tried gets into a page. The registry is npm's own
unless the environment (`npm_config_registry`) or `~/.npmrc` names another; no npm is needed. Without a network,
`--runtime` takes the file that `npm pack` makes elsewhere.

Of the package's forty files a page needs two, which run on one thread: no header of cross-origin isolation has to be
sent. Not covered: registries that ask for a password.
"""

from __future__ import annotations

import os
import re
import tarfile
from base64 import b64encode
from hashlib import sha512
from io import BytesIO
from pathlib import Path

from bnfold.errors import InputError
from bnfold.output import replacing
from data.download import Order, download
from data.names import locate_cache

__all__ = ["PACKAGE", "RUNTIME", "VERSION", "fetch_runtime", "find_registry", "locate_package"]

PACKAGE, VERSION = "onnxruntime-web", "1.30.0"
INTEGRITY = "q0y+JrrtukXSzsBWEMccVfqX25LRmosXHF+CaRJmg8pZClzcV7svNc4rKY3jL02Vb7QmRMDs1SigqR4CXAfKYQ=="
RUNTIME = ("ort.wasm.bundle.min.mjs", "ort-wasm-simd-threaded.wasm")
REGISTRY = "https://registry.npmjs.org"

_ORDER = Order(
    title=f"{PACKAGE} {VERSION}",
    what=f"{PACKAGE} {VERSION}",
    instead=f"give --runtime the file that `npm pack {PACKAGE}@{VERSION}` makes",
    silence=30.0,
    longest=900.0,
    most=2**26,
)


def fetch_runtime(package: Path | None = None) -> dict[str, bytes]:
    """Return the files of the runtime by name, out of the package that is given, or in the cache, or downloaded.

    Raises:
        InputError: it cannot be had, or is not the package that is pinned here.
    """
    content = _read(package) if package else _cached() or _download()
    with tarfile.open(fileobj=BytesIO(content)) as archive:
        return {name: _member(archive, f"package/dist/{name}") for name in RUNTIME}


def locate_package() -> Path:
    """Return where the package lies once it was downloaded."""
    return locate_cache() / f"{PACKAGE}-{VERSION}.tgz"


def find_registry() -> str:
    """Return the address of the npm registry that the user has configured, or else npm's own."""
    named = next((value for key, value in os.environ.items() if key.lower() == "npm_config_registry"), None)
    settings = Path.home() / ".npmrc"
    if not named and settings.is_file():
        found = re.search(
            r"(?m)^\s*registry\s*=\s*(\S+)", settings.read_text(encoding="utf-8", errors="replace")
        )
        named = found and found[1].strip("\"'")
    return (named or REGISTRY).rstrip("/")


def _is_pinned(content: bytes) -> bool:
    return b64encode(sha512(content).digest()).decode() == INTEGRITY


def _read(package: Path) -> bytes:
    content = package.read_bytes()
    if not _is_pinned(content):
        raise InputError(
            f"{package} is not {PACKAGE} {VERSION} (its SHA-512 differs); make it with "
            f"`npm pack {PACKAGE}@{VERSION}`"
        )
    return content


def _cached() -> bytes | None:
    """The package that an earlier run has downloaded, if it is still what it was."""
    path = locate_package()
    content = path.read_bytes() if path.is_file() else b""
    return content if _is_pinned(content) else None


def _download() -> bytes:
    url = f"{find_registry()}/{PACKAGE}/-/{PACKAGE}-{VERSION}.tgz"
    content = download(url, _ORDER)
    if not _is_pinned(content):
        raise InputError(
            f"{url} sent {len(content):,} bytes that are not {PACKAGE} {VERSION} (their SHA-512 differs)"
        )
    locate_package().parent.mkdir(parents=True, exist_ok=True)
    with replacing(locate_package()) as temporary:
        temporary.write_bytes(content)
    return content


def _member(archive: tarfile.TarFile, name: str) -> bytes:
    member = archive.extractfile(name)
    assert member is not None, name
    return member.read()
