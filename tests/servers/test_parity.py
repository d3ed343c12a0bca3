"""Each form of request is answered as a colocated sglang answers it (`make parity` asks all models, over all paths)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.parity.all_forms import FORMS
from tests.parity.compare import Compared, compare
from tests.parity.deployments import SERVERS, Pair, pair
from tests.parity.engine import compare_engines
from tests.parity.files import Files
from tests.parity.form import Form
from tests.parity.lora import write_adapter
from tests.parity.pictures import ALL as MEDIA

KIND = "qwen2_5_vl"
OF_KIND = sorted(
    (form for form in FORMS if not form.kinds or KIND in form.kinds), key=lambda form: list(SERVERS).index(form.servers)
)
OVER_HTTP = [form for form in OF_KIND if form.servers != "engine"]
OF_ENGINE = [form for form in OF_KIND if form.servers == "engine"]


def named(form: Form) -> str:
    return f"{form.group}: {form.name}"


@pytest.fixture(scope="module")
def running(
    tiny_model: Callable[[str], Path],
    shared_group: object,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Callable[[str], Pair]]:
    """Name in SERVERS -> the two deployments. One pair runs at a time."""
    shared_group.stop()  # type: ignore[attr-defined]  # its idle schedulers would take the cores
    current: list[tuple[str, Pair]] = []
    with ExitStack() as stack:

        def start(servers: str) -> Pair:
            if not current or current[-1][0] != servers or not all(one.alive for one in current[-1][1].servers):
                stack.pop_all().close()
                logs, model = tmp_path_factory.mktemp("parity"), tiny_model(KIND)
                lora = str(write_adapter(model, logs / "adapter")) if servers == "lora" else ""
                current.append((servers, stack.enter_context(pair(KIND, servers, model, logs, lora=lora))))
            return current[-1][1]

        yield start


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Files]:
    with Files(tmp_path_factory.mktemp("media"), MEDIA) as made:
        yield made


@pytest.fixture(scope="module")
def engines(tiny_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Compared]:
    found = compare_engines(OF_ENGINE, tiny_model(KIND), tmp_path_factory.mktemp("engines"), "shm")
    return {one.form.name: one for one in found}


@pytest.mark.parametrize("form", OVER_HTTP, ids=named)
def test_a_request_is_answered_as_colocated(form: Form, running: Callable[[str], Pair], files: Files) -> None:
    compared = compare(form, running(form.servers), files)
    assert compared.ok, compared.difference


@pytest.mark.parametrize("form", OF_ENGINE, ids=named)
def test_a_program_that_uses_an_engine_gets_the_answers_of_a_colocated_one(
    form: Form, engines: dict[str, Compared]
) -> None:
    assert engines[form.name].ok, engines[form.name].difference
