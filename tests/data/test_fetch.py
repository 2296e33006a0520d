"""A download is kept only if it is the makemore list to the byte; whatever a server does takes one line."""

from __future__ import annotations

import threading
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from bnfold.errors import InputError
from data import download, fetch, names, read_names
from data.__main__ import main

LIST = b"emma\nolivia\nava\nisabella\nsophia\ncharlotte"


class Handler(BaseHTTPRequestHandler):
    """One path for each way in which a server can behave."""

    served = LIST

    def do_GET(self):
        self.server.asked.append(self.path)
        getattr(self, self.path.strip("/"))()

    def reply(self, status, body=b"", **headers):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        self.wfile.write(body)

    def names(self):
        self.reply(200, self.served, Content_Length=len(self.served))

    def undeclared(self):
        self.reply(200, self.served)

    def moved(self):
        self.reply(302, Location="/names", Content_Length=0)

    def round(self):
        self.reply(302, Location="/round", Content_Length=0)

    def astray(self):
        self.reply(302, Location="file:///etc/hostname", Content_Length=0)

    def absent(self):
        self.reply(404, b"no", Content_Length=2)

    def broken(self):
        self.reply(500, Content_Length=0)

    def other(self):
        self.reply(200, b"anna\n" * 9, Content_Length=45)

    def truncated(self):
        self.reply(200, self.served[:20], Content_Length=len(self.served))

    def cut(self):
        self.reply(200, b"5\r\nemma\n\r\nff\r\nol", Transfer_Encoding="chunked")

    def endless(self):
        self.reply(200, bytes(fetch.MOST_BYTES + download.CHUNK))

    def nonsense(self):
        self.wfile.write(b"220 this is not HTTP\r\n\r\n")

    def silent(self):
        self.send_response(200)
        self.end_headers()
        self.server.over.wait(20)

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch):
    """The address of a server on this machine that notes what it was asked for."""
    monkeypatch.setenv("no_proxy", "*")
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.asked, server.over, server.address = (
            [],
            threading.Event(),
            f"http://127.0.0.1:{server.server_port}",
        )
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.over.set()
        server.shutdown()
        thread.join()


@pytest.fixture
def cached(tmp_path, monkeypatch):
    """Where the download goes, in a folder that does not exist yet; six names stand for the makemore list."""
    monkeypatch.setenv("BNFOLD_CACHE", str(tmp_path / "a" / "cache"))
    monkeypatch.setattr(names, "MAKEMORE_SHA256", sha256(LIST).hexdigest())
    return tmp_path / "a" / "cache" / "makemore-names.txt"


@pytest.mark.parametrize("path", ["names", "moved", "undeclared"])
def test_the_list_arrives_in_the_cache_and_is_read_from_there(server, cached, path, capsys):
    assert main(["fetch", "makemore", "--url", f"{server.address}/{path}"]) == 0
    output = capsys.readouterr()
    assert output.out == f"{cached} downloaded and checked; use it with --names makemore\n"
    assert "makemore names" in output.err
    assert cached.read_bytes() == LIST
    assert [file.name for file in cached.parent.iterdir()] == [cached.name]
    assert read_names("makemore") == LIST.decode().split()


def test_what_is_in_the_cache_already_is_not_asked_for_again(server, cached, capsys):
    for _ in range(2):
        assert main(["fetch", "makemore", "--url", f"{server.address}/names"]) == 0
    assert server.asked == ["/names"]
    assert "is there already" in capsys.readouterr().out


def test_a_damaged_copy_is_fetched_again(server, cached):
    cached.parent.mkdir(parents=True)
    cached.write_bytes(LIST[:-1])
    assert main(["fetch", "makemore", "--url", f"{server.address}/names"]) == 0
    assert cached.read_bytes() == LIST


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("absent", "/absent answered 404 Not Found; name another --url"),
        ("broken", "/broken answered 500 Internal Server Error"),
        ("round", "/round answered 302"),
        ("astray", "/astray answered 302"),
        ("other", "/other sent 45 bytes that are not the makemore list (its SHA-256 differs)"),
        ("truncated", f"/truncated broke off after 20 of {len(LIST)} bytes"),
        ("cut", "/cut cannot be downloaded (IncompleteRead"),
        ("endless", "/endless sends more than 4,194,304 bytes"),
        ("nonsense", "/nonsense cannot be downloaded (BadStatusLine"),
    ],
)
def test_whatever_a_server_does_is_one_line_and_leaves_what_was_there(server, cached, path, message, capsys):
    cached.parent.mkdir(parents=True)
    cached.write_bytes(b"an earlier file")
    assert main(["fetch", "makemore", "--url", f"{server.address}/{path}"]) == 2
    complaint = capsys.readouterr().err.splitlines()[-1]
    assert complaint.startswith(f"error: {server.address}{message}")
    assert cached.read_bytes() == b"an earlier file"
    assert [file.name for file in cached.parent.iterdir()] == [cached.name]


def test_a_server_that_falls_silent_is_given_up(server, cached, monkeypatch):
    monkeypatch.setattr(fetch, "TIMEOUT", 0.2)
    with pytest.raises(InputError, match=r"/silent was silent for 0 s; try again"):
        fetch.fetch_makemore(f"{server.address}/silent")
    assert not cached.exists()


def test_a_download_that_drags_on_is_given_up(server, cached, monkeypatch):
    monkeypatch.setattr(fetch, "LONGEST_WAIT", -1.0)
    with pytest.raises(InputError, match="/names took more than"):
        fetch.fetch_makemore(f"{server.address}/names")
    assert not cached.exists()


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("http://127.0.0.1:1/names", "cannot be reached"),
        ("http://name.invalid/names", "cannot be reached"),
        ("http://", "cannot be reached"),
        ("http://[::1", "cannot be downloaded"),
        ("http://127.0.0.1:port/", "cannot be downloaded"),
        ("http://" + "a" * 80 + ".invalid/", "cannot be"),
        ("http://127.0.0.1:1/a name", "cannot be downloaded"),
        ("file:///etc/hostname", "file:///etc/hostname is no http or https address"),
        ("names.txt", "names.txt is no http or https address"),
    ],
)
def test_an_address_that_leads_nowhere_is_named(url, message, cached, monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    with pytest.raises(InputError, match=message):
        fetch.fetch_makemore(url)
    assert not cached.exists()


def test_a_cache_that_cannot_be_made_is_one_line(server, cached, capsys):
    cached.parent.parent.write_bytes(b"a file where a folder should be")
    assert main(["fetch", "makemore", "--url", f"{server.address}/names"]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: ")


def test_the_lectures_own_list_passes_the_check(server, tmp_path, makemore, monkeypatch, run_module):
    monkeypatch.setattr(Handler, "served", makemore.read_bytes())
    command = ("data", "fetch", "makemore", "--url", f"{server.address}/names")
    assert run_module(*command, BNFOLD_CACHE=tmp_path / "cache").returncode == 0
    shown = run_module("data", "show", "--names", "makemore", BNFOLD_CACHE=tmp_path / "cache")
    assert "makemore: 32,033 names" in shown.stdout
    assert "182,625" in shown.stdout
