"""A page in headless Chromium that a test uses as a person does: it waits, types, presses keys and looks.

Chromium is spoken to in its DevTools protocol, over two pipes, in messages of JSON that end in a NUL.
"""

from __future__ import annotations

import base64
import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.browser import BROWSER, OPTIONS

_START = "import os, sys; r, w = map(int, sys.argv[1:3]); os.dup2(r, 100); os.dup2(w, 101)"
_START += "; os.dup2(100, 3); os.dup2(101, 4); os.execv(sys.argv[3], sys.argv[3:])"
"""Pipes have to be the files 3 and 4, whatever is open here."""

_PATIENCE = 60.0


class Tab:
    """One page. `complaints` is what its console and its log have said, `asked` every address that it asked for."""

    def __init__(self, inwards: int, outwards: int) -> None:
        self.complaints: list[str] = []
        self.asked: list[str] = []
        self._in, self._out, self._rest, self._sent = inwards, outwards, b"", 0
        self._session: dict[str, str] = {}
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        attached = self.send("Target.attachToTarget", targetId=target, flatten=True)
        self._session = {"sessionId": attached["sessionId"]}
        for domain in ("Runtime", "Log", "Page", "Network"):
            self.send(f"{domain}.enable")

    def send(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Return what Chromium answers to a command; what it tells meanwhile is noted."""
        self._sent += 1
        message = {"id": self._sent, "method": method, "params": parameters, **self._session}
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while True:
            told = self._receive()
            if told.get("id") == self._sent:
                assert "error" not in told, (method, told["error"])
                return told["result"]
            self._note(told)

    def open(self, url: str, width: int = 1100, scheme: str = "light") -> None:
        """Show a page, in a window so wide, to somebody who prefers a colour scheme."""
        phone = width < 600
        self.send(
            "Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=phone
        )
        preference = {"name": "prefers-color-scheme", "value": scheme}
        self.send("Emulation.setEmulatedMedia", features=[preference])
        self.send("Page.navigate", url=url)
        self.wait("document.readyState === 'complete'")

    def ask(self, expression: str) -> Any:
        """Return what an expression of JavaScript comes to, a promise what it is fulfilled with."""
        answer = self.send("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def wait(self, condition: str) -> None:
        """Wait until an expression holds."""
        deadline = time.monotonic() + _PATIENCE
        while not self.ask(f"Boolean({condition})"):
            assert time.monotonic() < deadline, (
                condition,
                self.complaints,
                self.ask("document.body?.innerText"),
            )
            time.sleep(0.02)

    def type(self, text: str) -> None:
        """Type into what has the focus."""
        for one in text:
            self.send("Input.insertText", text=one)

    def press(self, *keys: str) -> None:
        """Press keys by their names, one after the other (Tab, Enter, ArrowRight)."""
        codes = {"Tab": 9, "Enter": 13, "End": 35, "Home": 36, "ArrowLeft": 37, "ArrowRight": 39}
        for key in keys:
            event = {"key": key, "code": key, "windowsVirtualKeyCode": codes[key]}
            text = {"text": "\r"} if key == "Enter" else {}
            self.send("Input.dispatchKeyEvent", type="keyDown", **event, **text)
            self.send("Input.dispatchKeyEvent", type="keyUp", **event)

    def picture(self, path: Path) -> None:
        """Write a picture of all of the page, for people."""
        shot = self.send("Page.captureScreenshot", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(shot["data"]))

    def _receive(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            ready, _, _ = select.select([self._in], [], [], _PATIENCE)
            piece = os.read(self._in, 2**16) if ready else b""
            assert piece, "Chromium says nothing any more"
            self._rest += piece
        message, _, self._rest = self._rest.partition(b"\0")
        return json.loads(message)

    def _note(self, told: dict[str, Any]) -> None:
        method, details = told.get("method"), told.get("params", {})
        if method in ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded"):
            self.complaints.append(json.dumps(details))
        if method == "Network.requestWillBeSent":
            self.asked.append(details["request"]["url"])


@contextmanager
def browsing(profile: Path) -> Iterator[Tab]:
    """Yield a tab of a Chromium of its own, which ends with it."""
    (inwards, theirs_out), (theirs_in, outwards) = os.pipe(), os.pipe()
    command = [sys.executable, "-c", _START, str(theirs_in), str(theirs_out), str(BROWSER)]
    command += [*OPTIONS.split(), f"--user-data-dir={profile / 'profile'}", "--remote-debugging-pipe"]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(command, pass_fds=(theirs_in, theirs_out), **quiet) as process:
        os.close(theirs_in)
        os.close(theirs_out)
        try:
            tab = Tab(inwards, outwards)
            yield tab
            tab._session = {}
            tab.send("Browser.close")
        finally:
            os.close(outwards)
            os.close(inwards)
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
