"""The language server's tokenizer process: what an answer has where encoders are used, and lacked otherwise.

A colocated sglang has the prompt's token ids, and has read the media, before it sends a request to the scheduler. Here
only the scheduler learns of either.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable
from http import HTTPStatus
from typing import Any

from sglang.srt.multimodal.transport.cuda_ipc import CudaIpcTensorTransportProxy

_IDS = "conn_multimodal_prompt_ids"


async def raise_input_error(
    original: Callable[..., Awaitable[Any]], self: Any, out: dict[str, Any], state: Any, is_stream: bool
) -> Any:
    """Around ``_handle_abort_finish_reason`` of the tokenizer manager: a stream that has not begun ends with the status
    of the error, if the input is at fault."""
    reason = out["meta_info"]["finish_reason"]
    # A request that waited for encoders. What the scheduler refuses later has a type, and what it refuses by itself is
    # an event of the stream in a colocated sglang, too.
    waited = bool(getattr(state.obj, "encoder_urls", None)) and reason.get("err_type") is None
    begun = bool(out["meta_info"].get("completion_tokens"))
    refused = reason.get("status_code") == HTTPStatus.BAD_REQUEST
    return await original(self, out, state, is_stream and not (waited and refused and not begun))


async def keep_prompt_ids(original: Callable[[Any, Any], Awaitable[Any]], self: Any, obj: Any) -> Any:
    """Around ``_tokenize_one_request`` of the tokenizer manager, which has no token ids of a prompt with media. For a
    client that wants them, read the media on this server, too."""
    wanted = getattr(obj, "return_prompt_token_ids", False) and getattr(obj, "encoder_urls", None)
    if not wanted:
        return await original(self, obj)
    obj.return_prompt_token_ids = False  # sglang would copy the ids that are not there
    tokenized = await original(self, obj)
    processed = await self.mm_processor.process_mm_data_async(
        image_data=obj.image_data, audio_data=obj.audio_data, input_text=obj.text or obj.input_ids, request_obj=obj,
        max_req_input_len=self.max_req_input_len,
    )  # fmt: skip
    _release(self.mm_processor, processed.mm_items)
    setattr(obj, _IDS, [int(one) for one in processed.input_ids])  # copies of obj, one a sample, have it, too
    return tokenized


def _release(processor: Any, items: Iterable[Any]) -> None:
    """Give back the memory of features that go to no scheduler."""
    pool = getattr(processor, "cudaipc_mmfeature_pool", None)
    for item in items:
        if pool is not None and isinstance(item.feature, CudaIpcTensorTransportProxy):
            pool.cancel_proxy(item.feature)


def give_prompt_ids(result: Any, self: Any, obj: Any, request: Any = None) -> Any:
    """After ``_wait_one_response`` of the tokenizer manager, which is called before the first output."""
    ids = getattr(obj, _IDS, None)
    if ids is not None:
        self.rid_to_state[obj.rid].prompt_token_ids = ids
    return result
