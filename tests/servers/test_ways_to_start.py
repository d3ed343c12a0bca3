"""The ways in which users start servers, and sglang's features that they switch on, all on one encoder."""

import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import requests

from sglang_mm_conn.demo.chat import ask
from sglang_mm_conn.demo.images import Image
from sglang_mm_conn.demo.launch import Launch
from sglang_mm_conn.demo.questions import QUESTIONS, Question
from sglang_mm_conn.demo.servers import Server, free_port
from sglang_mm_conn.demo.timeline import received
from tests.servers.observe import cpu_seconds, report, wait_until

ENV = {
    "CPU_BED_FORBID_BUILTIN_TRANSPORT": "1",
    "SGLANG_MM_CONN_CHECKSUM": "1",
    "SGLANG_EMBEDDING_CACHE_BLOCK_SIZE": "16",
    "SGLANG_EMBEDDING_DEFAULT_ALLOCATE_BUFFER_SIZE": "10",
}
SGLANG_SERVE = (str(Path(sys.executable).with_name("sglang")), "serve")
ONE_IMAGE, SEVERAL = QUESTIONS[1], QUESTIONS[3]


@pytest.fixture(scope="module")
def encoder(
    tiny_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory, shared_group: Any
) -> Iterator[Server]:
    shared_group.stop()  # its idle schedulers would take the cores
    flags = ("--enable-prefix-mm-cache", "--enable-metrics")
    launch = Launch("encoder", tiny_model("qwen2_5_vl"), program=SGLANG_SERVE, flags=flags, env=ENV)
    with Server(launch, tmp_path_factory.mktemp("encoder")) as server:
        server.wait_ready()
        yield server


def _language(encoder: Server, directory: Path, **options: Any) -> Server:
    options = {"env": ENV, **options}
    return Server(Launch("language", encoder.launch.model, encoder_urls=(encoder.url,), **options), directory)


def _cache_hits(encoder: Server) -> float:
    """Embeddings that the encoder has taken from its prefix cache."""
    text = requests.get(f"{encoder.url}/metrics", timeout=10).text
    lines = [line for line in text.splitlines() if line.startswith("sglang:encoder_cache_hit_files_total{")]
    return sum(float(line.split()[-1]) for line in lines)


def test_overlap_chunked_prefill_adaptive_dispatch_and_encoder_cache_and_profiler(
    encoder: Server, reference: Callable[..., Any], tmp_path: Path
) -> None:
    right = [reference("qwen2_5_vl").answer(question) for question in QUESTIONS]
    flags = ("--chunked-prefill-size", "64", "--enable-adaptive-dispatch-to-encoder")
    with _language(encoder, tmp_path, overlap=True, flags=flags) as language:
        language.wait_ready()
        for question, expected in zip(QUESTIONS, right, strict=True):
            answer = ask(language.url, question)
            assert answer.same_as(expected), (question.name, answer, expected)
        with ThreadPoolExecutor(4) as clients:
            for answer, expected in zip(clients.map(lambda one: ask(language.url, one), QUESTIONS), right, strict=True):
                assert answer.same_as(expected), (answer, expected)
        several = [question for question in QUESTIONS if len(question.images) > 1]
        assert len(received(language.log())) == 2 * len(several), "single images stay on the language server"

        hits = _cache_hits(encoder)
        assert ask(language.url, SEVERAL).same_as(right[QUESTIONS.index(SEVERAL)])
        assert _cache_hits(encoder) > hits, "a cached embedding is sent again"
        assert len(received(language.log())) == 2 * len(several) + 1

        for route, body in (("start_profile", {"output_dir": str(tmp_path)}), ("stop_profile", None)):
            said = requests.post(f"{encoder.url}/{route}", json=body, timeout=60)
            assert said.status_code == 200, (route, said.text)
            assert ask(language.url, SEVERAL).same_as(right[QUESTIONS.index(SEVERAL)])
        assert list(tmp_path.glob("**/*.trace.json*"))
        assert encoder.ready(), "its health check encodes an image"


