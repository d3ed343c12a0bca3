"""Clients that ask more than one thing: both servers at once, all the while, or nothing any more."""

from __future__ import annotations

import http.client
import itertools
import json
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from urllib.parse import urlsplit

import requests

from sglang_mm_conn.demo.chat import Answer, ask, body_of
from sglang_mm_conn.demo.questions import Question

_rooms = itertools.count(1000)


def ask_both(prefill_url: str, decode_url: str, kv_port: int, question: Question) -> Answer:
    """What sglang's router does: the same request to both, with one room for its KV cache. Returns decode's answer."""
    more = {"bootstrap_host": "127.0.0.1", "bootstrap_port": kv_port, "bootstrap_room": next(_rooms)}
    with ThreadPoolExecutor(2) as clients:
        both = [clients.submit(ask, url, question, more=more, timeout=60) for url in (prefill_url, decode_url)]
    return [one.result() for one in both][1]


class LeavingClient:
    """Asks, and hangs up when told."""

    def __init__(self, url: str, question: Question, *, stream: bool) -> None:
        self._connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=60)
        body = {**body_of(question), "stream": stream}
        self._connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})

    def wait_first_chunk(self) -> None:
        assert self._connection.getresponse().readline()

    def leave(self) -> None:
        self._connection.close()


class BackgroundAsk:
    """A question on its way, with its answer when it is there."""

    def __init__(self, url: str, question: Question, *, rid: str | None = None, timeout: float = 120) -> None:
        self._answer: Answer | None = None
        self._thread = threading.Thread(target=self._run, args=(url, question, rid, timeout))
        self._thread.start()

    def _run(self, url: str, question: Question, rid: str | None, timeout: float) -> None:
        try:
            self._answer = ask(url, question, rid=rid, timeout=timeout)
        except requests.ConnectionError as error:  # the server died
            self._answer = Answer(status=0, error=str(error))

    def answer(self) -> Answer:
        """``status`` 0: the connection broke."""
        self._thread.join()
        assert self._answer is not None, "no answer came in time"
        return self._answer


@dataclass
class Asked:
    """One question of the concurrent and how it went; ``answer`` is None where none came."""

    question: Question
    seconds: float
    answer: Answer | None


@dataclass
class ConcurrentRequests:
    """Clients that ask one question after the other, each from its own place in the list, until told to stop."""

    url: str
    questions: Sequence[Question]
    clients: int
    timeout: float
    asked: list[Asked] = field(default_factory=list)
    _stop: threading.Event = field(default_factory=threading.Event)
    _threads: list[threading.Thread] = field(default_factory=list)

    def __enter__(self) -> ConcurrentRequests:
        self._threads = [threading.Thread(target=self._client, args=(number,)) for number in range(self.clients)]
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def wait_for_more(self, answers: int, seconds: float = 120) -> None:
        """Until so many further questions were answered."""
        wanted, deadline = len(self.asked) + answers, time.monotonic() + seconds
        while len(self.asked) < wanted:
            assert time.monotonic() < deadline, "the concurrent gets no answers"
            time.sleep(0.05)

    def _client(self, number: int) -> None:
        while not self._stop.is_set():
            question = self.questions[number % len(self.questions)]
            number += 1
            began = time.monotonic()
            try:
                answer = ask(self.url, question, timeout=self.timeout)
            except requests.RequestException:
                answer = None
            self.asked.append(Asked(question, time.monotonic() - began, answer))
            time.sleep(0.05)  # a refusal comes at once
