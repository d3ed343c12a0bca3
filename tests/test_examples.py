"""The examples run, show what they say, and are in their README."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / "examples"


def run(name: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, EXAMPLES / name],
        env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done


def test_one_embedding_arrives() -> None:
    assert run("transfer.py").stdout == "(200, 1024) arrived, {'modality': 'image'}\n"


def test_an_embedding_of_nearly_five_pools_needs_four_resumes_or_more() -> None:
    done = run("resume.py")
    assert done.stdout == "300 tokens arrived through a pool that holds 64\n"
    assert done.stderr.count("Resume transfer triggered: ") >= 4


def test_every_example_is_in_the_readme() -> None:
    text = (EXAMPLES / "README.md").read_text()
    assert all(f"python examples/{path.name}`" in text for path in EXAMPLES.glob("*.py"))
