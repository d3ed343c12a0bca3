"""Owns the `settings` command: every setting with its default, range and meaning, and what the environment says."""

import argparse
import os
import sys
from typing import Any

from sglang_mm_conn.core.errors import SettingError
from sglang_mm_conn.core.settings import Settings


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "settings",
        help="list the environment variables that encoders and language servers read",
        description="Lists every setting, its default, what is allowed, and marks those that the environment of this "
        "command sets. Exits with 1 where one of them has a value that a server would refuse.",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    for variable, default, allowed, meaning in Settings.describe():
        value = os.environ.get(variable)
        print(f"{variable}={value}   (set here)" if value else variable)
        print(f"    {meaning}")
        print(f"    {allowed}; default: {default}\n")
    print("Deadlines are sglang's own: SGLANG_ENCODER_RECV_TIMEOUT (language), SGLANG_ENCODER_SEND_TIMEOUT (encoder).")
    try:
        Settings.from_env(os.environ)
    except SettingError as error:
        print(error, file=sys.stderr)
        return 1
    return 0
