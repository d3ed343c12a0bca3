"""An encoder that is drained: by SIGTERM, which ends it when it has finished, and by the command, which does not."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import requests

from sglang_mm_conn.control.bootstrap import look_up
from sglang_mm_conn.control.draining import ask_status
from sglang_mm_conn.demo.chat import ask
from sglang_mm_conn.demo.images import Image
from sglang_mm_conn.demo.questions import QUESTIONS, Question
from sglang_mm_conn.demo.servers import Server, ServerGroup
from tests.servers.observe import wait_until

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
    assert ask(language.url, ONE_IMAGE).same_as(right[ONE_IMAGE.name])

    with ThreadPoolExecutor(len(LOAD)) as clients:
        os.kill(scheduler_of(language), signal.SIGSTOP)  # so the encoder can deliver none of them
        answers = [clients.submit(ask, language.url, question) for question in LOAD]
        wait_until(lambda: held(encoder) == len(LOAD), "the encoder holds all requests", 60)
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
    assert f"SIGTERM: draining; {len(LOAD)} requests to /encode are held and have 30 s" in encoder.log()
    last = re.search(r"Drained after ([\d.]+) s, 0 requests to /encode were given up", encoder.log())
    assert last and took < float(last[1]) + 3, (took, last)
    status = re.search(r"the server's process ended with status (-?\d+)", encoder.log())
    assert status and int(status[1]) == -signal.SIGTERM, "as uvicorn ends without us"
