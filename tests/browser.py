"""A headless Chromium, spoken to over its debugging pipe: no driver, no port, no network."""

import base64
import json
import os
import select
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

PROGRAM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
# The browser reads descriptor 3 and writes 4; Popen cannot give descriptors chosen numbers.
_START = (
    "import os, sys; os.dup2(int(sys.argv[1]), 3); os.dup2(int(sys.argv[2]), 4); os.execv(sys.argv[3], sys.argv[3:])"
)
_FLAGS = (
    "--headless=new --no-sandbox --disable-gpu --disable-dev-shm-usage --no-first-run --disable-extensions "
    "--disable-background-networking --disable-component-update --disable-sync --remote-debugging-pipe"
)
_PATIENCE = 60.0  # seconds; a busy machine is slow
# What the browser itself acts on.
_CODES = {
    "Escape": 27,
    "ArrowUp": 38,
    "ArrowDown": 40,
    "ArrowLeft": 37,
    "ArrowRight": 39,
    "Enter": 13,
    " ": 32,
    "Tab": 9,
}
_TEXTS = {"Enter": "\r"}
ALT, CONTROL, META, SHIFT = (1, 2, 4, 8)


class Browser:
    """One tab. `messages` are console errors, uncaught exceptions and violations of the page's own policy;
    `requests` the addresses that it asked for."""

    def __init__(self, profile: Path):
        assert PROGRAM is not None
        theirs_in, self._out = _high(os.pipe())
        self._in, theirs_out = _high(os.pipe())
        command = [sys.executable, "-c", _START, str(theirs_in), str(theirs_out), PROGRAM, *_FLAGS.split()]
        self._process = subprocess.Popen(
            [*command, f"--user-data-dir={profile}", "about:blank"],
            pass_fds=(theirs_in, theirs_out),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "HOME": str(profile)},
        )
        os.close(theirs_in)
        os.close(theirs_out)
        self.messages: list[str] = []
        self.requests: list[str] = []
        self._buffer, self._sent, self._session = b"", 0, ""
        self.open_tab()

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._in)
        os.close(self._out)

    def open_tab(self) -> str:
        """Open a tab and turn to it; returns the session to turn to later."""
        self._session = ""
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.send(f"{domain}.enable")
        return self._session

    def turn_to(self, session: str) -> None:
        """Send what follows to another tab."""
        self._session = session

    @property
    def session(self) -> str:
        """The tab in use."""
        return self._session

    def save_downloads(self, folder: Path) -> None:
        """Save downloads in a folder."""
        session, self._session = self._session, ""
        self.send("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(folder))
        self._session = session

    def click(self, selector: str, modifiers: int = 0, count: int = 1) -> None:
        """Click with the mouse on the middle of an element."""
        place = self.run(
            f"(() => {{ const e = document.querySelector({json.dumps(selector)});"
            "e.scrollIntoView({block: 'center'}); const r = e.getBoundingClientRect();"
            "return [r.x + r.width / 2, r.y + r.height / 2]; })()"
        )
        for number in range(1, count + 1):
            for kind in ("mousePressed", "mouseReleased"):
                at = {"x": place[0], "y": place[1], "button": "left", "clickCount": number, "modifiers": modifiers}
                self.send("Input.dispatchMouseEvent", type=kind, **at)

    def send(self, method: str, **params: Any) -> dict[str, Any]:
        """One command, and its result."""
        self._sent += 1
        message: dict[str, Any] = {"id": self._sent, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while (answer := self._next()).get("id") != self._sent:
            self._note(answer)
        assert "error" not in answer, f"{method}: {answer['error']}"
        return answer["result"]

    def open(self, path: Path | str, fragment: str = "") -> None:
        """Load a report, from a file or an address, afresh and wait until its first groups are drawn."""
        self.send("Page.navigate", url="about:blank")
        self.messages.clear()
        self.requests.clear()
        address = path if isinstance(path, str) else path.as_uri()
        self.send("Page.navigate", url=address + fragment)
        self.wait("document.documentElement?.dataset.ready && document.readyState === 'complete'")

    def run(self, script: str) -> Any:
        """The value of an expression."""
        answer = self.send("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def wait(self, script: str) -> None:
        """Wait until an expression is true."""
        end = time.monotonic() + _PATIENCE
        while not self.run(script):
            assert time.monotonic() < end, f"never true: {script}"
            time.sleep(0.02)

    def press(self, *keys: str, modifiers: int = 0) -> None:
        """Keys by name (`Escape`, `ArrowDown`) or by the character that they write."""
        for key in keys:
            text = _TEXTS.get(key, key if len(key) == 1 and modifiers in (0, SHIFT) else "")
            code = _CODES.get(key, 0)
            down = {"key": key, "text": text, "windowsVirtualKeyCode": code, "modifiers": modifiers}
            self.send("Input.dispatchKeyEvent", type="keyDown", **down)
            self.send("Input.dispatchKeyEvent", type="keyUp", key=key, modifiers=modifiers)

    def prefer(self, scheme: str) -> None:
        """What prefers-color-scheme says: light or dark."""
        self.send("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])

    def screenshot(self, path: Path, width: int = 1280, height: int = 1600) -> None:
        """A PNG of the page in a window of that size."""
        self.send("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        path.write_bytes(base64.b64decode(self.send("Page.captureScreenshot", format="png")["data"]))

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            assert select.select([self._in], [], [], _PATIENCE)[0], "the browser says nothing"
            data = os.read(self._in, 1 << 20)
            assert data, "the browser has gone"
            self._buffer += data
        message, _, self._buffer = self._buffer.partition(b"\0")
        return json.loads(message)

    def _note(self, event: dict[str, Any]) -> None:
        method, params = event.get("method"), event.get("params", {})
        if method == "Log.entryAdded":
            self.messages.append(params["entry"]["text"])
        elif method == "Runtime.exceptionThrown":
            self.messages.append(str(params["exceptionDetails"]))
        elif method == "Runtime.consoleAPICalled":
            self.messages.append(str(params["args"]))
        elif method == "Page.javascriptDialogOpening":
            self.messages.append(f"dialog: {params['message']}")
        elif method == "Network.requestWillBeSent" and not params["request"]["url"].startswith("data:"):
            self.requests.append(params["request"]["url"])


def _high(pipe: tuple[int, int]) -> tuple[int, int]:
    """The same pipe on descriptors that are not 3 or 4, onto which the browser's are laid."""
    import fcntl

    moved = tuple(fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10) for end in pipe)
    for end in pipe:
        os.close(end)
    return moved[0], moved[1]
