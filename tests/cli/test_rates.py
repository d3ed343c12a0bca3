"""The rates command: every way is measured, its bytes are compared, and a wrong one is an error."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest
import torch

from sglang_mm_conn.__main__ import main
from sglang_mm_conn.cli import rates
from sglang_mm_conn.memory.device import Device
from tests.memory.asynchronous import AsynchronousDevice, CarelessDevice

SMALL = ["--mib", "2", "--block-kib", "100", "--repeats", "2"]


def test_without_a_gpu_it_says_so_and_measures_host_memory(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["rates", "--device", "cpu", *SMALL]) == 0
    heading, *lines = capsys.readouterr().out.splitlines()
    assert heading.startswith("no GPU: all of this is host memory; 2 MiB in blocks of 100 KiB")
    assert len(lines) == 6 and all("GB/s" in line for line in lines)


def test_a_gpu_that_is_not_there_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    assert main(["rates", "--device", "cuda", *SMALL]) == 1
    assert "torch finds no GPU here" in capsys.readouterr().err


def test_with_a_gpu_both_pools_are_compared_with_plain_copies_of_the_same_places() -> None:
    found = {rate.way: rate for rate in rates.measure(AsynchronousDevice(), 1 << 20, 100_000, 1)}
    assert all(rate.right and rate.bytes_per_second > 0 and rate.plain in found for rate in found.values())
    assert {way: rate.plain for way, rate in found.items() if not way.startswith("plain")} == {
        "encoder: into staging, cpu": "plain cuda to pinned host",
        "encoder: into staging, cuda": "plain cuda to cuda",
        "encoder: into the pool, shared memory": "plain cuda to pinned host",
        "language: out of the pool, cpu": "plain pinned host to cuda",
        "language: out of the pool, cuda": "plain cuda to cuda",
    }


def test_wrong_bytes_are_seen(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def careless(device: Device, nbytes: int, block_bytes: int, repeats: int) -> list[rates.Rate]:
        return measure(CarelessDevice(), nbytes, block_bytes, repeats)

    measure = rates.measure
    monkeypatch.setattr(rates, "measure", careless)
    assert rates.run(argparse.Namespace(device="cpu", mib=1, block_kib=100, repeats=1, json=None)) == 1
    assert "WRONG BYTES" in capsys.readouterr().out


def test_figures_are_written_for_whoever_reads_them_later(tmp_path: Path) -> None:
    assert main(["rates", "--device", "cpu", *SMALL, "--json", str(tmp_path / "rates.json")]) == 0
    found = json.loads((tmp_path / "rates.json").read_text())
    assert len(found) == 6 and all(rate["right"] and rate["bytes_per_second"] > 0 for rate in found)
