"""The local socket on which a scheduler reports to its dispatchers: real sockets, and their directory."""

from __future__ import annotations

import asyncio
import fcntl
import os
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import zmq

from sglang_mm_conn.control import reports
from sglang_mm_conn.control.reports import ReportReceiver, ReportSender, new_report_address
from sglang_mm_conn.core.dispatch.encoders import EncoderStatus
from sglang_mm_conn.core.dispatch.reports import MOST_BYTES, EncoderStatuses, Report, RoomFailed
from sglang_mm_conn.core.errors import ProtocolError

STATUSES = EncoderStatuses([EncoderStatus("http://a:1", True, load=3)])
IN_A_PROCESS = """
import os, stat, sys
from sglang_mm_conn.control.reports import ReportSender, new_report_address

address = new_report_address()
sender = ReportSender(address)
directory = os.path.dirname(address.removeprefix("ipc://"))
if os.fork() == 0:
    sys.exit(0)
os.wait()
print(directory, os.path.isdir(directory), oct(stat.S_IMODE(os.stat(directory).st_mode)))
"""


@pytest.fixture
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with tempfile.TemporaryDirectory(prefix="mm-conn-test-", dir="/tmp") as directory:
        yield f"ipc://{directory}/reports"


@pytest.fixture
def sender(address: str) -> Iterator[ReportSender]:
    made = ReportSender(address)
    yield made
    made.close()


async def receive_other(receiver: ReportReceiver, than: Report) -> Report:
    """The first report that is another one ``than`` that."""
    while (report := await asyncio.wait_for(receiver.receive(), 5)) == than:
        pass
    return report


async def receive_while_sent(receiver: ReportReceiver, sender: ReportSender, report: Report) -> Report:
    """The first report that arrives while ``report`` is sent again and again, as the scheduler does."""
    arrives = asyncio.ensure_future(receiver.receive())
    for _ in range(500):
        sender.send(report)
        done, _ = await asyncio.wait([arrives], timeout=0.02)
        if done:
            return arrives.result()
    raise AssertionError("no report arrived")


def test_a_report_reaches_every_dispatcher(address: str, sender: ReportSender) -> None:
    async def run() -> None:
        receivers = [ReportReceiver(address) for _ in range(2)]
        try:
            for receiver in receivers:
                assert await receive_while_sent(receiver, sender, STATUSES) == STATUSES
            failed = RoomFailed("room", 502, "lost")
            sender.send(failed)
            for receiver in receivers:
                assert await receive_other(receiver, STATUSES) == failed
        finally:
            for receiver in receivers:
                receiver.close()

    asyncio.run(run())


def test_a_dispatcher_may_start_before_the_scheduler_and_outlive_it(address: str) -> None:
    async def run() -> None:
        receiver = ReportReceiver(address)
        try:
            for _ in range(2):
                await asyncio.sleep(0.05)
                sender = ReportSender(address)
                try:
                    assert await receive_while_sent(receiver, sender, STATUSES) == STATUSES
                finally:
                    sender.close()
        finally:
            receiver.close()

    asyncio.run(run())


def test_a_malformed_report_is_an_error_and_the_next_report_arrives(address: str, sender: ReportSender) -> None:
    async def run() -> None:
        receiver = ReportReceiver(address)
        try:
            await receive_while_sent(receiver, sender, STATUSES)
            sender._socket.send(b"\xc1 no report")
            sender.send(RoomFailed("room", 502, "lost"))
            with pytest.raises(ProtocolError, match="malformed"):
                await receive_other(receiver, STATUSES)
            assert await asyncio.wait_for(receiver.receive(), 5) == RoomFailed("room", 502, "lost")
        finally:
            receiver.close()

    asyncio.run(run())


def test_a_report_that_is_too_long_is_an_error_and_the_next_report_arrives(address: str, sender: ReportSender) -> None:
    async def run() -> None:
        receiver = ReportReceiver(address)
        try:
            await receive_while_sent(receiver, sender, STATUSES)
            sender._socket.send(bytes(MOST_BYTES + 1))
            with pytest.raises(ProtocolError, match="longer than the limit"):
                await receive_other(receiver, STATUSES)
            assert await receive_while_sent(receiver, sender, STATUSES) == STATUSES
        finally:
            receiver.close()

    asyncio.run(run())


