"""Reads the pages of docs/: the blocks of shell commands, and the sglang command lines in them."""

import re
import shlex
from pathlib import Path

ROOT = Path(__file__).parent.parent
DEPLOYMENTS = ROOT / "docs" / "deployments.md"
_BLOCK = re.compile(r"^(?:<!-- run: (?P<name>[^\n]*) -->\n)?```sh\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL)


def shell_blocks(page: str) -> list[str]:
    return [match["text"] for match in _BLOCK.finditer(page)]


def named_block(page: str, name: str) -> str:
    """The block below the line `<!-- run: name -->`."""
    found = [match["text"] for match in _BLOCK.finditer(page) if match["name"] == name]
    if len(found) != 1:
        raise ValueError(f"{len(found)} blocks are named {name!r}")
    return found[0]


def sglang_commands(block: str) -> list[list[str]]:
    """The arguments of every `sglang serve` in a block, without what starts it and what the shell takes."""
    commands = []
    for line in block.replace("\\\n", " ").splitlines():
        _, serve, arguments = line.partition("sglang serve ")
        if serve:
            commands.append(shlex.split(arguments.strip().removesuffix("&")))
    return commands
