"""Two ranks of one language server in step, as sglang's scheduler ticks them: both go on with a request, or neither.

Real processes with sglang's own all-reduce between them and a real encoder endpoint; no model. The test decides when
the ranks tick, so it can look at what is there between two ticks.
"""

from __future__ import annotations

import multiprocessing
import os
import select
import zlib
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sglang_mm_conn.connector.encoder.endpoint import EncoderEndpoint
from sglang_mm_conn.connector.metadata import encode_metadata
from sglang_mm_conn.control.bootstrap_server import StandaloneBootstrap
from sglang_mm_conn.core.rooms import new_id, new_room_base
from sglang_mm_conn.core.settings import Settings
from sglang_mm_conn.datapath.factory import encoder_data_paths
from sglang_mm_conn.demo.servers import free_port
from sglang_mm_conn.memory.results import _name
from sglang_mm_conn.memory.segment import DIRECTORY
from tests.connector.processes import wait_for

HOST = "127.0.0.1"
WIDTH = 8
ROWS = 40  # of blocks for 16
SETTINGS = Settings(blocks=4, block_size=4, data_path="shm", checksum=True)
RECV_TIMEOUT = 60.0


# -- one rank --------------------------------------------------------------------------------------------------------


@dataclass
class Request:
    """One request with one image."""

    rid: str
    room_base: str

    @property
    def room(self) -> str:
        return f"{self.room_base}_local_part_0"


@dataclass
class Tick:
    """What a tick of one rank led to."""

    ready: dict[str, int] = field(default_factory=dict)  # rid -> checksum of its embedding
    aborted: dict[str, tuple[str, int]] = field(default_factory=dict)
    waiting: dict[str, str] = field(default_factory=dict)  # rid -> this rank's own state
    awake: bool = False  # whether an idle scheduler would look again at once


def run_rank(rank: int, port: int, server: str, encoder_url: str, commands: Connection) -> None:
    """Tick on command. ``eyes`` is what happens to a look for the leader's result: open, blind or broken."""
    from sglang.srt.disaggregation.encoder import receiver as theirs
    from sglang.srt.managers.io_struct import TokenizedGenerateReqInput
    from sglang.srt.managers.schedule_batch import Modality
    from torch import distributed

    from sglang_mm_conn.conn_multimodal import EmbeddingArgs, EmbeddingManager, EmbeddingMode
    from sglang_mm_conn.connector.language import follower
    from sglang_mm_conn.memory.results import read_result
    from sglang_mm_conn.sglang_plugin.dispatch import with_room
    from sglang_mm_conn.sglang_plugin.prompts import Prompts
    from sglang_mm_conn.sglang_plugin.scheduler import SchedulerReceiver

    distributed.init_process_group("gloo", init_method=f"tcp://{HOST}:{port}", rank=rank, world_size=2)

    class Group:
        cpu_group = distributed.group.WORLD

        def all_gather_object(self, value: Any) -> list[Any]:
            gathered = [None, None]
            distributed.all_gather_object(gathered, value)
            return gathered

    class Processor:
        prefer_tokenized_input = False

        def get_validated_mm_data(self, prompt: Any, embeddings: Any, **meta: Any) -> Any:
            assert meta["img_grid_thw"].tolist() == [[1, 2, 3]], "the metadata came too"
            return SimpleNamespace(input_ids=[1], embedding=embeddings[Modality.IMAGE])

    class Receiver(SchedulerReceiver):
        def create_req(self, recv_req: Any) -> Any:
            return SimpleNamespace(rid=recv_req.rid)

    receiver = Receiver.__new__(Receiver)
    given_up: list[str] = []
    receiver.scheduler = SimpleNamespace(send_abort_output=lambda answer, _: given_up.append(answer.rid))
    receiver.mm_processor = Processor()
    receiver.tp_rank, receiver.tp_size, receiver.tp_group = rank, 2, Group()
    receiver.encode_urls, receiver.wait_timeout, receiver.hostname = [encoder_url], RECV_TIMEOUT, HOST
    receiver.model_type, receiver.waiting_list, receiver.waiting_by_rid = "qwen2_5_vl", [], {}
    receiver.scheduler_recv_socket = receiver.scheduler_context = receiver.scheduler_embedding_port = None
    receiver._joined_scheduler, receiver.context, receiver.aborted = True, None, {}
    ranks: dict[str, Any] = {"rank": rank, "size": 2, "ranks_per_host": 2}
    receiver.manager = EmbeddingManager(
        EmbeddingArgs(SETTINGS, torch.float32, WIDTH * 4, HOST, RECV_TIMEOUT, server=server, **ranks),
        EmbeddingMode.LANGUAGE,
    )
    receiver.prompts = Prompts(receiver.manager, receiver.model_type, report=None)
    eyes = "open"

    def look(room: str, host_index: int = 0) -> Any:
        if eyes == "broken":
            raise OSError("out of everything")
        return None if eyes == "blind" else read_result(room, host_index)

    follower.read_result = look

    def incoming(request: Request) -> TokenizedGenerateReqInput:
        made = TokenizedGenerateReqInput(
            rid=request.rid, input_text="what is this?", input_ids=array("q"), input_embeds=None, mm_inputs=None,
            token_type_ids=None, sampling_params=None, return_logprob=False, logprob_start_len=0, top_logprobs_num=0,
            token_ids_logprob=None, stream=False,
        )  # fmt: skip
        made.need_wait_for_mm_inputs = True
        made.num_items_assigned = {Modality.IMAGE: [1]}
        made.encoder_urls = [with_room(encoder_url, request.room_base)]
        return made

    def tick(requests: list[Request], abort: str) -> Tick:
        given_up.clear()
        if abort:
            receiver.abort_waiting_requests(SimpleNamespace(abort_all=False, rid=abort, finished_reason=None))
        ready, aborted = receiver.process_waiting_requests([incoming(one) for one in requests])
        completions = receiver.manager.language_endpoint.completions
        return Tick(
            {one.rid: zlib.crc32(one.mm_inputs.embedding.numpy().tobytes()) for one in ready},
            {one.rid: (text, int(code or 500)) for one, text, code in aborted}
            | dict.fromkeys(given_up, ("aborted by id", 200)),
            {one.rid: theirs.WaitingMMRequestStatus(one.status).name for one in receiver.waiting_list},
            bool(select.select([completions.fileno()], [], [], 0)[0]),
        )

    commands.send("started")
    while True:
        try:
            do, *args = commands.recv()
        except EOFError:
            os._exit(0)
        if do == "eyes":
            eyes = args[0]
        else:
            commands.send(tick(*args))


