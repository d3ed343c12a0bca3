"""A part that kills each encoder it is posted to: few encoders die of it, and healthy parts survive."""

from __future__ import annotations

import random

import pytest

from sglang_mm_conn.core.dispatch.actions import GiveUp
from sglang_mm_conn.core.dispatch.verdicts import Verdict
from tests.core.dispatch.driver import Driver

STEP = 0.05
LOOK_AFTER = 0.3  # the scheduler's side sees a lost connection after so long


class Cluster:
    """Encoders that work on all their parts at once, in steps of time. A poisoned part kills its encoder."""

    def __init__(self, encoders: int, seed: int, *, back_after: float = 1e9) -> None:
        self.chance = random.Random(seed)
        self.urls = [f"http://{number}:1" for number in range(encoders)]
        self.driver = Driver(*self.urls)
        for url in self.urls:
            self.driver.status(url)
        self.back_after = back_after
        self.dead: dict[str, float] = {}  # since when
        self.died: list[str] = []
        self.poison: set[str] = set()
        self.ends: dict[str, float] = {}  # by room

    def seconds(self, base: str) -> float:
        return self.chance.uniform(0.1, 1.0) if base in self.poison else self.chance.uniform(0.2, 3.0)

    def step(self) -> None:
        driver = self.driver
        driver.tick(STEP)
        for room, post in list(driver.open.items()):
            if room not in driver.open:
                continue
            if post.url in self.dead:
                driver.answer(room, Verdict.REFUSED)
            elif driver.now >= self.ends.setdefault(room, driver.now + self.seconds(post.room_base)):
                if post.room_base in self.poison:
                    self.kill(post.url)
                else:
                    driver.answer(room, Verdict.DELIVERED)
        for url, since in list(self.dead.items()):
            if driver.now >= since + self.back_after:
                del self.dead[url]
                driver.status(url)
            elif driver.now >= since + LOOK_AFTER:
                driver.status(url, connected=False)
        for url in list(driver.probes):
            driver.absent(url) if url in self.dead else driver.well(url)

    def kill(self, url: str) -> None:
        """All connections break, in any order; the probes that follow are refused a little later."""
        self.died.append(url)
        self.dead[url] = self.driver.now
        rooms = [room for room, post in self.driver.open.items() if post.url == url]
        self.chance.shuffle(rooms)
        for room in rooms:
            if room in self.driver.open:
                self.driver.answer(room, Verdict.CUT_OFF)

    def run(self, seconds: float = 40.0) -> None:
        for _ in range(int(seconds / STEP)):
            self.step()


def outcome(cluster: Cluster, base: str) -> str:
    failed = any(isinstance(one, GiveUp) for one in cluster.driver.news_of(base))
    return "failed" if failed else "delivered" if base in cluster.driver.forgotten else "lost"


@pytest.mark.parametrize("seed", range(30))
@pytest.mark.parametrize("healthy", [3, 6, 9])
def test_a_poisoned_part_kills_at_most_three_of_four_encoders_and_no_healthy_part(healthy: int, seed: int) -> None:
    cluster = Cluster(4, seed)
    bases = []
    poisoned = cluster.chance.randrange(healthy + 1)
    for number in range(healthy + 1):
        base = cluster.driver.dispatch(cluster.chance.choice((0.5, 1.0, 2.0)))
        if number == poisoned:
            cluster.poison.add(base)
        else:
            bases.append(base)
        if cluster.chance.random() < 0.3:
            cluster.step()
    cluster.run()
    assert len(cluster.died) <= 3
    assert [outcome(cluster, base) for base in bases] == ["delivered"] * healthy
    (bad,) = cluster.poison
    assert outcome(cluster, bad) == "failed"


@pytest.mark.parametrize("seed", range(10))
def test_a_poisoned_part_dies_in_steady_traffic_and_the_traffic_goes_on(seed: int) -> None:
    """Dead encoders come back after five seconds."""
    cluster = Cluster(4, seed, back_after=5.0)
    bases = []
    for number in range(400):
        if number % 4 == 0:
            bases.append(cluster.driver.dispatch(cluster.chance.choice((0.5, 1.0, 2.0))))
        if number == 100:
            cluster.poison.add(cluster.driver.dispatch(1.0))
        cluster.step()
    cluster.run(20.0)
    assert len(cluster.died) <= 3
    assert [outcome(cluster, base) for base in bases] == ["delivered"] * len(bases)
