"""Owns the comparison of two programs that use ``sglang.Engine``, and that program: ``python -m tests.parity.engine``.

It asks every form of the group "Engine", and prints one line of JSON for each.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from sglang_mm_conn.demo import tiny_models
from sglang_mm_conn.demo.launch import Launch
from sglang_mm_conn.demo.servers import Server, free_port, wait_ready
from tests.parity.compare import Compared, statuses
from tests.parity.files import Files
from tests.parity.form import GREEDY, Form, uncached
from tests.parity.pictures import ALL as MEDIA
from tests.parity.replies import Reply, difference, lasting, unfit_cause

_MARK = "PARITY "
_SECONDS = 600.0


class EngineClient:
    """Asks an ``sglang.Engine``.

    Attributes:
        engine: it.
        model: the directory of its model.
        hidden: values of an embedding's row.
        files: media that a request may name.
    """

    def __init__(self, engine: Any, model: Path, files: Files) -> None:
        self.engine, self.model, self.files = engine, model, files
        self.hidden = tiny_models.HIDDEN

    def generate(
        self, text: Any, images: Any = None, *, sampling: Any = None, stream: bool = False, **more: Any
    ) -> Any:
        found = self.engine.generate(text, {**GREEDY, **(sampling or {})}, image_data=images, stream=stream, **more)
        if not stream:
            return found
        newest: dict[int, Any] = {}
        for chunk in found:
            newest[chunk.get("index", 0)] = chunk
        return [newest[index] for index in sorted(newest)]

    def run(self, ask: Callable[[EngineClient], Any]) -> Any:
        return self.engine.loop.run_until_complete(ask(self))


def replied(ask: Callable[[EngineClient], Any], client: EngineClient) -> Reply:
    """The answer as a reply; an exception is a status."""
    try:
        client.engine.flush_cache()
        return Reply(200, lasting(uncached(ask(client))))
    except ValueError as error:
        return Reply(400, cause=str(error) or type(error).__name__)
    except Exception as error:
        return Reply(getattr(error, "status_code", 500), cause=str(getattr(error, "detail", error)))


def compare_engines(forms: Sequence[Form], model: Path, logs: Path, data_path: str) -> Iterator[Compared]:
    """Run the program twice: colocated, and with an encoder server."""
    metadata = {"CPU_BED_MEDIA_METADATA": "1"}  # of videos that a program processes by itself: as of those of encoders
    env = {"CPU_BED_FORBID_BUILTIN_TRANSPORT": "1", "SGLANG_MM_CONN_DATA_PATH": data_path}
    began = time.monotonic()
    there = _program(Launch("colocated", model, env=metadata), logs / "engine-colocated.log")
    with Server(Launch("encoder", model, env=env), logs) as encoder:
        wait_ready([encoder])
        here = _program(Launch("language", model, env={**env, **metadata}), logs / "engine.log", encoder.url)
    seconds = (time.monotonic() - began) / max(len(forms), 1)
    for form in forms:
        mine, theirs = here.get(form.name, _NONE), there.get(form.name, _NONE)
        found = difference(mine, theirs) or unfit_cause(mine, theirs) or ("" if mine.status else mine.cause)
        yield Compared(form, statuses(theirs), statuses(mine), found, seconds)


_NONE = Reply(0, cause="the program ended before it")


def _program(launch: Launch, log: Path, encoder_url: str = "") -> dict[str, Reply]:
    command = [sys.executable, "-m", "tests.parity.engine", str(launch.model), str(log.parent / "media"), encoder_url]
    run = subprocess.run(
        command, env=launch.environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        timeout=_SECONDS, check=False,
    )  # fmt: skip
    log.parent.mkdir(parents=True, exist_ok=True)
    log.write_text(run.stdout)
    found = [json.loads(line[len(_MARK) :]) for line in run.stdout.splitlines() if line.startswith(_MARK)]
    return {one.pop("name"): Reply(**one) for one in found}


def main() -> None:
    import sglang

    from tests.parity.forms.engine import ALL

    parser = argparse.ArgumentParser(prog="python -m tests.parity.engine", description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("media", type=Path, help="directory for the media of requests")
    parser.add_argument("encoder_url", nargs="?", default="", help="none: colocated")
    options = parser.parse_args()
    encoders = {
        "language_only": True, "encoder_urls": [options.encoder_url], "encoder_bootstrap_port": free_port(),
        "disaggregation_transfer_backend": "conn_multimodal",
    } if options.encoder_url else {}  # fmt: skip
    engine = sglang.Engine(
        model_path=str(options.model), device="cpu", dtype="float32", attention_backend="torch_native",
        sampling_backend="pytorch", grammar_backend="none", disable_cuda_graph=True, max_total_tokens=4096,
        context_length=2048, disable_overlap_schedule=True, enable_return_hidden_states=True, random_seed=1,
        sleep_on_idle=True, log_level="info", port=free_port(), **encoders,
    )  # fmt: skip
    with Files(options.media, MEDIA) as files:
        client = EngineClient(engine, options.model, files)
        kind = json.loads((options.model / tiny_models.STAMP).read_text())["kind"]
        for form in [one for one in ALL if not one.kinds or kind in one.kinds]:
            reply = replied(form.ask, client)
            line = {"name": form.name, "status": reply.status, "content": reply.content, "cause": reply.cause}
            sys.stdout.write(f"{_MARK}{json.dumps(line)}\n")
            sys.stdout.flush()
    engine.shutdown()


if __name__ == "__main__":
    main()