# -- both, and an encoder --------------------------------------------------------------------------------------------


class Ranks:
    """Rank 0, rank 1, and the encoder that sends to them."""

    def __init__(self) -> None:
        self.server = new_id()
        self.encoder = EncoderEndpoint(
            SETTINGS, host=HOST, dtype="float32", widest_row_bytes=WIDTH * 4, send_timeout=RECV_TIMEOUT,
            data_paths=encoder_data_paths(SETTINGS, HOST),
        )  # fmt: skip
        self._bootstrap = StandaloneBootstrap(HOST, 0, lambda: self.encoder.bootstrap_info)
        spawn = multiprocessing.get_context("spawn")
        port = free_port()
        self._pipes, self._processes = [], []
        for rank in (0, 1):
            ours, theirs = spawn.Pipe()
            process = spawn.Process(
                target=run_rank, args=(rank, port, self.server, self._bootstrap.url, theirs), daemon=True
            )
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)
        for pipe in self._pipes:
            assert pipe.recv() == "started"

    def eyes(self, state: str) -> None:
        self._pipes[1].send(("eyes", state))

    def tick(self, *requests: Request, abort: str = "") -> list[Tick]:
        for pipe in self._pipes:
            pipe.send(("tick", list(requests), abort))
        return [pipe.recv() for pipe in self._pipes]

    def tick_until(self, rid: str, *, rank: int, state: str) -> list[Tick]:
        """Tick until ``rank`` says that of a request that waits."""
        ticks: list[Tick] = []

        def there() -> bool:
            ticks[:] = self.tick()
            assert rid in ticks[0].waiting, f"it does not wait any more: {ticks}"
            return ticks[rank].waiting[rid] == state

        wait_for(there, f"rank {rank} is {state}")
        return ticks

    def tick_to_end(self, rid: str) -> list[Tick]:
        """Tick until the request waits no more."""
        ticks: list[Tick] = []

        def ended() -> bool:
            ticks[:] = self.tick()
            return rid not in ticks[0].waiting

        wait_for(ended, f"the end of {rid}")
        return ticks

    def request(self, rid: str) -> Request:
        """A new one; both ranks have heard of it, its embedding is not there."""
        request = Request(rid, new_room_base(self.server))
        ticks = self.tick(request)
        assert [tick.waiting.get(rid) for tick in ticks] == ["PENDING", "PENDING"]
        return request

    def send(self, request: Request) -> int:
        """Send its embedding. Returns the checksum."""
        rows = torch.randn(ROWS, WIDTH)
        metadata = {"num_parts": 1, "part_idx": 0, "grid_dim": torch.tensor([[1, 2, 3]]), "modality": "IMAGE"}
        self.encoder.announce(request.room, ROWS, WIDTH * 4, "float32", lambda ended: None)
        self.encoder.add_transfer_request(request.room, rows, encode_metadata(metadata, 1 << 20))
        return zlib.crc32(rows.numpy().tobytes())

    def close(self) -> None:
        for pipe, process in zip(self._pipes, self._processes, strict=True):
            pipe.close()
            process.join(10)
        self.encoder.close()
        self._bootstrap.close()


