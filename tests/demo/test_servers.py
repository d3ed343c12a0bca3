"""The life of server processes, tried on small stand-ins for sglang."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sglang_mm_conn.demo.launch import Launch
from sglang_mm_conn.demo.servers import Server, ServerError, free_port, wait_ready

HEALTHY = """
import http.server, subprocess, sys
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print("child", child.pid, flush=True)
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.end_headers()
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""
DYING = "print('no such model'); raise SystemExit(3)"


class Scripted(Launch):
    """Runs a Python text instead of sglang."""

    script = HEALTHY

    def command(self, port: int, bootstrap_port: int) -> list[str]:
        return [sys.executable, "-c", self.script, str(port)]


class Dying(Scripted):
    script = DYING


def running(pid: int) -> bool:
    """Whether the process exists and is no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def gone(pid: int, within: float = 15.0) -> bool:
    deadline = time.monotonic() + within
    while running(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not running(pid)


def child_of(server: Server) -> int:
    found = re.search(r"^child (\d+)$", server.log(), re.MULTILINE)
    assert found, server.log()
    return int(found[1])


def test_stop_leaves_no_process_behind(tmp_path: Path) -> None:
    with Server(Scripted("colocated", tmp_path), tmp_path) as server:
        server.wait_ready(20)
        child = child_of(server)
        assert running(server.pid)
        assert running(child)
    assert not server.alive
    assert gone(server.pid)
    assert gone(child)


def test_a_frozen_server_stops_too(tmp_path: Path) -> None:
    with Server(Scripted("colocated", tmp_path), tmp_path) as server:
        server.wait_ready(20)
        server.signal(signal.SIGSTOP)
    assert gone(server.pid)


def test_a_crash_takes_the_whole_group_and_is_reported_with_the_log(tmp_path: Path) -> None:
    with Server(Scripted("colocated", tmp_path), tmp_path) as server:
        server.wait_ready(20)
        child = child_of(server)
        os.kill(server.pid, signal.SIGKILL)
        assert gone(child)
        deadline = time.monotonic() + 10
        while server.alive and time.monotonic() < deadline:
            time.sleep(0.05)
        with pytest.raises(ServerError, match="not running"):
            server.signal(signal.SIGTERM)
        assert "ended with status -9" in server.log()


def test_death_at_start_shows_the_log(tmp_path: Path) -> None:
    with Server(Dying("encoder", tmp_path), tmp_path) as server, pytest.raises(ServerError, match="no such model"):
        wait_ready([server], 20)


def test_servers_die_with_the_process_that_started_them(tmp_path: Path) -> None:
    parent = (
        "import os, signal, sys; from pathlib import Path; sys.path[:0] = sys.argv[2:];"
        "from test_servers import Scripted, Server, child_of;"
        "s = Server(Scripted('colocated', Path(sys.argv[1])), Path(sys.argv[1])); s.start(); s.wait_ready(20);"
        "print(s.pid, child_of(s), flush=True); os.kill(os.getpid(), signal.SIGKILL)"
    )
    found = subprocess.run(
        [sys.executable, "-c", parent, str(tmp_path), str(Path(__file__).parent), str(Path(__file__).parents[2])],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert found.returncode == -signal.SIGKILL, found.stderr
    for pid in map(int, found.stdout.split()):
        assert gone(pid)


def test_ports_are_not_handed_out_twice() -> None:
    ports = {free_port() for _ in range(20)}
    assert len(ports) == 20


def test_command_lines() -> None:
    model = Path("model")
    encoder = " ".join(Launch("encoder", model).command(1234, 5678))
    assert "--encoder-only --disaggregation-transfer-backend conn_multimodal" in encoder
    assert "--host 127.0.0.1 --port 1234" in encoder
    language = Launch("language", model, "mooncake", encoder_urls=("http://a", "http://b"), flags=("--tp", "2"))
    text = " ".join(language.command(1, 2))
    assert "--language-only --encoder-urls http://a http://b --encoder-bootstrap-port 2" in text
    assert "--encoder-transfer-backend mooncake" in text
    assert text.endswith("--tp 2")
    assert "cpu" not in Launch("colocated", model, device="cuda").command(1, 2)


def test_what_cannot_be_started_is_refused() -> None:
    with pytest.raises(ValueError, match="not 'decoder'"):
        Launch("decoder", Path("model"))  # type: ignore[arg-type]
