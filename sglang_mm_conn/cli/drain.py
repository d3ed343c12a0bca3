"""Owns the `drain` command: tells an encoder to take no new work, or to take it again, and waits until it is idle."""

from __future__ import annotations

import argparse
import os
import sys
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sglang_mm_conn.control.authentication import DeploymentKey

_POLL_SECONDS = 0.25
_PRINT_SECONDS = 5.0


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "drain",
        help="let an encoder finish what it holds and take no new work, before it is stopped or restarted",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Tells the encoder at URL to refuse new work. Language servers are told at once and send their\n"
        "images to other encoders; what the encoder holds is finished. Its process goes on and can be given\n"
        "work again with --undo. (SIGTERM drains too, and then ends the process: see SGLANG_MM_CONN_DRAIN_SECONDS.)",
        epilog="With a deployment key, set SGLANG_MM_CONN_KEY_FILE here as on the servers. Without one, run this on\n"
        "the encoder's host with its loopback address.\n\n"
        "  python -m sglang_mm_conn drain http://127.0.0.1:30001 --wait 60 && kill PID\n"
        "  python -m sglang_mm_conn drain http://127.0.0.1:30001 --undo\n\n"
        "Exits with 0 when the encoder has done what it was told, with 1 when it has not.",
    )
    parser.add_argument("url", metavar="URL", help="the encoder's, as in --encoder-urls: http://host:port")
    either = parser.add_mutually_exclusive_group()
    either.add_argument("--undo", action="store_true", help="let the encoder take new work again")
    either.add_argument(
        "--wait", type=_seconds, metavar="SECONDS", help="wait until the encoder holds no request, at most so long"
    )
    parser.set_defaults(run=run)


def _seconds(text: str) -> float:
    value = float(text)
    if not 0 < value <= 86400:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 86400 seconds")
    return value


def run(args: argparse.Namespace) -> int:
    from sglang_mm_conn.control.authentication import DeploymentKey
    from sglang_mm_conn.control.draining import order
    from sglang_mm_conn.core.errors import ConnError
    from sglang_mm_conn.core.settings import Settings

    try:
        settings = Settings.from_env(os.environ)
        key = None if settings.key_file is None else DeploymentKey.load(settings.key_file)
        status = order(args.url, key, drain=not args.undo, insecure=settings.insecure)
        if args.undo:
            print(f"{args.url} takes new work again")
            return 0
        print(f"{args.url} drains: it takes no new work and holds {_requests(status.held)}", flush=True)
        if args.wait is None or _is_idle(args.url, key, status.held, args.wait, insecure=settings.insecure):
            return 0
    except ConnError as error:
        print(f"drain: {error}", file=sys.stderr)
    return 1


def _is_idle(url: str, key: DeploymentKey | None, held: int, seconds: float, *, insecure: bool) -> bool:
    """Wait, and print how the number of requests falls."""
    from sglang_mm_conn.control.draining import ask_status

    began = said = time.monotonic()
    while held:
        time.sleep(_POLL_SECONDS)
        before, status = held, ask_status(url, key, insecure=insecure)
        held, now = status.held, time.monotonic()
        if not status.draining:
            print(f"drain: {url} takes new work again: somebody has undone the order", file=sys.stderr)
            return False
        if held and now - began >= seconds:
            print(f"drain: {url} still holds {_requests(held)} after {seconds:g} s", file=sys.stderr)
            return False
        if held != before or now - said >= _PRINT_SECONDS:
            said = now
            print(f"{now - began:.1f} s: {_requests(held)} left", flush=True)
    print(f"{url} holds nothing any more")
    return True


def _requests(count: int) -> str:
    return f"{count} request{'' if count == 1 else 's'}"
