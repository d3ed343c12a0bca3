"""The table says what was seen, and a missed goal cannot be overlooked."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace

import pytest

from tests.fleet import __main__ as command
from tests.fleet.outcome import (
    COLUMNS,
    Goal,
    Outcome,
    at_least,
    at_most,
    in_markdown,
    no_failure,
    no_wrong_answer,
    on_terminal,
    summary,
)
from tests.fleet.plan import SCENARIOS
from tests.fleet.scenarios.affinity import ALL, HITS, total
from tests.fleet.scenarios.poison import refused
from tests.fleet.tally import Reply, Tally

GOOD = Reply("q", 1, 0.0, 1.0, 200, True)
BAD = Reply("q", 1, 1.0, 2.0, 502, False, "lost | <it>")
WRONG = Reply("q", 1, 1.0, 2.0, 200, False)


def outcome(*replies: Reply, name: str = "kill-one") -> Outcome:
    tally = Tally(replies)
    return Outcome(name, "2 encoders", tally, [no_failure(tally), no_wrong_answer(tally)], ["one figure"])


def test_a_failed_or_wrong_answer_is_a_missed_goal() -> None:
    assert outcome(GOOD).verdict == "met" and not outcome(GOOD).missed
    assert [goal.seen for goal in outcome(GOOD, BAD).missed] == ["1 (1 HTTP 502) failed"]
    assert [goal.seen for goal in outcome(GOOD, WRONG).missed] == ["1 wrong"]


def test_limits_are_part_of_what_is_allowed() -> None:
    assert at_most("slowest", 2.0, 2.0).met and not at_most("slowest", 2.01, 2.0).met
    assert at_least("rate", 1.3, 1.3).met and not at_least("rate", 1.29, 1.3).met
    assert str(at_most("slowest", 2.0, 2.5)) == "slowest 2.00 s (wanted: at most 2.50 s)"


def test_every_outcome_has_a_row_of_all_columns() -> None:
    outcomes = [outcome(GOOD), outcome(GOOD, BAD), Outcome("network-cut", skipped="not root")]
    table = in_markdown(outcomes, "a sentence")
    lines = table.splitlines()
    assert lines[0] == "`python -m tests.fleet --write` printed this: a sentence"
    assert all(line.count("|") == len(COLUMNS) + 1 for line in lines[2:]) and len(lines) == 4 + len(outcomes)
    assert "MISSED: 1 (1 HTTP 502) failed" in lines[5] and "one figure" in lines[5]
    assert "not tried: not root" in lines[6]
    assert on_terminal(outcomes).row_count == 3


def test_the_sentence_counts_what_was_tried() -> None:
    said = summary([outcome(GOOD), outcome(GOOD, BAD, WRONG), Outcome("x", skipped="why")], 61.2, "shm")
    assert said.startswith("2 cases over shm in 61 s, 1 not tried: of 4 requests")
    assert "1 failed and 1 got a wrong answer. 2 goals missed." in said


def test_refusals_while_there_is_no_encoder_are_counted_apart() -> None:
    one = replace(outcome(GOOD, BAD), expected=1)
    assert one.cells()[3] == "1 (1 HTTP 502), 1 of them rightly"
    assert "0 failed (and 1 were refused at once while there was no encoder) and 0 got" in summary([one], 1.0, "shm")


def test_an_outcome_can_be_written_as_json() -> None:
    told = json.loads(json.dumps(outcome(GOOD, BAD).as_json()))
    assert told["verdict"] == "missed" and told["tally"]["replies"][1]["status"] == 502


def test_hits_are_summed_over_all_labels_of_a_counter() -> None:
    metrics = (
        f"# HELP {HITS} files\n# TYPE {HITS} counter\n"
        f'{HITS}{{dp_rank="0",modality="image"}} 41.0\n{HITS}{{dp_rank="1",modality="image"}} 1.0\n'
        f'{ALL}{{dp_rank="0",modality="image"}} 50.0\n{HITS}_created{{modality="image"}} 1.7e9\n'
    )
    assert total(metrics, HITS) == 42.0 and total(metrics, ALL) == 50.0 and total("", ALL) == 0.0


@pytest.mark.parametrize(
    ("status", "error", "met"),
    [(502, "3 encoders died of it", True), (502, "", False), (200, "3 encoders", False), (0, "reset by peer", False)],
)
def test_a_poisonous_request_must_end_in_an_error_that_says_so(status: int, error: str, met: bool) -> None:
    assert refused(Reply("poison", 1, 0.0, 1.0, status, False, error)).met is met


def test_names_of_scenarios_are_unique_and_the_help_tells_of_each() -> None:
    names = [one.name for one in SCENARIOS]
    assert len(set(names)) == len(names) and all(one.what for one in SCENARIOS)
    text = command.arguments().format_help()
    assert all(one.what in text for one in SCENARIOS)


def test_only_takes_names_of_scenarios_only(capsys: pytest.CaptureFixture[str]) -> None:
    parser = command.arguments()
    assert parser.parse_args(["--only", "freeze", "--only", "poison"]).only == ["freeze", "poison"]
    with pytest.raises(SystemExit):
        parser.parse_args(["--only", "nothing"])
    assert "nothing" in capsys.readouterr().err
    assert isinstance(parser, argparse.ArgumentParser)


def test_a_goal_says_what_was_wanted() -> None:
    assert str(Goal("5 wrong", "0", False)) == "5 wrong (wanted: 0)"
