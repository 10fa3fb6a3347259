"""A headless Chromium, driven by the DevTools protocol: just enough to open a page and to ask it things."""

import base64
import json
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

from websockets.sync.client import ClientConnection, connect

SECONDS = 60
NAMES = ("chromium", "chromium-browser", "google-chrome")
FLAGS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-extensions",
    "--remote-debugging-port=0",
)  # fmt: skip
QUESTION = """({
  overflow: document.documentElement.scrollWidth - document.documentElement.clientWidth,
  pictures: [...document.images].map(image => [image.alt, image.complete && image.naturalWidth > 0]),
  paper: getComputedStyle(document.body).backgroundColor,
  ink: getComputedStyle(document.body).color,
})"""


def found() -> str | None:
    """The path of a Chromium, or None."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


class Browser:
    """One tab. `events` holds what it told of since the last `open`."""

    def __init__(self, socket: ClientConnection) -> None:
        self._socket, self._number, self._session = socket, 0, ""
        self.events: list[dict[str, Any]] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **values: Any) -> dict[str, Any]:
        self._number += 1
        message = {"id": self._number, "method": method, "params": values}
        self._socket.send(json.dumps(message | ({"sessionId": self._session} if self._session else {})))
        while (answer := self._next()).get("id") != self._number:
            self.events.append(answer)
        assert "error" not in answer, answer
        result: dict[str, Any] = answer["result"]
        return result

    def open(self, page: Path | str, width: int, height: int, scheme: str) -> Self:
        """Open a file or an address in a window of this size, for people who prefer this colour scheme: "light"
        or "dark".
        """
        self._go("about:blank")  # what the page before it still has to say is not this one's
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.call("Emulation.setDeviceMetricsOverride", **size)
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        self._go(page if isinstance(page, str) else page.as_uri())
        return self

    def ask(self, expression: str = QUESTION) -> Any:
        """The value of an expression in the page; None where it is none that JSON has."""
        return self.call("Runtime.evaluate", expression=expression, returnByValue=True)["result"].get("value")

    def until(self, expression: str) -> Any:
        """The value of an expression in the page, once it is true."""
        end = time.monotonic() + SECONDS
        while not (value := self.ask(expression)):
            assert time.monotonic() < end, f"waited {SECONDS} s for {expression}"
            time.sleep(0.05)
        return value

    def complaints(self, own: tuple[str, ...] = ("file:", "data:")) -> list[str]:
        """Console messages, log entries, exceptions, and requests that failed or were for anything but the page
        and what is in it, whose addresses begin with one of `own`. What the page itself called off has not
        failed, and what the browser tells at its most talkative is no complaint."""
        told = []
        for event in self.events:
            method, values = event.get("method", ""), event.get("params", {})
            address = values.get("request", {}).get("url", "")
            outside = method == "Network.requestWillBeSent" and not address.startswith(own)
            wrong = (
                "Runtime.consoleAPICalled",
                "Runtime.exceptionThrown",
                "Log.entryAdded",
                "Network.loadingFailed",
            )
            harmless = values.get("canceled") or values.get("entry", {}).get("level") == "verbose"
            if outside or (method in wrong and not harmless):
                told.append(json.dumps(event)[:500])
        return told

    def picture(self, path: Path) -> None:
        """Write the whole page as a PNG."""
        shot = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(shot["data"]))

    def _go(self, address: str) -> None:
        self.events.clear()
        self.call("Page.navigate", url=address)
        while not any(event.get("method") == "Page.loadEventFired" for event in self.events):
            self.events.append(self._next())

    def _next(self) -> dict[str, Any]:
        answer: dict[str, Any] = json.loads(self._socket.recv(timeout=SECONDS))
        return answer


@contextmanager
def started(program: str, folder: Path) -> Iterator[Browser]:
    """A Chromium with a profile of its own in `folder`; it is gone afterwards."""
    log = folder / "chromium.log"
    with log.open("w") as file:
        process = subprocess.Popen(
            [program, *FLAGS, f"--user-data-dir={folder / 'profile'}", "about:blank"],
            stdin=subprocess.DEVNULL, stdout=file, stderr=file, start_new_session=True,
        )  # fmt: skip
    try:
        with connect(_address(process, log), max_size=None, open_timeout=SECONDS) as socket:
            browser = Browser(socket)
            yield browser
            browser.call("Page.close")
    finally:
        process.terminate()
        try:
            process.wait(SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _address(process: "subprocess.Popen[bytes]", log: Path) -> str:
    end = time.monotonic() + SECONDS
    while time.monotonic() < end:
        text = log.read_text(errors="replace")
        if told := re.search(r"DevTools listening on (ws://\S+)", text):
            return told[1]
        assert process.poll() is None, text
        time.sleep(0.05)
    raise AssertionError(f"Chromium did not start in {SECONDS} s: {log.read_text(errors='replace')}")