def test_a_dispatcher_that_does_not_read_never_delays_the_scheduler(
    address: str, sender: ReportSender, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it does not read is dropped: memory is limited, too."""
    many = EncoderStatuses([EncoderStatus(f"http://{number}:1", True, refusal="x" * 1000) for number in range(100)])

    async def run() -> None:
        stuck, reading = ReportReceiver(address), ReportReceiver(address)
        try:
            await receive_while_sent(stuck, sender, STATUSES)
            await receive_while_sent(reading, sender, STATUSES)
            longest = 0.0
            for _ in range(3000):  # 300 MB
                began = time.monotonic()
                sender.send(many)
                longest = max(longest, time.monotonic() - began)
            assert longest < 0.5
            failed = RoomFailed("room", 502, "lost")
            while await receive_while_sent(reading, sender, failed) != failed:
                pass
        finally:
            stuck.close()
            reading.close()

    monkeypatch.setattr(reports, "_MOST_WAITING", 100)
    asyncio.run(run())


def test_any_thread_may_send_and_after_the_end_nothing_is_sent(address: str) -> None:
    sender = ReportSender(address)

    def send_many() -> None:
        for _ in range(500):
            sender.send(STATUSES)

    threads = [threading.Thread(target=send_many) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    sender.close()
    sender.send(STATUSES)
    sender.close()


def test_a_scheduler_whose_directory_is_gone_says_so(address: str) -> None:
    with pytest.raises(zmq.ZMQError):
        ReportSender(address.replace("/reports", "/gone/reports"))


def test_the_directory_is_the_users_alone_and_goes_with_the_process_that_made_it() -> None:
    done = subprocess.run([sys.executable, "-c", IN_A_PROCESS], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    directory, existed, mode = done.stdout.split()  # a forked child that ends does not remove it
    assert (existed, mode) == ("True", "0o700") and not Path(directory).exists()


@pytest.mark.parametrize("name", ["x" * 120, "\u00e4" * 60])
def test_a_long_directory_for_temporary_files_is_not_used(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / name).mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / name))
    address = new_report_address()
    path = Path(address.removeprefix("ipc://"))
    try:
        assert path.parent.parent == Path("/tmp") and stat.S_IMODE(path.parent.stat().st_mode) == 0o700
        assert not list((tmp_path / name).iterdir())
        sender = ReportSender(address)
        assert path.exists()
        sender.close()
    finally:
        for left in path.parent.iterdir():
            left.unlink()
        os.rmdir(path.parent)


def test_a_directory_that_cannot_be_locked_serves_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object) -> None:
        raise OSError("no locks on this file system")

    monkeypatch.setattr(fcntl, "flock", refused)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    (tmp_path / f"{reports._PREFIX}old").mkdir()
    os.utime(tmp_path / f"{reports._PREFIX}old", (0, 0))
    new_report_address()
    assert len(list(tmp_path.iterdir())) == 2, "nothing is removed that cannot be locked"


def test_the_directory_of_a_killed_process_and_no_other_goes_with_the_next_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = "import os, sys; from sglang_mm_conn.control import reports; " + (
        "print(reports.new_report_address(), flush=True); sys.stdin.read()"
    )
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    children = [
        subprocess.Popen([sys.executable, "-c", script], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        for _ in range(2)
    ]
    try:
        found = [child.stdout.readline().decode().strip() for child in children if child.stdout is not None]
        killed, lives = (Path(one.removeprefix("ipc://")).parent for one in found)
        other = tmp_path / "mm-conn-of-another-program"
        for path in (other, tmp_path / f"{reports._PREFIX}young"):
            path.mkdir()
        children[0].kill()
        children[0].wait()
        for path in (killed, lives, other):
            os.utime(path, (0, 0))
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
        new = Path(new_report_address().removeprefix("ipc://")).parent
        assert {path.name for path in tmp_path.iterdir()} == {
            lives.name, new.name, other.name, f"{reports._PREFIX}young",
        }  # fmt: skip
    finally:
        for child in children:
            child.kill()
            child.communicate()
