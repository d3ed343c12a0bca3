"""SIGTERM at an encoder: it finishes what it holds, refuses the rest, and ends: by itself, in time, or by force.

The server is a real uvicorn in a process of its own, without a model (draining_app.py).
"""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest
import requests

from sglang_mm_conn.control import termination
from sglang_mm_conn.control.bootstrap import EncoderAbsent, look_up
from sglang_mm_conn.control.draining import ask_status, order
from tests.control.draining_app import App, Threaded

BY_SIGTERM = -signal.SIGTERM  # uvicorn ends so, also without us


class Served:
    """The server in its process; ``ask`` posts to /encode on a thread."""

    def __init__(self, seconds: float, log: Path) -> None:
        self._log = log
        environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
        with log.open("a") as stderr:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "tests.control.draining_app", str(seconds)],
                stdout=subprocess.PIPE, stderr=stderr, env=environment, text=True,
            )  # fmt: skip
        assert self.process.stdout is not None
        self.url = f"http://127.0.0.1:{int(self.process.stdout.readline())}"
        self._clients = ThreadPoolExecutor(8)
        wait(self._answers)

    def _answers(self) -> bool:
        try:
            return requests.get(self.url + "/health", timeout=5).ok
        except requests.ConnectionError:
            return False

    def ask(self, wish: str) -> Future[requests.Response]:
        """Returns when the server holds the request."""
        before = requests.get(self.url + "/health", timeout=5).json()["encodes"]
        answer = self._clients.submit(requests.post, f"{self.url}/encode?{wish}", b"x" * 10, timeout=60)
        wait(lambda: requests.get(self.url + "/health", timeout=5).json()["encodes"] > before)
        return answer

    def terminate(self) -> None:
        self.process.send_signal(signal.SIGTERM)

    def ends(self, within: float) -> float:
        """Seconds until the process ended."""
        began = time.monotonic()
        self.process.wait(within)
        return time.monotonic() - began

    @property
    def log(self) -> str:
        return self._log.read_text()

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()
        self._clients.shutdown()


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[[float], Served]]:
    made: list[Served] = []

    def start(seconds: float) -> Served:
        made.append(Served(seconds, tmp_path / f"log-{len(made)}"))
        return made[-1]

    yield start
    for served in made:
        served.close()


def wait(condition: Callable[[], object], seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited {seconds:g} s"
        time.sleep(0.02)


def test_it_finishes_what_it_holds_says_that_it_drains_and_ends(serve: Callable[[float], Served]) -> None:
    served = serve(30.0)
    held = [served.ask("seconds=2") for _ in range(3)]
    began = time.monotonic()
    served.terminate()
    wait(lambda: look_up(served.url).draining)
    status = ask_status(served.url, None)
    assert status.draining and status.ending and status.held == 3
    refused = requests.post(served.url + "/encode", b"x", timeout=5)
    assert refused.status_code == 503 and refused.headers["X-Mm-Conn-State"] == "draining"
    assert time.monotonic() - began < 1.5, "all that while it holds requests"
    assert [one.result().json() for one in held] == [{"status": "ok", "bytes": 10}] * 3
    served.ends(2)
    assert served.process.returncode == BY_SIGTERM
    lines = [line for line in served.log.splitlines() if "rain" in line and "termination" in line]
    assert len(lines) == 2 and "3 requests to /encode are held and have 30 s" in lines[0] and " 0 req" in lines[1]
    with pytest.raises(EncoderAbsent):
        look_up(served.url)


def test_it_ends_at_once_when_it_holds_nothing(serve: Callable[[float], Served]) -> None:
    served = serve(30.0)
    served.terminate()
    assert served.ends(5) < 1.5 and served.process.returncode == BY_SIGTERM


def test_after_an_order_it_ends_at_once_too(serve: Callable[[float], Served]) -> None:
    served = serve(30.0)
    order(served.url, None, drain=True)
    served.terminate()
    assert served.ends(5) < 1.5 and served.process.returncode == BY_SIGTERM


def test_when_the_time_is_up_it_gives_up_what_it_holds_and_ends(serve: Callable[[float], Served]) -> None:
    served = serve(1.0)
    room, hanging = served.ask("room=1"), served.ask("hang=1")
    served.terminate()
    assert 1.0 <= served.ends(8) < 5.0 and served.process.returncode == BY_SIGTERM
    failed, refused = room.result(), hanging.result()
    assert failed.status_code == refused.status_code == 503, "both askers go to another encoder"
    assert failed.json()["message"] == termination.DRAINED
    assert refused.headers["X-Mm-Conn-State"] == "draining"
    assert "2 requests to /encode were given up" in served.log


def test_a_second_sigterm_ends_it_without_waiting_for_its_time(serve: Callable[[float], Served]) -> None:
    served = serve(600.0)
    hanging = served.ask("hang=1")
    served.terminate()
    wait(lambda: look_up(served.url).draining)
    served.terminate()
    assert served.ends(8) < 4.0 and served.process.returncode == BY_SIGTERM
    assert hanging.result().status_code == 503


def test_a_server_whose_event_loop_hangs_ends_by_force_and_shows_where(serve: Callable[[float], Served]) -> None:
    served = serve(0.5)
    hanging = served.ask("block=1&seconds=0.3")
    time.sleep(0.6)
    served.terminate()
    assert served.ends(15) > 0.5 and served.process.returncode == 1
    assert "draining_app.py" in served.log and "_encode" in served.log
    assert isinstance(hanging.exception(), requests.ConnectionError)


def test_with_no_time_to_drain_sigterm_stays_that_of_uvicorn(serve: Callable[[float], Served]) -> None:
    served = serve(0.0)
    held = served.ask("seconds=1")
    served.terminate()
    wait(lambda: "Shutting down" in served.log)
    with pytest.raises((requests.ConnectionError, requests.Timeout)):
        requests.get(served.url + "/health", timeout=0.3)
    assert held.result().ok, "uvicorn waits for it, and listens no more"
    served.ends(5)
    assert served.process.returncode == BY_SIGTERM and "draining" not in served.log


def test_ctrl_c_stays_that_of_uvicorn(serve: Callable[[float], Served]) -> None:
    served = serve(600.0)
    held = served.ask("seconds=1")
    served.process.send_signal(signal.SIGINT)
    assert held.result().ok
    served.ends(5)
    assert "draining" not in served.log and "Finished server process" in served.log


def test_a_server_that_cannot_drain_on_sigterm_says_so(caplog: pytest.LogCaptureFixture) -> None:
    async def run(seconds: float) -> None:
        app = App(seconds=seconds).app
        async with app.router.lifespan_context(app):
            assert signal.getsignal(signal.SIGTERM) is before

    before = signal.getsignal(signal.SIGTERM)
    asyncio.run(run(0.0))
    assert "SIGTERM" not in caplog.text
    asyncio.run(run(1.0))
    assert "SIGTERM will not drain this encoder" in caplog.text


def test_outside_the_main_thread_no_handler_is_touched() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with Threaded(App(seconds=30.0)) as server:
        assert requests.get(server.url + "/health", timeout=5).ok
        assert signal.getsignal(signal.SIGTERM) is before
    assert signal.getsignal(signal.SIGTERM) is before
