"""The load of an encoder: what an item is worth, the work that is there, and how fast the encoder is seen to be."""

from __future__ import annotations

import heapq
import random

import pytest

from sglang_mm_conn.core.dispatch.choice import Candidate, Chooser, Item
from sglang_mm_conn.core.dispatch.load import (
    FORGET_SECONDS,
    HALF_LIFE_SECONDS,
    IMAGE_WORK,
    LEAST_WORK,
    EncoderLoad,
    work_of,
)


@pytest.mark.parametrize(
    ("modality", "pixels", "nbytes", "work"),
    [
        ("IMAGE", 2_000_000, 0, 2.0),
        ("IMAGE", 0, 0, IMAGE_WORK),
        ("IMAGE", 0, 5_000_000, IMAGE_WORK),  # bytes say nothing of an image's size
        ("IMAGE", 1, 0, LEAST_WORK),
        ("VIDEO", 0, 500_000, 2.0),
        ("VIDEO", 0, 0, 8 * IMAGE_WORK),
        ("AUDIO", 0, 640_000, 2.0),
        ("AUDIO", 0, 0, IMAGE_WORK),
        ("AUDIO", 0, 1, LEAST_WORK),
    ],
)
def test_work_of_an_item_is_about_its_megapixels(modality: str, pixels: int, nbytes: int, work: float) -> None:
    assert work_of(modality, pixels=pixels, nbytes=nbytes) == pytest.approx(work)


def test_work_is_added_and_removed_and_nothing_remains() -> None:
    load = EncoderLoad()
    works = [0.1 * number for number in range(1, 50)]
    for work in works:
        load.add(work, 0.0)
    assert load.parts == 49 and load.work == pytest.approx(sum(works))
    for work in works:
        load.remove(work)
    assert (load.parts, load.work, load.backlog) == (0, 0.0, 0.0)


def test_add_returns_the_work_ahead_of_a_part_and_its_own() -> None:
    load = EncoderLoad()
    assert load.add(2.0, 0.0) == 2.0
    assert load.add(3.0, 0.0) == 5.0


def test_requests_of_other_servers_are_part_of_the_backlog() -> None:
    load = EncoderLoad()
    load.add(1.0, 0.0)
    for _ in range(100):
        load.reported(11)
    assert load.backlog == pytest.approx(11.0, rel=0.01)  # ten others, each like an own part
    for _ in range(100):
        load.reported(0)  # it has not counted the newest part yet
    assert load.backlog == pytest.approx(1.0, abs=0.01)


def test_one_report_alone_changes_the_backlog_little() -> None:
    load = EncoderLoad()
    load.reported(100)
    assert 0 < load.backlog < 25


def test_rate_is_the_usual_one_until_it_is_measured() -> None:
    load = EncoderLoad()
    assert (load.known_rate, load.rate(0.3, 10.0)) == (None, 0.3)
    load.took(2.0, 4.0, 10.0)
    assert (load.known_rate, load.rate(0.3, 10.0)) == (0.5, 0.5)


def test_rate_follows_the_newest_samples() -> None:
    load = EncoderLoad()
    load.took(1.0, 1.0, 0.0)
    for _ in range(30):
        load.took(3.0, 1.0, 0.0)
    assert load.rate(1.0, 0.0) == pytest.approx(3.0, rel=0.01)


def test_an_old_rate_tends_to_the_usual_one() -> None:
    load = EncoderLoad()
    load.took(9.0, 1.0, 0.0)
    rates = [load.rate(1.0, now) for now in (0.0, FORGET_SECONDS, 3 * FORGET_SECONDS, 20 * FORGET_SECONDS)]
    assert rates == sorted(rates, reverse=True) and rates[0] == 9.0 and rates[-1] == pytest.approx(1.0)
    assert load.rate(1.0, -5.0) == 9.0  # a clock that went back


def test_old_work_counts_less_in_the_share() -> None:
    load = EncoderLoad()
    load.add(8.0, 0.0)
    load.remove(8.0)
    load.decay(HALF_LIFE_SECONDS)
    assert load.share == pytest.approx(4.0)
    load.add(1.0, 2 * HALF_LIFE_SECONDS)
    assert load.share == pytest.approx(3.0)


class Closed:
    """A closed loop: ``clients`` each have one item at the encoders, which are queues of different speeds."""

    def __init__(self, rates: list[float], clients: int, *, caches: bool, seed: int = 0) -> None:
        self.chance = random.Random(seed)
        self.rates, self.caches = rates, caches
        self.loads = [EncoderLoad() for _ in rates]
        self.free_at = [0.0] * len(rates)
        self.done = [0.0] * len(rates)
        self.chooser = Chooser()
        self.now = 0.0
        self.ends: list[tuple[float, int, int, float, float, float]] = []
        for client in range(clients):
            self.start(client)

    def start(self, client: int) -> None:
        known = [one.known_rate for one in self.loads if one.known_rate is not None]
        usual = sum(known) / len(known) if known else 0.1
        candidates = []
        for number, load in enumerate(self.loads):
            load.decay(self.now)
            rate = load.rate(usual, self.now)
            candidates.append(Candidate(f"http://{number}", load.backlog, rate, load.share, self.caches))
        work = self.chance.choice((0.3, 1.0, 2.0))
        item = Item("IMAGE", work, str(self.chance.random()) if self.caches else "")
        (share,) = self.chooser.share_out([item], candidates)
        number = int(share.url.rpartition("/")[2])
        ahead = self.loads[number].add(work, self.now)
        self.free_at[number] = max(self.free_at[number], self.now) + work * self.rates[number]
        heapq.heappush(self.ends, (self.free_at[number], client, number, work, ahead, self.now))

    def run(self, items: int) -> list[float]:
        """The share of each encoder in the work of the next ``items`` items."""
        before = list(self.done)
        for _ in range(items):
            self.now, client, number, work, ahead, began = heapq.heappop(self.ends)
            self.loads[number].remove(work)
            self.loads[number].took(self.now - began, ahead, self.now)
            self.done[number] += work
            self.start(client)
        did = [after - once for after, once in zip(self.done, before, strict=True)]
        return [one / sum(did) for one in did]


@pytest.mark.parametrize("caches", [False, True])
@pytest.mark.parametrize("clients", [8, 32])
def test_a_three_times_slower_encoder_ends_up_with_about_a_quarter_of_the_work(clients: int, caches: bool) -> None:
    loop = Closed([0.1, 0.3], clients, caches=caches)
    loop.run(500)
    assert 0.18 <= loop.run(2000)[1] <= 0.32


def test_equal_encoders_get_equal_work() -> None:
    loop = Closed([0.1, 0.1, 0.1], 12, caches=False)
    loop.run(300)
    assert all(0.28 <= share <= 0.39 for share in loop.run(2000))


def test_an_encoder_that_becomes_slow_gets_less_and_more_again_once_it_is_fast() -> None:
    loop = Closed([0.1, 0.1], 16, caches=False)
    loop.run(500)
    loop.rates[1] = 0.5
    loop.run(500)
    assert loop.run(1500)[1] <= 0.27
    loop.rates[1] = 0.1
    loop.run(500)
    assert loop.run(1500)[1] >= 0.42
