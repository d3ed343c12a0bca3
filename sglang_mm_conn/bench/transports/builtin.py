"""sglang 0.5.23's built-in transports for embeddings, ``zmq_to_scheduler`` and ``mooncake``, driven without a model.

Like sglang_plugin, this module uses sglang's internals. Imported from sglang and unchanged: ``MMEncoder`` with its
deliveries, its metadata registry and its HTTP routes (served by uvicorn), ``MMReceiverHTTP`` with its waiting requests
and its ``EmbeddingPool``, and its Mooncake engine. Different from a server:

- ``MMEncoder.__init__`` would load a model, so the fields that delivery uses are set here, and a tensor is passed to
  ``_stage_embeddings`` as after a model's forward;
- the multimodal processor, which sglang calls when all parts of a request have arrived, returns the embedding as it is;
- ``EmbeddingPool`` is GPU memory. With embeddings in host memory, ``torch.empty`` takes ``cuda`` for ``cpu`` while the
  receiver is created.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import queue
import threading
import time
from collections.abc import Iterator, Mapping
from types import SimpleNamespace
from typing import Any

import torch

from sglang_mm_conn.bench.transports.base import DTYPE, HOST, Config, Room

_PATIENCE = "300"


def _prepare_environment(config: Config) -> None:
    os.environ.setdefault("SGLANG_USE_CPU_ENGINE", "1")
    if config.device == "cpu":
        os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
    os.environ["SGLANG_HOST_IP"] = HOST
    os.environ["MOONCAKE_PROTOCOL"] = "tcp"
    for name in ("SEND", "RECV", "REQ", "HTTP"):
        os.environ[f"SGLANG_ENCODER_{name}_TIMEOUT"] = _PATIENCE
    room_for = config.in_flight * (config.nbytes + 256)
    os.environ["SGLANG_EMBEDDING_POOL_SIZE_MB"] = str((room_for >> 20) + 1)


def _publish(backend: str) -> Any:
    """Set this process's transfer backend to ``backend``, as a server's arguments would."""
    from sglang.srt.runtime_context import get_context

    return get_context().override_server_args(encoder_transfer_backend=backend, host=HOST).install()


class BuiltinSender:
    """An encoder's delivery and its HTTP server, in an event loop on a thread of its own."""

    def __init__(self, config: Config, backend: str) -> None:
        _prepare_environment(config)
        import uvicorn
        from sglang.srt.disaggregation.encoder import http_server

        self._backend = backend
        _publish(backend)
        self._loop = asyncio.new_event_loop()
        self._ended: queue.SimpleQueue[str | BaseException] = queue.SimpleQueue()
        self._preparing: dict[str, asyncio.Task[None]] = {}
        self._http = uvicorn.Server(
            uvicorn.Config(http_server.app, host=HOST, port=0, log_level="error", lifespan="off")
        )
        threading.Thread(target=self._run, name="builtin-encoder", daemon=True).start()
        self._encoder = self._call(self._make_encoder())
        http_server.encoder = self._encoder
        while not self._http.started:
            time.sleep(0.01)
        self._url = f"http://{HOST}:{self._http.servers[0].sockets[0].getsockname()[1]}"

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_until_complete(self._http.serve())

    def _call(self, coroutine: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(60)

    async def _make_encoder(self) -> Any:
        """An MMEncoder of rank 0 with the fields that delivery uses, as ``MMEncoder.__init__`` sets them."""
        import concurrent.futures

        import zmq
        import zmq.asyncio
        from sglang.srt.disaggregation.encoder import server

        encoder = server.MMEncoder.__new__(server.MMEncoder)
        fields: dict[str, Any] = {
            "transfer_backend": self._backend,
            "use_mooncake": self._backend == "mooncake",
            "rank": 0,
            "profiler": None,
            "mm_global_cache": None,
            "context": zmq.asyncio.Context(2),
            "sync_context": zmq.Context(),
            "scheduler_send_sockets": {},
            "scheduler_send_locks": {},
            "executor": concurrent.futures.ThreadPoolExecutor(max_workers=10),
            "send_timeout": float(_PATIENCE),
            "background_tasks": set(),
            "req_states": {},
            "abandoned_req_ids": set(),
            "encode_dispatch_lock": asyncio.Lock(),
            "_embedding_dtype": DTYPE,
            "_element_size": DTYPE.itemsize,
        }
        for name, value in fields.items():
            setattr(encoder, name, value)
        if self._backend == "mooncake":
            from sglang.srt.distributed.device_communicators import mooncake_transfer_engine

            encoder.engine = mooncake_transfer_engine.init_mooncake_transfer_engine(hostname=HOST, gpu_id=0)
            encoder.delivery = server.MooncakeDelivery(encoder)
            server.meta_registry.on_release = self._release
        else:
            encoder.delivery = server.ZmqDelivery(encoder, cleanup_receive_state=True)
        return encoder

    async def _release(self, name: str) -> None:
        """With ``mooncake``: the language process's request to ``/send`` has been answered."""
        await self._encoder.release_request(name)
        self._ended.put(name)

    def hello(self) -> dict[str, Any]:
        return {"url": self._url}

    def connect(self, peer: Mapping[str, Any]) -> None:
        """Nothing to do: the language process connects."""

    def _context(self, room: Room) -> Any:
        from sglang.srt.disaggregation.encoder import preprocessor, server
        from sglang.srt.managers.schedule_batch import Modality

        result = preprocessor.EncoderPreprocessResult(
            mm_inputs={}, grid_thw=torch.tensor([[1, room.tokens, 1]]), token_counts=[room.tokens]
        )
        return server.EncodeContext(
            req_id=room.name, modality=Modality.IMAGE, preprocess_result=result, get_feature_fn=None, mm_feature=None,
            num_items=1, items_per_req=[1], aux_data={}, str_mm_hashes=None, use_global_cache=False,
            is_health_check=False,
        )  # fmt: skip

    @staticmethod
    def _request(room: Room) -> dict[str, Any]:
        return {"req_id": room.name, "num_parts": 1, "part_idx": 0, "embedding_port": None}

    def prepare(self, room: Room) -> None:
        def begin() -> None:
            self._preparing[room.name] = self._loop.create_task(self._prepare(room))

        self._loop.call_soon_threadsafe(begin)

    async def _prepare(self, room: Room) -> None:
        """What ``batch_encode`` does before the model's forward."""
        from sglang.srt.disaggregation.encoder import server

        encoder = self._encoder
        encoder._embedding_dims = dict.fromkeys(_modalities(), room.width)
        encoder._acquire_encode_ref(room.name)
        async with server.encode_state_condition:
            server.encode_state_condition.notify_all()
        await encoder._publish_preprocess_metadata(self._context(room), [self._request(room)])

    def prepared(self, room: Room) -> bool:
        from sglang.srt.disaggregation.encoder import server

        if self._backend == "mooncake":
            state = self._encoder.req_states.get(room.name)
            return state is not None and state.active_sends > 0
        return room.name in server.rid_to_receive_endpoint

    def go(self, room: Room, tensor: torch.Tensor) -> None:
        self._loop.call_soon_threadsafe(lambda: self._loop.create_task(self._go(room, tensor)))

    async def _go(self, room: Room, tensor: torch.Tensor) -> None:
        """What ``batch_encode`` does after the model's forward, and ``execute_encode_pipeline`` after that."""
        from sglang.srt.disaggregation.encoder import runtime, server

        encoder, request = self._encoder, self._request(room)
        try:
            await self._preparing.pop(room.name)
            keep = self._backend == "mooncake"
            encoder._stage_embeddings(self._context(room), [request], tensor, keep_on_gpu=keep)
            await encoder._release_encode_ref(encoder.req_states[room.name])
            await server.meta_registry.publish(room.name, room.nbytes, room.tokens, room.width)
            await runtime._push_embedding_to_prefill(encoder, request)
            if self._backend != "mooncake":
                self._ended.put(room.name)
        except BaseException as error:
            self._ended.put(error)

    def wait(self, timeout: float) -> list[str]:
        ended: list[str] = []
        with contextlib.suppress(queue.Empty):
            one = self._ended.get(timeout=timeout)
            while True:
                if isinstance(one, BaseException):
                    raise RuntimeError(f"sglang's {self._backend}: {type(one).__name__}: {one}") from one
                ended.append(one)
                one = self._ended.get_nowait()
        return ended

    def close(self) -> None:
        self._http.should_exit = True


def _modalities() -> list[Any]:
    from sglang.srt.managers.schedule_batch import Modality

    return list(Modality)


class _Processor:
    """In place of the model's multimodal processor: returns a request's embedding as it is."""

    prefer_tokenized_input = False

    @staticmethod
    def get_validated_mm_data(prompt: Any, embedding: Mapping[Any, torch.Tensor], **meta: Any) -> Any:
        return _Inputs(next(iter(embedding.values())))


class _Inputs:
    """What a request keeps until its generation ends, and with it the slot in ``EmbeddingPool``."""

    def __init__(self, embedding: torch.Tensor) -> None:
        self.embedding = embedding
        self.input_ids: list[int] = []
        self.mm_items: list[Any] = []


@contextlib.contextmanager
def _cuda_means_cpu() -> Iterator[None]:
    """``torch.empty`` allocates host memory where it is asked for GPU memory."""
    empty = torch.empty

    def on_host(*args: Any, **kwargs: Any) -> torch.Tensor:
        if str(kwargs.get("device", "")).startswith("cuda"):
            kwargs["device"] = "cpu"
        return empty(*args, **kwargs)

    torch.empty = on_host
    try:
        yield
    finally:
        torch.empty = empty


class BuiltinReceiver:
    """A scheduler rank's receiver, ticked as by the scheduler, except that it waits on its sockets between ticks."""

    def __init__(self, config: Config, backend: str) -> None:
        _prepare_environment(config)
        if backend == "zmq_to_scheduler":
            del os.environ["SGLANG_EMBEDDING_POOL_SIZE_MB"]  # if set, sglang adds a copy into GPU memory
        from sglang.srt.disaggregation.encoder import receiver
        from sglang.srt.managers.schedule_batch import Modality
        from sglang.srt.runtime_context import get_device, get_parallel

        arguments = _publish(backend)
        get_device()._set("gpu_id", 0)  # as a server's launcher does
        if not torch.distributed.is_initialized():
            store = torch.distributed.HashStore()
            torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
        group = SimpleNamespace(cpu_group=torch.distributed.group.WORLD)
        get_parallel().override_permanently(pp_rank=0, tp_rank=0, tp_size=1, tp_group=group)
        with _cuda_means_cpu() if config.device == "cpu" else contextlib.nullcontext():
            self._receiver = receiver.MMReceiverHTTP(
                arguments, dtype=DTYPE, scheduler=SimpleNamespace(), encode_urls=[]
            )
        if self._receiver.embedding_pool is not None:
            self._receiver.embedding_pool.buffer.fill_(1)  # written once, so that no run pays for page faults
        self._receiver.mm_processor = _Processor()
        self._receiver.create_req = lambda request: (
            request
        )  # called for failed requests, of which only the message is used
        self._assigned = {Modality.IMAGE: [1]}
        self._url = ""
        self._new: list[Any] = []
        self._kept: dict[str, Any] = {}
        self._arrived: list[str] = []

    def hello(self) -> dict[str, Any]:
        return {}

    def connect(self, peer: Mapping[str, Any]) -> None:
        self._url = peer["url"]

    def expect(self, room: Room) -> None:
        from sglang.srt.managers.io_struct import TokenizedGenerateReqInput
        from sglang.srt.sampling.sampling_params import SamplingParams

        self._new.append(
            TokenizedGenerateReqInput(
                rid=room.name.rpartition("_local_part_")[0],
                input_text="",
                input_ids=None,
                input_embeds=None,
                mm_inputs=None,
                token_type_ids=None,
                sampling_params=SamplingParams(),
                return_logprob=False,
                logprob_start_len=-1,
                top_logprobs_num=0,
                token_ids_logprob=None,
                stream=False,
                need_wait_for_mm_inputs=True,
                encoder_urls=[self._url],
                num_items_assigned=self._assigned,
            )
        )
        self._tick()

    def _tick(self) -> None:
        new, self._new = self._new, []
        done, failed = self._receiver.process_waiting_requests(new)
        for _, message, code in failed:
            raise RuntimeError(f"sglang's receiver: {message} ({code})")
        for request in done:
            self._kept[request.rid] = request.mm_inputs
            self._arrived.append(request.rid)

    def wait(self, timeout: float) -> list[tuple[str, torch.Tensor]]:
        import zmq

        shared = self._receiver.scheduler_recv_socket
        sockets = [shared] if shared is not None else [one.recv_socket for one in self._receiver.waiting_list]
        if sockets and not self._arrived:
            poller = zmq.Poller()
            for socket in sockets:
                poller.register(socket, zmq.POLLIN)
            poller.poll(int(timeout * 1000))
            self._tick()
        arrived, self._arrived = self._arrived, []
        return [(f"{rid}_local_part_0", self._kept[rid].embedding) for rid in arrived]

    def release(self, name: str) -> None:
        self._kept.pop(name.rpartition("_local_part_")[0], None)

    def close(self) -> None:
        """Nothing to do: everything ends with the process."""
