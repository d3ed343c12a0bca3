"""The drain command: what it prints, its exit status, its key, and how it waits."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from sglang_mm_conn.__main__ import main
from sglang_mm_conn.control.authentication import DeploymentKey, generate
from tests.control.draining_app import App, Threaded

KEY_FILE = "SGLANG_MM_CONN_KEY_FILE"


@pytest.fixture(autouse=True)
def no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(KEY_FILE, raising=False)
    monkeypatch.delenv("SGLANG_MM_CONN_INSECURE", raising=False)


@pytest.fixture
def encoder() -> Iterator[Threaded]:
    with Threaded(App()) as server:
        yield server


def test_an_encoder_is_told_to_drain_and_to_serve_again(encoder: Threaded, capsys: pytest.CaptureFixture[str]) -> None:
    encoder.app.draining.held = 1
    assert main(["drain", encoder.url]) == 0
    assert capsys.readouterr().out == f"{encoder.url} drains: it takes no new work and holds 1 request\n"
    assert main(["drain", encoder.url, "--undo"]) == 0
    assert capsys.readouterr().out == f"{encoder.url} takes new work again\n"
    assert not encoder.app.draining.refuses and encoder.app.notices == [True, False]


def test_waiting_shows_progress_and_ends_when_nothing_is_held(
    encoder: Threaded, capsys: pytest.CaptureFixture[str]
) -> None:
    draining = encoder.app.draining
    draining.held = 2
    timers = [threading.Timer(seconds, setattr, (draining, "held", held)) for seconds, held in ((0.7, 1), (1.4, 0))]
    for timer in timers:
        timer.start()
    assert main(["drain", encoder.url, "--wait", "20"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0].endswith("holds 2 requests") and out[-1] == f"{encoder.url} holds nothing any more"
    assert any(line.endswith("s: 1 request left") for line in out)
    for timer in timers:
        timer.join()


def test_waiting_in_vain_is_a_failure_that_says_what_is_left(
    encoder: Threaded, capsys: pytest.CaptureFixture[str]
) -> None:
    encoder.app.draining.held = 3
    assert main(["drain", encoder.url, "--wait", "0.5"]) == 1
    assert f"drain: {encoder.url} still holds 3 requests after 0.5 s" in capsys.readouterr().err


def test_waiting_for_an_order_that_is_undone_is_a_failure(
    encoder: Threaded, capsys: pytest.CaptureFixture[str]
) -> None:
    encoder.app.draining.held = 3
    timer = threading.Timer(0.6, lambda: encoder.app.draining.order(drain=False))
    timer.start()
    assert main(["drain", encoder.url, "--wait", "20"]) == 1
    assert "somebody has undone the order" in capsys.readouterr().err
    timer.join()


def test_with_a_key_the_command_needs_the_same_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = [str(tmp_path / name) for name in ("right", "wrong")]
    for path in paths:
        generate(path)
    with Threaded(App(DeploymentKey.load(paths[0]))) as server:
        for path in ("", paths[1], str(tmp_path / "missing")):
            monkeypatch.setenv(KEY_FILE, path)
            assert main(["drain", server.url]) == 1
            assert KEY_FILE in capsys.readouterr().err
        assert not server.app.draining.refuses
        monkeypatch.setenv(KEY_FILE, paths[0])
        assert main(["drain", server.url]) == 0
        assert server.app.draining.refuses


def test_errors_name_the_url_and_the_cause(capsys: pytest.CaptureFixture[str]) -> None:
    for url, cause in (
        ("http://127.0.0.1:1", "refused"),
        ("http://192.0.2.1:30001", "SGLANG_MM_CONN_KEY_FILE"),
        ("localhost:30001", "is not of the form http://host:port"),
    ):
        assert main(["drain", url]) == 1
        error = capsys.readouterr().err
        assert error.startswith("drain: ") and url in error and cause in error


@pytest.mark.parametrize(
    "arguments", [["--wait", "0"], ["--wait", "soon"], ["--wait", "5", "--undo"], ["--wait", "nan"]]
)
def test_arguments_that_make_no_sense_are_refused(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["drain", "http://127.0.0.1:1", *arguments])
    assert ended.value.code == 2


def test_help_says_how_it_is_used(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["drain", "--help"])
    out = capsys.readouterr().out
    for word in ("--undo", "--wait", KEY_FILE, "SGLANG_MM_CONN_DRAIN_SECONDS", "SIGTERM", "drain http://"):
        assert word in out
