"""Clients tell right answers from wrong ones, and strangers are what they are said to be."""

from __future__ import annotations

import http.server
import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import requests

from sglang_mm_conn.demo.chat import Answer
from sglang_mm_conn.demo.questions import Question
from sglang_mm_conn.demo.servers import free_port
from tests.fleet.load import Load, one_image_each, play, put, questions
from tests.fleet.strangers import failing, silent, web_server
from tests.fleet.tally import NO_ANSWER

TEXT = Question("text", "hello")


@contextmanager
def chat_server(said: str) -> Iterator[str]:
    class Handler(http.server.BaseHTTPRequestHandler):
        """Answers every question alike."""

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            logprobs = {"content": [{"token": letter} for letter in said]}
            choice = {"message": {"content": said}, "logprobs": logprobs, "finish_reason": "length"}
            body = json.dumps({"choices": [choice]}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args: object) -> None:
            """Says nothing."""

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def right(question: Question) -> Answer:
    return Answer(200, "yes", tuple("yes"))


def test_an_answer_is_right_wrong_or_failed() -> None:
    with chat_server("yes") as url:
        good = put(url, TEXT, right)
    assert good.right and not good.failed and not good.wrong
    with chat_server("no") as url:
        bad = put(url, TEXT, right)
    assert bad.wrong and not bad.failed and bad.error == "'no' in place of 'yes'"
    nobody = put(f"http://127.0.0.1:{free_port()}", TEXT, right)
    assert nobody.status == NO_ANSWER and nobody.failed and "Connection" in nobody.error


def test_a_load_asks_every_question_of_every_server_and_no_more_than_it_is_told() -> None:
    asked = questions(10)
    with chat_server("yes") as first, chat_server("no") as second:
        tally = play([first, second], asked, right, count=40, clients=4)
    assert tally.requests == 40 and len(tally.wrong) == 20
    assert {reply.question for reply in tally.replies if reply.right} == {question.name for question in asked}
    assert {reply.question for reply in tally.wrong} == {question.name for question in asked}


def test_a_load_goes_on_until_it_is_stopped() -> None:
    entered = threading.Semaphore(0)
    with (
        chat_server("yes") as url,
        Load([url], [TEXT], right, clients=2, enter=entered.release) as load,
    ):
        load.wait_for_more(5)
        seen = load.tally().requests
        assert seen >= 5
    assert load.join().requests >= seen and entered.acquire(blocking=False) and entered.acquire(blocking=False)


def test_questions_have_none_to_five_images_and_none_in_common() -> None:
    asked = (*questions(), *one_image_each(100))
    assert {len(question.images) for question in asked} == {0, 1, 2, 3, 4, 5}
    images = [image for question in asked for image in question.images]
    assert len(set(images)) == len(images)
    assert len({question.name for question in asked}) == len(asked)


def test_a_stranger_answers_everything_alike() -> None:
    port = free_port()
    url = f"http://127.0.0.1:{port}/encode"
    for stranger, status, kind in ((failing, 500, "json"), (web_server, 200, "html")):
        with stranger(port):
            for answer in (requests.get(url, timeout=5), requests.post(url, json={"a": 1}, timeout=5)):
                assert answer.status_code == status and kind in answer.headers["Content-Type"]
    with pytest.raises(requests.ConnectionError):
        requests.get(url, timeout=5)


def test_a_silent_server_accepts_and_says_nothing() -> None:
    port = free_port()
    with silent(port), pytest.raises(requests.ReadTimeout):
        requests.get(f"http://127.0.0.1:{port}", timeout=0.3)
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port), timeout=1)
