"""Makes every way in which sglang itself moves an embedding raise, so that no fallback stays hidden in a test.

The functions are replaced in place rather than through sglang's hook registry: the registry only logs a target that it
cannot find, and a test that relies on this switch must not pass because a name has changed.
"""

import importlib
import logging
from typing import Any, NoReturn

_ENCODER = "sglang.srt.disaggregation.encoder"

FORBIDDEN = {
    f"{_ENCODER}.receiver": (
        "WaitingZmqRequest.__init__",  # zmq_to_scheduler, and its gRPC variant by inheritance
        "WaitingRDMARequest.__init__",  # mooncake
        "MMReceiverBase._recv_mm_data",  # zmq_to_tokenizer
        "EmbeddingPool.__init__",
        "safe_pickle_loads",
    ),
    f"{_ENCODER}.server": (
        "MMEncoder._send",
        "MMEncoder.send",
        "MMEncoder.send_with_url",
        "MMEncoder.register_embedding_destinations",
        "MMEncoder._run_mooncake_transfer",
        "MMEncoder._register_shared_mr",
        "ZmqDelivery.send",
        "MooncakeDelivery.send",
    ),
}

# Called at each tick and harmless by itself; only a socket of its own makes it a transport.
_DRAIN = "_drain_scheduler_embeddings"

logger = logging.getLogger(__name__)


def forbid_builtin_transport() -> None:
    for module_name, paths in FORBIDDEN.items():
        module = importlib.import_module(module_name)
        for path in paths:
            _replace(module, path)
        if module_name.endswith(".receiver"):
            _forbid_scheduler_socket(module)
    logger.warning("CPU bed: sglang's own embedding transports are forbidden in this process")


def _replace(module: Any, path: str) -> None:
    owner_path, _, name = path.rpartition(".")
    owner = getattr(module, owner_path, None) if owner_path else module
    if not hasattr(owner, name):
        raise SystemExit(f"CPU_BED_FORBID_BUILTIN_TRANSPORT: {module.__name__} has no {path} in this sglang")
    setattr(owner, name, _raiser(path))


def _raiser(path: str) -> Any:
    def forbidden(*args: Any, **kwargs: Any) -> NoReturn:
        _refuse(path)

    return forbidden


def _forbid_scheduler_socket(receiver: Any) -> None:
    original = getattr(receiver.MMReceiverBase, _DRAIN, None)
    if original is None:
        raise SystemExit(f"CPU_BED_FORBID_BUILTIN_TRANSPORT: MMReceiverBase has no {_DRAIN} in this sglang")

    def drain(self: Any) -> None:
        if getattr(self, "scheduler_recv_socket", None) is not None:
            _refuse("MMReceiverBase.scheduler_recv_socket")
        original(self)

    setattr(receiver.MMReceiverBase, _DRAIN, drain)


def _refuse(what: str) -> NoReturn:
    # The log line is for callers that swallow the exception.
    logger.critical("stock transport used: %s", what)
    raise RuntimeError(f"stock transport used: {what}")
