"""Owns the command line `python -m sglang_mm_conn`: finds the subcommand and runs it."""

import argparse
import sys
from collections.abc import Sequence

from sglang_mm_conn.bench import command as bench
from sglang_mm_conn.cli import drain, keygen, rates, settings
from sglang_mm_conn.core.settings import Settings
from sglang_mm_conn.demo import command as demo

# Each has add_parser(subparsers), which sets the default `run`: from the parsed arguments to the exit status.
# Their modules must import nothing heavy at the top, so that --help answers at once.
COMMANDS = (demo, bench, settings, keygen, drain, rates)


def _settings_text() -> str:
    lines = ["settings of both servers (environment variables; the settings command checks them):"]
    for variable, default, allowed, meaning in Settings.describe():
        lines += [f"  {variable}  ({allowed}; default: {default})", f"      {meaning}"]
    return "\n".join(lines)


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="python -m sglang_mm_conn",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Moves multimodal embeddings from an sglang encoder server to a language server.\nThe servers are "
        "sglang's own: give both --disaggregation-transfer-backend conn_multimodal.",
        epilog=_settings_text(),
    )
    subparsers = top.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in COMMANDS:
        command.add_parser(subparsers)
    return top


def main(arguments: Sequence[str] | None = None) -> int:
    args = parser().parse_args(arguments)
    status: int = args.run(args)
    return status


if __name__ == "__main__":
    sys.exit(main())
