"""An encoder that is drained: by SIGTERM, which ends it when it has finished, and by the command, which does not."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import requests

from sglang_mm_conn.control.bootstrap import look_up
from sglang_mm_conn.control.draining import ask_status
from sglang_mm_conn.demo.chat import Answer, ask
from sglang_mm_conn.demo.images import Image
from sglang_mm_conn.demo.questions import QUESTIONS, Question
from sglang_mm_conn.demo.servers import Server, ServerGroup
from tests.servers.observe import report, wait_until

ENV = {
    "CPU_BED_FORBID_BUILTIN_TRANSPORT": "1",
    "SGLANG_MM_CONN_CHECKSUM": "1",
    "SGLANG_EMBEDDING_CACHE_BLOCK_SIZE": "16",
}
ONE_IMAGE = QUESTIONS[1]
LOAD = tuple(Question(f"load {seed}", "describe", (Image(seed, 392, 336),)) for seed in range(120, 128))


def drain(url: str, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "sglang_mm_conn", "drain", url, *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def scheduler_of(language: Server) -> int:
    (pid,) = [pid for pid in language.pids() if b"scheduler" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    return pid


def held(server: Server) -> int:
    return ask_status(server.url, None).held


def state_of(encoder: Server, language: Server) -> str:
    """What the language server's dispatcher knows of it."""
    return str(report(language)["dispatch"]["encoders"][encoder.url]["state"])


def hold_all(group: ServerGroup, clients: ThreadPoolExecutor) -> list[Future[Answer]]:
    """Ask all of LOAD, with the language server's scheduler frozen: the encoder can deliver nothing and holds them."""
    os.kill(scheduler_of(group.language), signal.SIGSTOP)
    answers = [clients.submit(ask, group.language.url, question) for question in LOAD]
    wait_until(lambda: held(group.encoder) == len(LOAD), "the encoder holds all requests", 60)
    return answers


def test_sigterm_under_load_costs_no_request_and_the_command_stops_and_starts_work(
    reference: Callable[..., Any], new_group: Callable[..., ServerGroup]
) -> None:
    right = {question.name: reference("qwen2_5_vl").answer(question) for question in (ONE_IMAGE, *LOAD)}
    group = new_group("qwen2_5_vl", env=ENV)
    encoder, language = group.encoder, group.language
    assert ask(language.url, ONE_IMAGE).same_as(right[ONE_IMAGE.name])
    info = look_up(encoder.url)
    assert not info.draining and not info.prefix_cache

    done = drain(encoder.url, "--wait", "30")
    assert done.returncode == 0, done.stderr
    assert "holds nothing any more" in done.stdout and look_up(encoder.url).draining
    refused = requests.post(f"{encoder.url}/encode", json={}, timeout=10)
    assert (refused.status_code, refused.headers["X-Mm-Conn-State"]) == (503, "draining")
    assert encoder.alive, "an order alone ends nothing"
    done = drain(encoder.url, "--undo")
    assert done.returncode == 0 and not look_up(encoder.url).draining, done.stderr
    wait_until(lambda: state_of(encoder, language) == "up", "the language server has heard of it", 2)
    assert ask(language.url, ONE_IMAGE).same_as(right[ONE_IMAGE.name])

    with ThreadPoolExecutor(len(LOAD)) as clients:
        answers = hold_all(group, clients)
        os.kill(encoder.pid, signal.SIGTERM)
        wait_until(lambda: look_up(encoder.url).draining, "the encoder drains", 5)
        assert held(encoder) == len(LOAD)
        began = time.monotonic()
        os.kill(scheduler_of(language), signal.SIGCONT)
        wait_until(lambda: not encoder.alive, "the encoder has ended", 40)
        took = time.monotonic() - began
        got = [answer.result() for answer in answers]
    for question, one in zip(LOAD, got, strict=True):
        assert one.same_as(right[question.name]), (question.name, one)
    assert f"SIGTERM: draining; {len(LOAD)} requests to /encode are held and have 20 s" in encoder.log()
    last = re.search(r"Drained after ([\d.]+) s, 0 requests to /encode were given up", encoder.log())
    assert last and took < float(last[1]) + 3, (took, last)
    status = re.search(r"the server's process ended with status (-?\d+)", encoder.log())
    assert status and int(status[1]) == -signal.SIGTERM, "as uvicorn ends without us"


def test_workers_that_cannot_finish_in_time_give_their_requests_up_with_503(
    new_group: Callable[..., ServerGroup],
) -> None:
    flags = ("--dp-size", "2", "--enable-prefix-mm-cache")
    group = new_group("qwen2_5_vl", env={**ENV, "SGLANG_MM_CONN_DRAIN_SECONDS": "2"}, encoder_flags=flags)
    encoder, language = group.encoder, group.language
    assert ask(language.url, ONE_IMAGE).ok
    assert drain(encoder.url).returncode == 0
    info = look_up(encoder.url)
    assert info.draining and info.prefix_cache and len(info.workers) == 2
    assert drain(encoder.url, "--undo").returncode == 0
    wait_until(lambda: state_of(encoder, language) == "up", "the language server has heard of it", 2)

    with ThreadPoolExecutor(len(LOAD)) as clients:
        answers = hold_all(group, clients)
        began = time.monotonic()
        os.kill(encoder.pid, signal.SIGTERM)
        wait_until(lambda: not encoder.alive, "the encoder has ended", 20)
        took = time.monotonic() - began
        os.kill(scheduler_of(language), signal.SIGCONT)
        for answer in answers:
            assert answer.result().status >= 500, "there is no other encoder"
    assert 2 <= took < 8, took
    assert f"{len(LOAD)} requests to /encode were given up" in encoder.log()
    assert encoder.log().count("code=503 reason=the encoder has drained") == len(LOAD)
    assert ask(language.url, QUESTIONS[0]).ok, "the language server lives on"
