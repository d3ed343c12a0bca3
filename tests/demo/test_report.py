"""The demo's outcome and its command line."""

import io
import subprocess
import sys

import pytest
from rich.console import Console

from sglang_mm_conn.__main__ import main
from sglang_mm_conn.demo.chat import Answer
from sglang_mm_conn.demo.questions import QUESTIONS
from sglang_mm_conn.demo.report import Outcome, print_report

GOOD = Answer(200, "abc", ("a", "b", "c"), "length")
LINE = (
    "Embedding received: room=r1 rid=demo-0 tokens={tokens} bytes=1 windows=1 resumes={resumes} "
    "path=shm ms=1.0 rate=1MB/s"
)


def report(split: Answer, log: str, first_offer: int | None) -> tuple[bool, str]:
    out = io.StringIO()
    outcomes = [Outcome(QUESTIONS[1], "demo-0", GOOD, split)]
    return print_report(Console(file=out, width=160), outcomes, log, first_offer), out.getvalue()


def test_equal_answers_and_a_resume_are_good() -> None:
    good, text = report(GOOD, LINE.format(tokens=168, resumes=4), 32)
    assert good
    assert "with 4 resumes" in text
    assert "one image" in text


@pytest.mark.parametrize(
    ("split", "log", "first_offer", "said"),
    [
        (Answer(200, "abd", ("a", "b", "d")), LINE.format(tokens=9, resumes=0), 32, "answers differ"),
        (Answer(502, error="encoder gone"), LINE.format(tokens=9, resumes=0), 32, "HTTP 502"),
        (GOOD, "", 32, "no embedding came through"),
        (GOOD, LINE.format(tokens=168, resumes=0), 32, "no transfer was resumed"),
    ],
)
def test_faults_are_named(split: Answer, log: str, first_offer: int | None, said: str) -> None:
    good, text = report(split, log, first_offer)
    assert not good
    assert said in text


@pytest.mark.parametrize(("tokens", "first_offer"), [(20, 32), (168, 0), (168, None)])
def test_no_resume_is_wanted_where_the_offer_is_large_enough(tokens: int, first_offer: int | None) -> None:
    assert report(GOOD, LINE.format(tokens=tokens, resumes=0), first_offer)[0]


def test_two_failures_are_not_the_same_answer() -> None:
    assert not Answer(500, error="x").same_as(Answer(500, error="x"))


def test_bad_option_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["demo", "--block-size", "0"])
    assert "--block-size: must be 1 or more, not 0" in capsys.readouterr().err


def test_help_imports_nothing_heavy() -> None:
    check = (
        "import sys, sglang_mm_conn.__main__ as m; m.parser().format_help();"
        "sys.exit(' '.join({'torch', 'transformers', 'requests', 'rich', 'numpy', 'sglang'} & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
