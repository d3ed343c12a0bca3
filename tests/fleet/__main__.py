"""``python -m tests.fleet``: whole sglang servers whose encoders end, freeze or lie, and what clients notice."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from rich.console import Console

from sglang_mm_conn.demo import tiny_models
from sglang_mm_conn.demo.chat import Answer
from sglang_mm_conn.demo.questions import Question
from sglang_mm_conn.demo.servers import ServerError, ServerGroup, stop_all
from sglang_mm_conn.memory.segment import sweep_stale_segments
from tests.connector.processes import ROOT
from tests.faults.table import RESULTS, write
from tests.fleet.fleet import Fleet, FleetError, Options, Story
from tests.fleet.load import CLIENTS
from tests.fleet.outcome import Goal, Outcome, in_markdown, on_terminal, summary
from tests.fleet.plan import SCENARIOS, Scenario
from tests.fleet.tally import Tally
from tests.servers.conftest import Reference, SharedGroups

DOCUMENT = RESULTS / "fleet.md"
MARKERS = ("<!-- fleet:begin -->", "<!-- fleet:end -->")
KIND = "qwen2_5_vl"
PATHS = ("shm", "mooncake")
WORK = ROOT / "build" / "fleet"


def arguments() -> argparse.ArgumentParser:
    scenarios = "\n".join(f"  {one.name:<16} {one.what}" for one in SCENARIOS)
    parser = argparse.ArgumentParser(
        prog="python -m tests.fleet",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description=f"""\
Starts whole sglang servers of a tiny model on the CPU: several encoders (--encoder-only) and a language server
(--language-only). {CLIENTS} clients ask all the while, texts and up to five images, and every answer is compared with
that of a colocated server. Meanwhile something is done to an encoder:

{scenarios}

Wanted: no question fails and no answer is wrong, but where no encoder is left; and what the table says of each.""",
        epilog="""\
examples:
  python -m tests.fleet                                  all of them: about an hour on two cores
  python -m tests.fleet --only kill-one                  one scenario: minutes
  python -m tests.fleet --only freeze --only all-killed  two of them; they share their servers
  python -m tests.fleet --only rolling-restart --requests 100 --seconds 3
                                                         a short look
  python -m tests.fleet --data-path mooncake             embeddings travel over Mooncake on this host, too
  python -m tests.fleet --only healthy --baseline ../older
                                                         beside the code of another checkout
  python -m tests.fleet --write                          the table goes into docs/results/fleet.md

