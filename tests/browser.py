"""A headless Chromium, driven over the pipe of its DevTools: what a visitor does, and what the page then shows.

    with Browser() as browser:
        page = browser.open("http://127.0.0.1:7860", language="zh-CN")
        page.type("#question textarea", "你好")
        page.click("#send")
        page.until("document.body.innerText.includes('好')")

One thread, one command at a time. https://chromedevtools.github.io/devtools-protocol has the commands.
"""

import contextlib
import itertools
import json
import os
import select
import shutil
import subprocess
import tempfile
import time
from collections import deque
from pathlib import Path
from typing import Any

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
FLAGS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--remote-debugging-pipe",
    "--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--disable-extensions", "--hide-scrollbars", "--mute-audio",
)  # fmt: skip
SECONDS = 30.0  # for a command, or for what a page is waited for


class Browser:
    """A browser with a profile of its own, that is gone afterwards."""

    def __enter__(self) -> "Browser":
        assert CHROMIUM is not None
        self.profile = tempfile.mkdtemp()
        from_us, self.to_browser = os.pipe()
        self.from_browser, to_us = os.pipe()
        # Chromium reads its file 3 and writes its file 4.
        shell = f'exec "$0" "$@" 3<&{from_us} 4>&{to_us}'
        command = ["bash", "-c", shell, CHROMIUM, *FLAGS, f"--user-data-dir={self.profile}"]
        self.process = subprocess.Popen(command, pass_fds=(from_us, to_us), stderr=subprocess.DEVNULL)
        os.close(from_us)
        os.close(to_us)
        self.numbers, self.unread, self.pages = itertools.count(1), b"", dict[str, Page]()
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError, AssertionError):
            self.ask("Browser.close")
        try:
            self.process.wait(5)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        os.close(self.to_browser)
        os.close(self.from_browser)
        shutil.rmtree(self.profile, ignore_errors=True)

    def ask(self, method: str, session: str | None = None, **params: Any) -> dict[str, Any]:
        """What the browser answers to a command. Events that come meanwhile go to their pages."""
        number = next(self.numbers)
        message = {"id": number, "method": method, "params": params} | ({"sessionId": session} if session else {})
        os.write(self.to_browser, json.dumps(message).encode() + b"\0")
        end = time.monotonic() + SECONDS
        while time.monotonic() < end:
            answer = self.next_message(end - time.monotonic())
            if answer is not None and answer.get("id") == number:
                assert "error" not in answer, (method, answer)
                return answer["result"]
        raise AssertionError(f"Chromium didn't answer {method} in {SECONDS:.0f} seconds.")

    def next_message(self, seconds: float) -> dict[str, Any] | None:
        """The next message, if there is one in time; an event is handed to its page."""
        while b"\0" not in self.unread:
            if not select.select([self.from_browser], [], [], max(0.0, seconds))[0]:
                return None
            piece = os.read(self.from_browser, 2**20)
            assert piece, "Chromium has ended."
            self.unread += piece
        content, _, self.unread = self.unread.partition(b"\0")
        message = json.loads(content)
        if "method" in message and message.get("sessionId") in self.pages:
            self.pages[message["sessionId"]].events.append(message)
        return message

    def open(
        self, url: str, *, width: int = 1280, height: int = 900, phone: bool = False, dark: bool = False,
        language: str = "en-US",
    ) -> "Page":  # fmt: skip
        """A new page at an address, in a window of so many pixels."""
        context = self.ask("Target.createBrowserContext")["browserContextId"]
        target = self.ask("Target.createTarget", url="about:blank", browserContextId=context)["targetId"]
        session = self.ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        page = self.pages[session] = Page(self, session, target)
        page.ask("Page.enable")
        page.ask("Network.enable")
        page.ask("Runtime.enable")
        page.ask("Log.enable")
        page.ask("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=phone)
        page.ask("Emulation.setUserAgentOverride", userAgent="Chromium", acceptLanguage=language)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        page.ask("Emulation.setEmulatedMedia", features=[scheme])
        page.ask("Page.navigate", url=url)
        return page


class Page:
    """One tab."""

    def __init__(self, browser: Browser, session: str, target: str) -> None:
        self.browser, self.session, self.target = browser, session, target
        self.events: deque[dict[str, Any]] = deque()  # as they came

    def ask(self, method: str, **params: Any) -> dict[str, Any]:
        """What the tab answers to a command."""
        return self.browser.ask(method, self.session, **params)

    def js(self, expression: str) -> Any:
        """The value of a JavaScript expression, awaited."""
        result = self.ask("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def until(self, expression: str) -> Any:
        """The value of an expression, once it is true."""
        end = time.monotonic() + SECONDS
        while time.monotonic() < end:
            value = self.js(f"(found => found instanceof Node ? true : found)({expression})")
            if value:
                return value
            time.sleep(0.05)
        raise AssertionError(f"not so in {SECONDS:.0f} seconds: {expression}\n{self.text[:3000]}")

    @property
    def text(self) -> str:
        """What the page shows."""
        return self.js("document.body.innerText")

    def text_of(self, selector: str) -> str:
        """What a part of the page shows."""
        return self.js(f"document.querySelector({json.dumps(selector)}).innerText")

    def click(self, selector: str) -> None:
        """Click in the middle of what a selector finds, once that is there to be seen."""
        place = f"""(() => {{
            const found = document.querySelector({json.dumps(selector)});
            if (!found || !found.checkVisibility()) return null;
            found.scrollIntoView({{block: "center", behavior: "instant"}});
            const box = found.getBoundingClientRect();
            return [box.x + box.width / 2, box.y + box.height / 2];
        }})()"""
        x, y = self.until(place)
        for kind in ("mousePressed", "mouseReleased"):
            self.ask("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def focus(self, selector: str) -> None:
        """Let the keyboard write into a field, in place of what it holds."""
        self.until(f"document.querySelector({json.dumps(selector)})?.checkVisibility()")
        self.js(f"(field => {{field.focus(); field.select?.()}})(document.querySelector({json.dumps(selector)}))")

    def type(self, selector: str, text: str) -> None:
        """Write a text into a field, in place of what it holds."""
        self.focus(selector)
        self.ask("Input.insertText", text=text)

    def press(self, key: str, code: int) -> None:
        """Press a key and let it go."""
        text = {"text": "\r"} if key == "Enter" else {}
        self.ask("Input.dispatchKeyEvent", type="keyDown", key=key, code=key, windowsVirtualKeyCode=code, **text)
        self.ask("Input.dispatchKeyEvent", type="keyUp", key=key, code=key, windowsVirtualKeyCode=code)

    def upload(self, selector: str, path: Path) -> None:
        """Choose a file in a file field."""
        self.until(f"document.querySelector({json.dumps(selector)})")
        root = self.ask("DOM.getDocument")["root"]["nodeId"]
        node = self.ask("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
        self.ask("DOM.setFileInputFiles", files=[str(path)], nodeId=node)

    @property
    def requested(self) -> list[str]:
        """The addresses that the page has asked for, data: and blob: left out."""
        self.js("1")
        asked = [
            event["params"]["request"]["url"] for event in self.events if event["method"] == "Network.requestWillBeSent"
        ]
        return [url for url in asked if not url.startswith(("data:", "blob:"))]

    def close(self) -> None:
        """Close the tab."""
        del self.browser.pages[self.session]
        self.browser.ask("Target.closeTarget", targetId=self.target)
