"""Owns the command line and the environment of each server of the demo, on a CPU or a GPU."""

import os
import shlex
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

Role = Literal["colocated", "encoder", "language", "decode"]
OUR_BACKEND = "conn_multimodal"

_COMMON_FLAGS = shlex.split(
    "--max-total-tokens 4096 --max-running-requests 4 --context-length 2048 "
    "--chunked-prefill-size 2048 --skip-server-warmup --trust-remote-code --tp 1 --grammar-backend none "
    "--disable-cuda-graph"
)

# float32: in float16, the default of the KV cache, some greedy answers differ.
_CPU_FLAGS = shlex.split("--device cpu --dtype float32 --attention-backend torch_native --sampling-backend pytorch")
# Three tiny servers share one GPU.
_GPU_FLAGS = ("--mem-fraction-static", "0.2")

_COMMON_ENV = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "SGLANG_HOST_IP": "127.0.0.1",
    "PYTHONUNBUFFERED": "1",
}
_CPU_ENV = {
    "SGLANG_USE_CPU_ENGINE": "1",
    "TORCHDYNAMO_DISABLE": "1",
    "OMP_NUM_THREADS": "1",
    "MC_FORCE_TCP": "1",  # Mooncake would look for RDMA devices first
    "CUDA_VISIBLE_DEVICES": "",
}


@dataclass(frozen=True)
class Launch:
    """One server to be started. `flags` and `env` override the defaults."""

    role: Role
    model: Path
    backend: str = OUR_BACKEND  # ours, or one of sglang's own --encoder-transfer-backend names; unused when colocated
    device: str = "cpu"
    program: tuple[str, ...] = (sys.executable, "-m", "sglang.launch_server")
    overlap: bool = False  # the overlap schedule; sglang's default is on, but on a CPU a server answers sooner without
    encoder_urls: tuple[str, ...] = ()
    flags: tuple[str, ...] = ()
    env: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.role not in get_args(Role):
            raise ValueError(f"role must be one of {', '.join(get_args(Role))}, not {self.role!r}")

    def command(self, port: int, bootstrap_port: int) -> list[str]:
        return [
            *self.program,
            *("--model-path", str(self.model), "--host", "127.0.0.1", "--port", str(port)),
            *_COMMON_FLAGS,
            *(() if self.overlap else ("--disable-overlap-schedule",)),
            *(_CPU_FLAGS if self.device == "cpu" else ("--device", self.device, *_GPU_FLAGS)),
            *self._role_flags(bootstrap_port),
            *self.flags,
        ]

    @property
    def kv_backend(self) -> str:
        return OUR_BACKEND if self.backend == OUR_BACKEND else "mooncake"

    def environment(self) -> dict[str, str]:
        return {**os.environ, **_COMMON_ENV, **(_CPU_ENV if self.device == "cpu" else {}), **self.env}

    def _role_flags(self, bootstrap_port: int) -> list[str]:
        if self.role == "colocated":
            return []
        if self.backend == OUR_BACKEND:
            transfer = ["--disaggregation-transfer-backend", OUR_BACKEND]
        else:
            transfer = ["--encoder-transfer-backend", self.backend]
        if self.role == "encoder":
            return ["--encoder-only", *transfer]
        if self.role == "decode":  # gets its KV cache from a language server in prefill mode
            backup = ["--disaggregation-decode-retraction-backup", "cpu_tensor"]
            return ["--disaggregation-mode", "decode", "--disaggregation-transfer-backend", self.kv_backend, *backup]
        # Every language server opens this second port, by default the same one.
        bootstrap = ["--encoder-bootstrap-port", str(bootstrap_port)]
        # Without --encoder-urls, encoders register themselves.
        urls = ["--encoder-urls", *self.encoder_urls] if self.encoder_urls else []
        return ["--language-only", *urls, *bootstrap, *transfer]