def test_an_idle_scheduler_sleeps_while_a_request_waits_for_its_embedding(
    encoder: Server, reference: Callable[..., Any], tmp_path: Path
) -> None:
    """sglang's own would spin: a core's time for as long as the embedding takes."""
    right = reference("qwen2_5_vl").answer(ONE_IMAGE)
    env = {**ENV, "SGLANG_MM_CONN_PEER_TIMEOUT_SECONDS": "120"}  # a frozen encoder is not lost
    with _language(encoder, tmp_path, overlap=True, env=env) as language, ThreadPoolExecutor(1) as client:
        language.wait_ready()
        for server in (encoder, language):
            assert "MiB of freed memory may stay in the heap" in server.log(), server.name
        assert ask(language.url, ONE_IMAGE).same_as(right)
        encoder.signal(signal.SIGSTOP)
        try:
            answer = client.submit(ask, language.url, ONE_IMAGE)
            wait_until(lambda: bool(report(language)["rooms"]), "the request waits", 30)
            before = cpu_seconds(language)
            time.sleep(2)
            spent = cpu_seconds(language) - before
        finally:
            encoder.signal(signal.SIGCONT)
        assert answer.result().same_as(right)
    assert spent < 1.0, f"{spent:.2f} s of processor time in 2 s of waiting"


def test_engine_in_a_python_program(encoder: Server, reference: Callable[..., Any], tmp_path: Path) -> None:
    launch = Launch("language", encoder.launch.model, encoder_urls=(encoder.url,), env=ENV)
    program = tmp_path / "engine.py"
    program.write_text(
        "import sglang\n"
        "from sglang_mm_conn.demo.images import Image\n"
        "if __name__ == '__main__':\n"
        "    engine = sglang.Engine(\n"
        f"        model_path={str(encoder.launch.model)!r}, language_only=True, encoder_urls=[{encoder.url!r}],\n"
        "        disaggregation_transfer_backend='conn_multimodal',\n"
        f"        encoder_bootstrap_port={free_port()}, log_level='info',\n"
        "        device='cpu', dtype='float32', attention_backend='torch_native', sampling_backend='pytorch',\n"
        "        grammar_backend='none', disable_cuda_graph=True, max_total_tokens=4096, context_length=2048,\n"
        "    )\n"
        "    prompt = ('<|im_start|>user\\n<|vision_start|><|image_pad|><|vision_end|>what is this?<|im_end|>\\n'\n"
        "              '<|im_start|>assistant\\n')\n"
        "    greedy = {'temperature': 0, 'max_new_tokens': 24, 'ignore_eos': True}\n"
        "    answer = engine.generate(prompt, greedy, image_data=Image(seed=1).data_uri())\n"
        "    print('ANSWER', repr(answer['text']), flush=True)\n"
        "    engine.shutdown()\n"
    )
    run = subprocess.run(
        [sys.executable, program],
        env=launch.environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert f"ANSWER {reference('qwen2_5_vl').answer(ONE_IMAGE).text!r}" in run.stdout, run.stdout[-4000:]
    assert len(received(run.stdout)) == 1


def test_several_tokenizer_workers_and_batches_on_the_encoder(
    encoder: Server, reference: Callable[..., Any], tmp_path: Path
) -> None:
    """Last: it kills the encoder."""
    concurrent = [Question(f"concurrent {seed}", "what is this?", (Image(seed, 168, 140),)) for seed in range(40, 52)]
    right = [reference("qwen2_5_vl").answer(question) for question in (*concurrent, *QUESTIONS)]
    flags = ("--tokenizer-worker-num", "2")
    with _language(encoder, tmp_path, program=SGLANG_SERVE, overlap=True, flags=flags) as language:
        language.wait_ready()
        with ThreadPoolExecutor(8) as clients:
            encoder.signal(signal.SIGSTOP)  # until several wait for it: alone it may be quick enough to make no batch
            try:
                asked = [clients.submit(ask, language.url, question) for question in (*concurrent, *QUESTIONS)]
                wait_until(lambda: sum(report(language)["rooms"].values()) >= 6, "six requests wait", 8)
            finally:
                encoder.signal(signal.SIGCONT)
            answers = [answer.result() for answer in asked]
        for answer, expected in zip(answers, right, strict=True):
            assert answer.same_as(expected), (answer, expected)
        assert "requests completed in" in encoder.log(), "the encoder made no batches"
        started = "Start multi-tokenizer worker process"  # the server answers as soon as one has
        wait_until(lambda: language.log().count(started) == 2, "two tokenizer workers", 60)

        encoder.signal(signal.SIGKILL)
        for _ in range(4):  # whichever worker has the request
            assert ask(language.url, ONE_IMAGE).status == 503
        assert ask(language.url, QUESTIONS[0]).same_as(right[len(concurrent)]), "the language server lives on"
