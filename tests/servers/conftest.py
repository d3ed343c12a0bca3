"""Real sglang servers for tests: the answers of colocated servers to compare with, and groups joined by a connector.

Everything below tests/servers is marked `servers`. Nothing starts before a test asks for it.
"""

import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pytest

from sglang_mm_conn.demo import tiny_models
from sglang_mm_conn.demo.chat import Answer, ask
from sglang_mm_conn.demo.launch import Launch
from sglang_mm_conn.demo.questions import Question
from sglang_mm_conn.demo.servers import Server, ServerGroup, stop_all

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.servers)


@dataclass
class Reference:
    """What a colocated server of one model answers. It starts at the first question that is not in the cache."""

    model: Path
    directory: Path  # logs and cached answers
    env: dict[str, str] = field(default_factory=dict)
    _server: Server | None = field(default=None, repr=False)

    def answer(self, question: Question) -> Answer:
        # The name says what a question is for, not what is asked.
        asked = json.dumps({**asdict(question), "name": ""}, sort_keys=True)
        cached = self.directory / f"{hashlib.sha256(asked.encode()).hexdigest()[:24]}.json"
        if not cached.exists():
            answer = ask(self._running().url, question)
            assert answer.ok, f"the colocated server refused {question.name!r}: {answer}"
            cached.write_text(json.dumps(asdict(answer)))
        stored = json.loads(cached.read_text())
        return Answer(**{**stored, "tokens": tuple(stored["tokens"])})

    @property
    def servers(self) -> list[Server]:
        return [self._server] if self._server else []

    def _running(self) -> Server:
        if self._server is None:
            # An idle scheduler spins otherwise, and takes a core from the servers under test.
            launch = Launch("colocated", self.model, flags=("--sleep-on-idle",), env=self.env)
            self._server = Server(launch, self.directory, name=f"colocated-{self.model.name}")
            self._server.start()
            self._server.wait_ready()
        return self._server


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Model kind -> its directory, written once."""
    root = tmp_path_factory.mktemp("models")
    return lambda kind: tiny_models.write(kind, root / kind)


@pytest.fixture(scope="session")
def reference(
    tiny_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[[str], Reference]]:
    """(model kind, environment of the server) -> the answers to compare with."""
    root = tmp_path_factory.mktemp("reference")
    references: dict[str, Reference] = {}

    def of(kind: str, **env: str) -> Reference:
        name = "-".join((kind, *sorted(env)))
        if name not in references:
            (root / name).mkdir()
            references[name] = Reference(tiny_model(kind), root / name, env)
        return references[name]

    with ExitStack() as stack:
        stack.callback(lambda: stop_all([server for one in references.values() for server in one.servers]))
        yield of


StartGroup = Callable[..., ServerGroup]


class SharedGroups:
    """(kind, **options of ServerGroup) -> a running group, the same one for as long as the same options are asked for.

    One group runs at a time: other options stop the one before. For tests that leave the servers as they found them.
    """

    def __init__(self, tiny_model: Callable[[str], Path], new_directory: Callable[[], Path]) -> None:
        self._tiny_model = tiny_model
        self._new_directory = new_directory
        self._running: dict[str, ServerGroup] = {}

    def __call__(self, kind: str, **options: Any) -> ServerGroup:
        key = json.dumps([kind, options], sort_keys=True, default=str)
        if key not in self._running or not all(server.alive for server in self._running[key].servers):
            self.stop()
            group = ServerGroup(self._tiny_model(kind), self._new_directory(), **options)
            self._running[key] = group.__enter__()
        return self._running[key]

    def stop(self) -> None:
        for group in self._running.values():
            group.stop()
        self._running.clear()


@pytest.fixture(scope="session")
def shared_group(tiny_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[SharedGroups]:
    groups = SharedGroups(tiny_model, lambda: tmp_path_factory.mktemp("group"))
    yield groups
    groups.stop()


@pytest.fixture
def new_group(tiny_model: Callable[[str], Path], tmp_path: Path, shared_group: SharedGroups) -> Iterator[StartGroup]:
    """(kind, **options of ServerGroup) -> a group of this test's own, to be killed, frozen or starved at will."""
    shared_group.stop()  # its idle schedulers would take the cores
    with ExitStack() as stack:
        count = 0

        def start(kind: str, **options: Any) -> ServerGroup:
            nonlocal count
            count += 1
            return stack.enter_context(ServerGroup(tiny_model(kind), tmp_path / f"group-{count}", **options))

        yield start