@pytest.fixture(scope="module")
def shared_ranks() -> Iterator[Ranks]:
    ranks = Ranks()
    yield ranks
    ranks.close()


@pytest.fixture
def ranks(shared_ranks: Ranks) -> Ranks:
    shared_ranks.eyes("open")
    return shared_ranks


def has_name(request: Request) -> bool:
    return os.path.exists(os.path.join(DIRECTORY, _name(request.room, 0)))


def test_both_ranks_go_on_in_one_tick_with_the_same_bytes_and_the_name_is_gone(ranks: Ranks) -> None:
    request = ranks.request("both")
    checksum = ranks.send(request)
    ticks = ranks.tick_to_end("both")
    assert [tick.ready for tick in ticks] == [{"both": checksum}] * 2
    assert not has_name(request)


def test_the_leader_keeps_the_name_until_the_slowest_rank_has_mapped_it(ranks: Ranks) -> None:
    request = ranks.request("slow")
    ranks.eyes("blind")
    checksum = ranks.send(request)
    ranks.tick_until("slow", rank=0, state="SUCCESS")
    for _ in range(20):
        first, second = ranks.tick()
        assert (first.waiting, second.waiting) == ({"slow": "SUCCESS"}, {"slow": "PENDING"})
        assert not first.ready and not second.ready and has_name(request)
        assert first.awake, "nothing else would wake an idle rank 0 when the other rank is done"
    ranks.eyes("open")
    ticks = ranks.tick_to_end("slow")
    assert [tick.ready for tick in ticks] == [{"slow": checksum}] * 2
    assert not has_name(request)


def test_a_rank_that_cannot_map_fails_the_request_on_both_and_says_why(ranks: Ranks) -> None:
    request = ranks.request("broken")
    ranks.eyes("blind")
    ranks.send(request)
    ranks.tick_until("broken", rank=0, state="SUCCESS")
    ranks.eyes("broken")
    for tick in ranks.tick_to_end("broken"):
        text, code = tick.aborted["broken"]
        assert "could not take the embeddings" in text and code == 500
        assert not tick.ready
    assert not has_name(request)


def test_what_fails_on_the_leader_fails_on_both(ranks: Ranks) -> None:
    request = ranks.request("encoder")
    ranks.encoder.fail(request.room, "the model failed", 422)
    for tick in ranks.tick_to_end("encoder"):
        text, code = tick.aborted["encoder"]
        assert "the model failed" in text and code == 422
    assert not has_name(request)


def test_a_client_that_goes_away_leaves_nothing_on_either_rank(ranks: Ranks) -> None:
    early, late = ranks.request("early"), ranks.request("late")
    ranks.eyes("blind")
    ranks.send(late)
    ranks.tick_until("late", rank=0, state="SUCCESS")
    assert has_name(late)
    for rid in ("early", "late"):
        for tick in ranks.tick(abort=rid):
            assert tick.aborted[rid] == ("aborted by id", 200)
    assert not has_name(early) and not has_name(late)
    assert [tick.waiting for tick in ranks.tick()] == [{}, {}]
