"""A server that cannot do what the flag says refuses to start and says why: never half-hooked, never silently stock."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from sglang_mm_conn.demo.launch import Launch, Role
from sglang_mm_conn.demo.servers import free_port


def _start_and_fail(model: Path, *flags: str, role: Role = "encoder", env: dict[str, str] | None = None) -> str:
    """Start a server that must refuse; returns everything it printed."""
    launch = Launch(role, model, flags=flags, env=env or {}, encoder_urls=("http://127.0.0.1:1",))
    run = subprocess.run(
        launch.command(free_port(), free_port()),
        env=launch.environment(), capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    output = run.stdout + run.stderr
    assert run.returncode != 0, output[-2000:]
    assert "fired up" not in output
    return output


@pytest.mark.parametrize("builtin", ["zmq_to_scheduler", "mooncake"])
def test_a_contradicting_encoder_transfer_backend_is_refused_naming_both_flags(
    builtin: str, tiny_model: Callable[[str], Path]
) -> None:
    output = _start_and_fail(tiny_model("qwen2_5_vl"), "--encoder-transfer-backend", builtin)
    assert f"--encoder-transfer-backend {builtin}" in output
    assert "--disaggregation-transfer-backend conn_multimodal" in output


def test_a_bad_setting_is_refused_before_the_model_is_loaded(tiny_model: Callable[[str], Path]) -> None:
    output = _start_and_fail(tiny_model("qwen2_5_vl"), env={"SGLANG_MM_CONN_DATA_PATH": "carrier-pigeon"})
    assert "SGLANG_MM_CONN_DATA_PATH='carrier-pigeon' is not allowed: must be one of auto, shm, mooncake" in output


def test_what_is_untested_is_refused_naming_the_option(tiny_model: Callable[[str], Path]) -> None:
    output = _start_and_fail(tiny_model("qwen2_5_vl"), "--tp", "2", "--dp-size", "2")
    assert "does not support --tp-size 2 together with --dp-size 2 yet" in output and "conn_multimodal" in output


def test_a_hook_that_does_not_match_stops_the_server_naming_the_version_that_fits(
    tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    """An sglang with another parameter in a hooked function: a sitecustomize replaces the function."""
    (tmp_path / "sitecustomize.py").write_text(
        "import sys, importlib.abc, importlib.machinery\n"
        "NAME = 'sglang.srt.disaggregation.encoder.runtime'\n"
        "class Finder(importlib.abc.MetaPathFinder):\n"
        "    def find_spec(self, name, path, target=None):\n"
        "        if name != NAME:\n"
        "            return None\n"
        "        sys.meta_path.remove(self)\n"
        "        spec = importlib.machinery.PathFinder.find_spec(name, path, target)\n"
        "        run = spec.loader.exec_module\n"
        "        def exec_module(module):\n"
        "            run(module)\n"
        "            async def push(enc, something_else): ...\n"
        "            module._push_embedding_to_prefill = push\n"
        "        spec.loader.exec_module = exec_module\n"
        "        return spec\n"
        "sys.meta_path.insert(0, Finder())\n"
    )
    output = _start_and_fail(tiny_model("qwen2_5_vl"), env={"PYTHONPATH": str(tmp_path)})
    assert "_push_embedding_to_prefill has no parameter request" in output
    assert "supports sglang 0.5.23" in output


def test_without_the_flag_the_plugin_hooks_nothing() -> None:
    code = (
        "from sglang.srt.plugins import load_plugins\n"
        "load_plugins()\n"
        "from sglang.srt.plugins.hook_registry import HookRegistry\n"
        "ours = [target for target, hooks in HookRegistry._hooks.items()\n"
        "        for _, hook, _ in hooks if hook.__module__.startswith('sglang_mm_conn')]\n"
        "assert not ours, ours\n"
        "import sglang.srt.disaggregation.encoder.http_server as http\n"
        "assert not any('conn_multimodal' in getattr(route, 'path', '') for route in http.app.routes)\n"
        "from sglang.srt.disaggregation.utils import KVClassType, TransferBackend, get_kv_class\n"
        "from sglang.srt.disaggregation.mooncake import MooncakeKVSender\n"
        "from sglang_mm_conn.conn_multimodal import EmbeddingManager, EmbeddingSender\n"
        "ours = TransferBackend('conn_multimodal')\n"
        "assert ours is TransferBackend.CONN_MULTIMODAL and TransferBackend('mooncake') is TransferBackend.MOONCAKE\n"
        "assert get_kv_class(ours, KVClassType.SENDER) is MooncakeKVSender\n"
        "assert get_kv_class(ours, KVClassType.SENDER, is_multimodal=True) is EmbeddingSender\n"
        "assert get_kv_class(ours, KVClassType.MANAGER, is_multimodal=True) is EmbeddingManager\n"
        "assert get_kv_class(TransferBackend.MOONCAKE, KVClassType.SENDER) is MooncakeKVSender\n"
    )
    environment = Launch("encoder", Path(".")).environment()
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-3000:]


@pytest.mark.parametrize("untested", ["--dp-size 2", "--pp-size 2", "--attn-cp-size 2"])
def test_a_language_server_refuses_what_is_untested_with_tensor_parallel_ranks(
    untested: str, tiny_model: Callable[[str], Path]
) -> None:
    output = _start_and_fail(tiny_model("qwen2_5_vl"), "--tp-size", "4", *untested.split(), role="language")
    assert f"does not support {untested} yet" in output, output[-2000:]
