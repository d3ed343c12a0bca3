"""Owns a client of one deployment: its requests, and the files that they name."""

from __future__ import annotations

import http.client
import json
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import requests

from tests.parity.files import Files
from tests.parity.replies import Reply, cause_of, joined, lasting

SECONDS = 120.0


class Client:
    """Asks one server.

    Attributes:
        url: of the server.
        files: media that a request may name.
        model: the directory of its model.
    """

    def __init__(self, url: str, files: Files, model: Path) -> None:
        self.url, self.files, self.model = url, files, model
        self._http = requests.Session()
        self._http.trust_env = False

    def post(self, path: str, body: Any, **how: Any) -> Reply:
        return self.send("POST", path, json=body, **how)

    def get(self, path: str) -> Reply:
        return self.send("GET", path)

    def send(self, method: str, path: str, timeout: float = SECONDS, **how: Any) -> Reply:
        """One request; ``how`` is that of ``requests``."""
        body = how.get("json")
        stream = isinstance(body, dict) and bool(body.get("stream"))
        with self._http.request(method, self.url + path, timeout=timeout, stream=stream, **how) as response:
            kind = response.headers.get("Content-Type", "")
            if response.status_code >= 400:
                return Reply(response.status_code, cause=cause_of(response.text))
            if "event-stream" in kind or "ndjson" in kind:
                return Reply(response.status_code, lasting(joined(response.iter_lines())))
            text = response.text
            return Reply(response.status_code, lasting(json.loads(text)) if "json" in kind else text)

    def several(self, *asks: Callable[[Client], Any]) -> list[Any]:
        """The replies to all of ``asks``, sent at once."""
        with ThreadPoolExecutor(len(asks)) as threads:
            return [one.result() for one in [threads.submit(ask, self.another()) for ask in asks]]

    def beside(self, ask: Callable[[Client], Any]) -> Future[Any]:
        """The reply to ``ask``, on its way."""
        future: Future[Any] = Future()

        def run() -> None:
            try:
                future.set_result(ask(self.another()))
            except BaseException as error:
                future.set_exception(error)

        threading.Thread(target=run, daemon=True).start()
        return future

    def another(self) -> Client:
        return Client(self.url, self.files, self.model)

    def leave(self, path: str, body: Any, seconds: float) -> None:
        """Ask, and hang up after ``seconds``."""
        connection = http.client.HTTPConnection(urlsplit(self.url).netloc, timeout=SECONDS)
        connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
        time.sleep(seconds)
        connection.close()

    def wait_idle(self, seconds: float = 30.0) -> None:
        """Wait until the server has no request. Raises TimeoutError."""
        until = time.monotonic() + seconds
        while self.running() != 0:
            if time.monotonic() > until:
                raise TimeoutError(f"{self.url} has requests after {seconds:g} s")
            time.sleep(0.02)

    def wait_busy(self, seconds: float = 30.0) -> None:
        """Wait until the server runs a request. Raises TimeoutError."""
        until = time.monotonic() + seconds
        while self.running() == 0:
            if time.monotonic() > until:
                raise TimeoutError(f"{self.url} runs no request after {seconds:g} s")
            time.sleep(0.005)

    def running(self) -> int:
        load = self._http.get(f"{self.url}/v1/loads", timeout=SECONDS).json()["loads"][0]
        return int(load["num_running_reqs"] + load["num_waiting_reqs"])
