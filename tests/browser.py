"""A page in headless Chromium, driven by its DevTools protocol."""

import asyncio
import base64
import itertools
import json
import shutil
import subprocess
import tempfile
import urllib.request
from pathlib import Path

from tornado.websocket import websocket_connect

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
    "--remote-debugging-port=0",
    "--window-size=1400,1600",
]


class Browser:
    """Use as ``async with Browser() as browser``; ``problems`` are console errors, exceptions, and requests made."""

    def __init__(self):
        self.problems = []
        self.socket = None
        self.ids = itertools.count(1)

    async def __aenter__(self):
        self.folder = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        self.process = subprocess.Popen(
            [CHROMIUM, *FLAGS, f"--user-data-dir={self.folder.name}"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        port_file = Path(self.folder.name) / "DevToolsActivePort"
        for _ in range(600):
            if port_file.exists() and len(port_file.read_text().split()) == 2:
                break
            await asyncio.sleep(0.1)
        port = port_file.read_text().split()[0]
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/json/list") as answer:
            (target,) = [x for x in json.load(answer) if x["type"] == "page"]
        self.socket = await websocket_connect(target["webSocketDebuggerUrl"], max_message_size=100_000_000)
        for domain in ("Page", "Runtime", "Log", "Network"):
            await self(f"{domain}.enable")
        return self

    async def __aexit__(self, *error):
        self.process.terminate()
        self.process.wait()
        self.folder.cleanup()

    async def __call__(self, method, **parameters):
        """The result of a command of the protocol."""
        number = next(self.ids)
        await self.socket.write_message(json.dumps({"id": number, "method": method, "params": parameters}))
        while True:
            message = json.loads(await asyncio.wait_for(self.socket.read_message(), 120))
            self.note(message)
            if message.get("id") == number:
                if "error" in message:
                    raise RuntimeError(f"{method}: {message['error']}")
                return message["result"]

    def note(self, message):
        method, what = message.get("method"), message.get("params", {})
        if method == "Runtime.exceptionThrown":
            self.problems.append(what["exceptionDetails"])
        if method == "Runtime.consoleAPICalled" and what["type"] in ("error", "warning", "assert"):
            self.problems.append(what["args"])
        if method == "Log.entryAdded" and what["entry"]["level"] in ("error", "warning"):
            self.problems.append(what["entry"])
        if method == "Network.requestWillBeSent" and what["request"]["url"].split(":")[0] in (
            "http",
            "https",
            "ws",
            "wss",
        ):
            self.problems.append(what["request"]["url"])

    async def run(self, script):
        """The value of a JavaScript expression."""
        answer = await self("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in answer:
            raise RuntimeError(answer["exceptionDetails"])
        return answer["result"].get("value")

    async def until(self, script, seconds=120):
        """Wait until a JavaScript expression is true."""
        for _ in range(10 * seconds):
            if await self.run(script):
                return
            await asyncio.sleep(0.1)
        raise TimeoutError(script)

    async def screenshot(self, **clip):
        """A PNG of the page, or of the part x, y, width, height of it, in bytes."""
        more = {"clip": {**clip, "scale": 1}} if clip else {}
        return base64.b64decode((await self("Page.captureScreenshot", captureBeyondViewport=True, **more))["data"])
