"""A real headless Chromium, spoken to through chromedriver's HTTP interface (W3C WebDriver)."""

import json
import shutil
import socket
import subprocess
import time
import urllib.request


def missing():
    """Why there is no browser; empty if there is one."""
    names = ("chromium", "chromedriver")
    absent = [name for name in names if shutil.which(name) is None]
    return f"{' and '.join(absent)} not found: apt-get install chromium chromium-driver" if absent else ""


class Browser:
    """One window."""

    def __init__(self, profile, dark=False, width=1200, height=900):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.address = f"http://127.0.0.1:{port}"
        self.process = subprocess.Popen(
            [shutil.which("chromedriver"), f"--port={port}"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        arguments = [
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-dev-shm-usage",
            "--disable-background-networking",
            f"--user-data-dir={profile}",
            f"--window-size={width},{height}",
        ]
        if dark:
            arguments.append("--blink-settings=preferredColorScheme=0")
        options = {"args": arguments, "binary": shutil.which("chromium")}
        wanted = {"goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}
        for _ in range(100):
            try:
                self._ask("GET", "/status")
                break
            except OSError:
                time.sleep(0.1)
        self.session = ""
        self.session = (
            "/session/"
            + self._ask("POST", "/session", {"capabilities": {"alwaysMatch": wanted}})["sessionId"]
        )

    def __enter__(self):
        return self

    def __exit__(self, *_):
        try:
            self._ask("DELETE", self.session)
        finally:
            self.process.terminate()
            self.process.wait()

    def open(self, address):
        self._ask("POST", f"{self.session}/url", {"url": address})

    def run(self, script, *arguments):
        """What a script returns in the page."""
        return self._ask("POST", f"{self.session}/execute/sync", {"script": script, "args": list(arguments)})

    def type(self, selector, text):
        """Real key presses into an element."""
        found = self._ask("POST", f"{self.session}/element", {"using": "css selector", "value": selector})
        (element,) = found.values()
        self._ask("POST", f"{self.session}/element/{element}/value", {"text": text})

    def log(self):
        """Everything on the console so far."""
        return self._ask("POST", f"{self.session}/se/log", {"type": "browser"})

    def _ask(self, method, path, body=None):
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(
            self.address + path, data, {"Content-Type": "application/json"}, method=method
        )
        with urllib.request.urlopen(request, timeout=120) as answer:
            return json.load(answer)["value"]