Ends with 1 where a goal was missed; what failed, when and how often is printed, and the servers' logs are kept. All
servers end with it, however it ends. About 1 GB of memory for each server, of which there are up to six.""",
    )
    parser.add_argument(
        "--only", action="append", default=[], metavar="NAME", choices=[one.name for one in SCENARIOS],
        help="this scenario (repeat it for several; default: all)",
    )  # fmt: skip
    parser.add_argument("--data-path", choices=PATHS, default="shm", help="of the embeddings (default: %(default)s)")
    parser.add_argument(
        "--requests", type=int, default=1000, metavar="N",
        help="rolling-restart goes on until so many were asked; a turn of two that are compared has a share of them "
        "(default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--seconds", type=float, default=10.0, metavar="S",
        help="of load before and after what is done to an encoder (default: %(default)g)",
    )  # fmt: skip
    parser.add_argument(
        "--frozen", type=float, default=30.0, metavar="S",
        help="for how long an encoder is frozen, or its network cut (default: %(default)g)",
    )  # fmt: skip
    parser.add_argument("--baseline", type=Path, metavar="DIR", help="an older checkout, for the scenario healthy")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything, every question too, to FILE")
    parser.add_argument("--write", action="store_true", help="put the table into docs/results/fleet.md")
    return parser


@contextmanager
def fleet_of(options: Options, story: Story, logs: Path) -> Iterator[Fleet]:
    """Everything that a scenario needs; on exit no server is left."""
    with ExitStack() as stack:
        stack.callback(sweep_stale_segments)
        story.say("writing the model")
        model = tiny_models.write(KIND, WORK / "models" / KIND)
        answers = Answers(model, story)
        stack.callback(answers.stop)
        numbers = iter(range(1, 1000))
        groups = SharedGroups(lambda kind: model, lambda: logs / f"group-{next(numbers)}")
        stack.callback(groups.stop)

        def group(**of: object) -> ServerGroup:
            answers.stop()  # its memory and its cores are for those under test
            return groups(KIND, **of)

        def reset() -> None:
            answers.stop()
            groups.stop()

        yield Fleet(group, reset, answers, options, story, logs, model)


class Answers:
    """What a colocated server answers. It starts at a question that it was never asked, in any run with this model."""

    def __init__(self, model: Path, story: Story) -> None:
        self._model, self._story = model, story
        self._known: dict[Question, Answer] = {}
        self._reference: Reference | None = None

    def __call__(self, question: Question) -> Answer:
        if question not in self._known:
            if self._reference is None:
                self._reference = Reference(self._model, _answers_directory(self._model))
                self._story.say("right is what a colocated server answers, or answered in an earlier run")
            self._known[question] = self._reference.answer(question)
        return self._known[question]

    def stop(self) -> None:
        if self._reference is not None:
            stop_all(self._reference.servers)
        self._reference = None


def _answers_directory(model: Path) -> Path:
    """Of this model, by these versions of what computes."""
    stamp = "-".join((model.name, *map(importlib.metadata.version, ("sglang", "torch", "transformers"))))
    directory = WORK / "answers" / f"{stamp}-{tiny_models.VERSION}"
    directory.mkdir(parents=True, exist_ok=True)
    return directory


def play(chosen: Sequence[Scenario], fleet: Fleet) -> list[Outcome]:
    outcomes: list[Outcome] = []
    for scenario in chosen:
        fleet.story.event(f"== {scenario.name}: {scenario.what}")
        try:
            outcomes += scenario.run(fleet)
        except (ServerError, FleetError, OSError, AssertionError) as error:
            fleet.story.event(f"{scenario.name} was cut short: {error}")
            fleet.reset()
            words = " ".join(str(error).split())[:300]
            outcomes.append(
                Outcome(scenario.name, "", Tally(()), [Goal(f"cut short: {words}", "played to its end", False)])
            )
    return outcomes


def main() -> int:
    parser = arguments()
    options = parser.parse_args()
    chosen = [one for one in SCENARIOS if not options.only or one.name in options.only]
    if options.write and (options.only or options.data_path != "shm" or options.requests < 1000):
        parser.error("--write takes the whole table: leave --only, --data-path and --requests out")
    if options.seconds < 1 or options.frozen < 1 or options.requests < 0:
        parser.error("--seconds and --frozen: at least 1; --requests: at least 0")
    if options.baseline is not None and not (options.baseline / "sglang_mm_conn" / "__init__.py").exists():
        parser.error(f"--baseline {options.baseline}: no checkout of this project")
    console = Console(width=None if sys.stdout.isatty() else 200)
    logs = Path(tempfile.mkdtemp(prefix="mm-conn-fleet-"))
    began = time.monotonic()

    def show(text: str) -> None:
        console.print(f"{time.monotonic() - began:5.0f} s  {text}", markup=False, highlight=False)

    console.print(f"The servers' logs are in {logs}", highlight=False)
    given = Options(options.data_path, options.requests, options.seconds, options.frozen, options.baseline)
    with fleet_of(given, Story(show), logs) as fleet:
        outcomes = play(chosen, fleet)
    seconds = time.monotonic() - began
    sentence = summary(outcomes, seconds, options.data_path)
    console.print(on_terminal(outcomes))
    console.print(sentence, highlight=False)
    if options.json:
        told = {"summary": sentence, "seconds": round(seconds, 1), "outcomes": [one.as_json() for one in outcomes]}
        options.json.write_text(json.dumps(told, indent=1) + "\n")
    missed = [(one.scenario, goal) for one in outcomes for goal in one.missed]
    for name, goal in missed:
        console.print(f"MISSED: {name}: {goal}", style="red", markup=False)
    if options.write and not missed:
        write(in_markdown(outcomes, sentence), DOCUMENT, MARKERS)
        console.print(f"Written into {DOCUMENT}")
    console.print(f"Logs: {logs}", highlight=False)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
