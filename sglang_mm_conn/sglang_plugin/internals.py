"""What this plugin uses of sglang 0.5.23 that other releases may rename: the one file to read for a port.

It lists the functions that are hooked, replaced, overridden or called, and wraps the uses of sglang's private names.
``hooks.apply_and_verify`` checks that everything listed exists. Not in here: the enum that backend_enum.py extends, and
the attributes of the scheduler that idle.py uses.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

SUPPORTED = ("0.5.23",)
_ENCODER = "sglang.srt.disaggregation.encoder"
_SCHEDULER = "sglang.srt.managers.scheduler_components"
_PLUGIN = "sglang_mm_conn.sglang_plugin"


@dataclass(frozen=True)
class Hook:
    """A function of sglang that is hooked through sglang's HookRegistry.

    Attributes:
        target: Full name of sglang's function.
        parameters: Those of its parameters that the hook relies on.
        hook: This plugin's function, as ``module:function``.
        kind: Name of a member of sglang's HookType.
    """

    target: str
    parameters: tuple[str, ...]
    hook: str
    kind: str = "AROUND"


HOOKS = (
    # Creates what receives embeddings: in the tokenizer process (with encode_urls) and in each scheduler process (with
    # scheduler).
    Hook(
        f"{_ENCODER}.receiver.create_mm_receiver",
        ("server_args", "dtype", "hf_config", "scheduler", "encode_urls"),
        f"{_PLUGIN}.scheduler:create_receiver",
    ),
    # The tokenizer process: part of the answer of GET /server_info.
    Hook(
        "sglang.srt.managers.tokenizer_control_mixin.TokenizerControlMixin.get_internal_state",
        ("self",),
        f"{_PLUGIN}.dispatch:report_encoders",
    ),
    # The tokenizer process: dispatches the items of a request.
    Hook(
        "sglang.srt.managers.tokenizer_manager.TokenizerManager._handle_epd_disaggregation_encode_request",
        ("self", "obj"),
        f"{_PLUGIN}.dispatch:dispatch_each",
    ),
    # The tokenizer process: a request has failed, or its client has gone.
    Hook(
        "sglang.srt.managers.tokenizer_manager.TokenizerManager._release_req_states_on_failure",
        ("self", "request_states"),
        f"{_PLUGIN}.dispatch:forget_requests",
        "AFTER",
    ),
    # The tokenizer process: the answer of a request that the scheduler has ended with an error.
    Hook(
        "sglang.srt.managers.tokenizer_manager.TokenizerManager._handle_abort_finish_reason",
        ("self", "out", "state", "is_stream"),
        f"{_PLUGIN}.answers:raise_input_error",
    ),
    # The tokenizer process: the token ids of a prompt, for a client that wants them.
    Hook(
        "sglang.srt.managers.tokenizer_manager.TokenizerManager._tokenize_one_request",
        ("self", "obj"),
        f"{_PLUGIN}.answers:keep_prompt_ids",
    ),
    Hook(
        "sglang.srt.managers.tokenizer_manager.TokenizerManager._wait_one_response",
        ("self", "obj", "request"),
        f"{_PLUGIN}.answers:give_prompt_ids",
        "AFTER",
    ),
    # A scheduler process: embeds the media of a batch.
    Hook(
        "sglang.srt.managers.mm_utils.prepare_mm_inputs",
        ("input_ids", "forward_batch"),
        f"{_PLUGIN}.mixed_batches:embed_apart",
    ),
    # Loads the encoder's model.
    Hook(
        f"{_ENCODER}.server.MMEncoder.__init__",
        ("self", "server_args", "rank"),
        f"{_PLUGIN}.encoder:start_manager",
        "AFTER",
    ),
    # Publishes the sizes of a batch's embeddings, before the model's forward.
    Hook(
        f"{_ENCODER}.server.MMEncoder._publish_preprocess_metadata",
        ("self", "ctx", "requests"),
        f"{_PLUGIN}.encoder:announce_rooms",
    ),
    # Runs the model, and moves the embedding to the host unless keep_on_gpu.
    Hook(
        f"{_ENCODER}.server.MMEncoder._compute_direct_embedding",
        ("self", "ctx", "keep_on_gpu"),
        f"{_PLUGIN}.encoder:keep_on_device",
    ),
    # Sends one embedding, or the error of its encode; every request to /encode passes through it.
    Hook(
        f"{_ENCODER}.runtime._push_embedding_to_prefill",
        ("enc", "request", "background_url_send"),
        f"{_PLUGIN}.encoder:push_embedding",
    ),
)

# Functions that the encoder's runtime starts processes with, and the parameters that this plugin relies on. They are
# replaced instead of hooked, see processes.py.
SPAWN_TARGETS = {
    f"{_ENCODER}.runtime.launch_dp_worker": ("server_args", "dp_rank"),
    f"{_ENCODER}.runtime.launch_encoder": ("server_args", "rank"),
}

# Used without a hook.
NEEDED = (
    # The encoder's processes.
    f"{_ENCODER}.http_server.app",  # the FastAPI application, which gets routes, a middleware and a lifespan
    f"{_ENCODER}.http_server.dp_dispatcher",  # with --dp-size above 1: the DPDispatcher, else None
    f"{_ENCODER}.runtime.DPDispatcher.alive_ranks",  # ranks of the DP workers that have not died
    f"{_ENCODER}.server.MMEncoder._wait_for_embedding",  # waits until a request's embedding is computed
    f"{_ENCODER}.server.MMEncoder._infer_embedding_dims",  # values per row, by modality
    f"{_ENCODER}.server.MMEncoder.release_request",  # forgets a request
    # The tokenizer process: base class of RoomDispatcher.
    f"{_ENCODER}.receiver.MMReceiverBase._extract_url_data",  # the images, video and audio of a request
    f"{_ENCODER}.receiver._encoder_media_item",  # an item as it is posted to /encode
    f"{_ENCODER}.receiver.MMReceiverBase._send_encode_request",  # starts the dispatch; overridden
    "sglang.srt.managers.tokenizer_manager.TokenizerManager._validate_mm_limits",  # --limit-mm-data-per-request
    "sglang.srt.managers.tokenizer_manager.TokenizerManager._normalize_mm_content_hashes",  # and checks how many
    "sglang.srt.managers.io_struct.EncoderDispatchErrorReq",  # from the tokenizer to every rank of the scheduler
    # A scheduler process: base class of SchedulerReceiver.
    f"{_ENCODER}.receiver.MMReceiverBase._init_mm_processor",  # creates the multimodal processor
    f"{_ENCODER}.receiver.MMReceiverBase._process_waiting_requests",  # one tick, in step with the other ranks
    f"{_ENCODER}.receiver.MMReceiverBase.abort_waiting_requests",  # an abort has come; overridden
    "sglang.srt.managers.scheduler.Scheduler.send_abort_output",  # the answer for a request that did not run
    "sglang.srt.managers.utils.compute_num_reserved_tokens",
    f"{_ENCODER}.receiver.MMReceiverBase.create_req",  # the scheduler's request for a failed one; overridden
    # A scheduler process: base class of WaitingEmbeddingRequest, and what it makes of the parts.
    f"{_ENCODER}.receiver.WaitingMMRequestBase.send_encode_request",  # called once, at the start; overridden
    f"{_ENCODER}.receiver.WaitingMMRequestBase._try_recv_mm_data",  # called every tick; overridden
    f"{_ENCODER}.receiver.WaitingMMRequestBase._finish_assemble",  # the embeddings are there
    f"{_ENCODER}.receiver.WaitingMMRequestBase._fail_assemble",  # they cannot be put together
    f"{_ENCODER}.receiver.WaitingMMRequestBase._fail_and_release",  # the request has failed; overridden
    f"{_ENCODER}.receiver.WaitingMMRequestBase.release_resources",  # after an abort or a failure; overridden
    f"{_ENCODER}.receiver.WaitingMMRequestBase.close_recv_socket",  # at every end; overridden
    f"{_ENCODER}.receiver.MultiModalEmbeddingData.from_embedding_data",
    # A scheduler process: its sleep, and its part of GET /server_info.
    f"{_SCHEDULER}.idle_sleeper.IdleSleeper.maybe_sleep",
    f"{_SCHEDULER}.ipc_channels.SchedulerIpcChannels",
    f"{_SCHEDULER}.internal_state.SchedulerInternalStateController.get_internal_state",
)


def replace_spawn_targets(launch_dp_worker: Callable[..., None], launch_encoder: Callable[..., None]) -> None:
    """Let the encoder's runtime start its DP workers and TP followers with these functions."""
    from sglang.srt.disaggregation.encoder import runtime

    runtime.launch_dp_worker = launch_dp_worker
    runtime.launch_encoder = launch_encoder


async def wait_for_embedding(encoder: Any, state: Any) -> Any:
    """The EmbeddingData of a request of an MMEncoder, once it is computed or has failed."""
    return await encoder._wait_for_embedding(state)


def row_format(encoder: Any) -> tuple[Any, int]:
    """(dtype of an MMEncoder's embeddings, bytes of its widest row)."""
    return encoder._embedding_dtype, max(encoder._embedding_dims.values()) * encoder._element_size


def widest_row(model_config: Any) -> int:
    """Values in the widest row that an encoder of this model sends, in a process without an MMEncoder."""
    from sglang.srt.disaggregation.encoder.server import MMEncoder

    return max(MMEncoder._infer_embedding_dims(SimpleNamespace(model_config=model_config)).values())


def extend_internal_state(scheduler: Any, name: str, report: Callable[[], dict[str, Any]]) -> None:
    """Add ``report()`` under ``name`` to the scheduler's ``internal_states`` in ``GET /server_info``."""
    controller = scheduler.internal_state
    original = controller.get_internal_state

    def get_internal_state(request: Any) -> Any:
        answer = original(request)
        answer.internal_state[name] = report()
        return answer

    controller.get_internal_state = get_internal_state
