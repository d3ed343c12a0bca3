"""The suite `bench transfers`: what its options plan."""

import os

import pytest

from sglang_mm_conn.__main__ import parser
from sglang_mm_conn.bench import transports
from sglang_mm_conn.bench.defaults import TRANSPORTS
from sglang_mm_conn.bench.transfers import Plan, plan_of, stream_above
from sglang_mm_conn.bench.transports.base import Config


def plan(*arguments: str) -> Plan:
    return plan_of(parser().parse_args(["bench", *arguments]))


def test_the_default_transports_are_those_that_work_here(monkeypatch: pytest.MonkeyPatch) -> None:
    for broken in (False, True):
        monkeypatch.setattr(transports, "BUILTIN_CANNOT_PICKLE", broken)
        names = {transport.name for transport in plan().transports}
        assert names == set(TRANSPORTS.split(",")) - (set(transports.BUILTIN) if broken else set())
        assert len(plan("--transports", TRANSPORTS).transports) == len(TRANSPORTS.split(",")), "named ones are kept"


def test_variations_are_added_to_both_paths() -> None:
    names = [transport.name for transport in plan("--transports", "memcpy,shm", "--windows").transports]
    assert names == ["memcpy", "shm", "shm+windows", "mooncake+windows"]
    names = [
        transport.name for transport in plan("--transports", "zmq_baseline", "--fragmented", "--copied").transports
    ]
    assert names == [
        "zmq_baseline", "shm+fragmented", "mooncake+fragmented", "shm+copied", "mooncake+copied", "zmq_baseline+copied",
    ]  # fmt: skip
    assert transports.parse("shm+windows+key").name == "shm+key+windows"


def test_with_a_gpu_every_transport_that_can_end_there_is_measured_and_no_others() -> None:
    found = plan("--device", "cuda")
    names = [transport.name for transport in found.transports]
    assert {"memcpy", "shm", "mooncake", "mooncake+gpu_pool"} <= set(names) and not {"tcp", "engine"} & set(names)
    assert (found.device, found.special) == ("cuda", False)
    config = transports.parse("mooncake+gpu_pool").config(Config(1 << 20, 4096, 1, device="cuda"), "")
    assert (config.device, config.pool_device) == ("cuda", "cuda")


def test_the_size_to_stream_above_reaches_the_processes_beside_other_tunables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.check=0")
    stream_above("512K")
    wanted = "glibc.malloc.check=0:glibc.cpu.x86_non_temporal_threshold=0x80000"
    assert os.environ["GLIBC_TUNABLES"] == wanted
    with pytest.raises(ValueError, match="--stream-above: 'much'"):
        stream_above("much")
