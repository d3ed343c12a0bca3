"""Servers on two hosts as docs/deployments.md writes it. A host is a network namespace with a /dev/shm of its own."""

import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path
from shutil import copy
from typing import Any

import pytest

from sglang_mm_conn.control.authentication import generate
from sglang_mm_conn.demo.chat import Answer, ask
from sglang_mm_conn.demo.questions import QUESTIONS, Question
from sglang_mm_conn.demo.timeline import received
from tests.connector.worker_process import enter_network
from tests.faults.network import Cable, why_impossible
from tests.servers.doc_commands import block, on_a_cpu, running, wait_for, wait_healthy

_WHY_NOT = why_impossible()
pytestmark = pytest.mark.skipif(bool(_WHY_NOT), reason=_WHY_NOT)

ENCODER, LANGUAGE = "http://10.0.0.1:30001", "http://10.0.0.2:30000"
KEY = "mm-conn.key"


class Hosts:
    """10.0.0.1 and 10.0.0.2: what runs there has the host's directory as its own."""

    def __init__(self, cable: Cable, directory: Path, model: Path) -> None:
        self._near, self._far = cable.sides
        self._model = model
        self.encoder_log = directory / "encoder" / "server.log"
        self.language_log = directory / "language" / "server.log"
        for log in (self.encoder_log, self.language_log):
            log.parent.mkdir()
        self._client = ThreadPoolExecutor(1, initializer=enter_network, initargs=(self._near.path,))

    def encoder(self) -> AbstractContextManager[None]:
        script = on_a_cpu(block("key") + block("host of the encoder"), self._model)
        return running(script, self.encoder_log, within=self._near.as_host)

    def language(self) -> AbstractContextManager[None]:
        # The one thing that is changed: an idle scheduler takes a core.
        commands = block("host of the language server").replace("--language-only", "--language-only --sleep-on-idle")
        return running(on_a_cpu(commands, self._model), self.language_log, within=self._far.as_host)

    def wait_healthy(self, url: str) -> None:
        log = self.encoder_log if url == ENCODER else self.language_log
        self._client.submit(wait_healthy, url, log).result()

    def ask(self, question: Question) -> Answer:
        """From the encoder's host: the answer comes over the cable, too."""
        return self._client.submit(ask, LANGUAGE, question).result()


@pytest.fixture
def hosts(tiny_model: Callable[[str], Path], shared_group: Any, tmp_path: Path) -> Iterator[Hosts]:
    shared_group.stop()
    cable = Cable("10.0.0")
    try:
        hosts = Hosts(cable, tmp_path, tiny_model("qwen2_5_vl"))
        with hosts.encoder():
            hosts.wait_healthy(ENCODER)
            yield hosts
    finally:
        cable.close()


def test_two_hosts_serve_as_it_is_written(hosts: Hosts, reference: Callable[..., Any]) -> None:
    copy(hosts.encoder_log.parent / KEY, hosts.language_log.parent / KEY)
    with hosts.language():
        hosts.wait_healthy(LANGUAGE)
        wait_for("registered with process", hosts.language_log)
        for question in QUESTIONS:
            got = hosts.ask(question)
            assert got.same_as(reference("qwen2_5_vl").answer(question)), (question.name, got)
        said = hosts.language_log.read_text()
    assert re.search(r"Mooncake session 10\.0\.0\.2:\d+: 4 regions registered", said)
    rooms = received(said)
    assert len(rooms) == sum(bool(question.images) for question in QUESTIONS)
    assert {room.path for room in rooms} == {"mooncake"} and "path=shm" not in said + hosts.encoder_log.read_text()


def test_a_language_server_with_another_key_is_refused_in_the_words_of_the_page(hosts: Hosts) -> None:
    generate(str(hosts.language_log.parent / KEY))
    with hosts.language():
        hosts.wait_healthy(LANGUAGE)
        assert hosts.ask(QUESTIONS[0]).ok
        failed = hosts.ask(QUESTIONS[1])
    refused = "wants this deployment's key"
    assert failed.status == 503 and "no encoder is available" in failed.error, failed
    assert refused in hosts.language_log.read_text() and "Embedding received" not in hosts.language_log.read_text()
    assert "its look-up proves no key" in hosts.encoder_log.read_text()
