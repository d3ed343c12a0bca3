"""Owns the `keygen` command: makes the secret that the servers of one deployment share."""

import argparse
import sys
from typing import Any


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "keygen",
        help="make the secret that secures the control connections of a deployment",
        description="Writes a new random secret to FILE, readable by its owner only. Copy it to every encoder and "
        "language server of the deployment and name it there in SGLANG_MM_CONN_KEY_FILE. A file that exists is not "
        "replaced.",
    )
    parser.add_argument("file", metavar="FILE", help="where to write the secret")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from sglang_mm_conn.control.authentication import generate

    try:
        generate(args.file)
    except OSError as error:
        print(f"keygen: {args.file}: {error.strerror}", file=sys.stderr)
        return 1
    print(f"wrote {args.file}: copy it to every server and set SGLANG_MM_CONN_KEY_FILE to its path there")
    return 0
