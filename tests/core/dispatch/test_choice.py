"""Who gets which items: splits, runs, homes by content, and the bounds of both."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from sglang_mm_conn.core.dispatch import choice
from sglang_mm_conn.core.dispatch.choice import BUSY_BOUND_OF_KEPT, PART_SECONDS, Candidate, Chooser, Item, Share

URLS = [f"http://encoder-{number}:30000" for number in range(4)]


def candidates(
    *backlogs: float, rate: float = 0.1, caches: bool = False, rates: tuple[float, ...] = ()
) -> list[Candidate]:
    rates = rates or (rate,) * len(backlogs)
    return [
        Candidate(url, backlog, one, 0.0, caches)
        for url, backlog, one in zip(URLS, backlogs, rates, strict=False)
    ]  # fmt: skip


def images(*works: float) -> list[Item]:
    return [Item("IMAGE", work) for work in works]


def keyed(count: int, name: str = "", work: float = 1.0) -> list[Item]:
    return [Item("IMAGE", work, f"{name}{number}") for number in range(count)]


def test_an_item_goes_where_it_is_done_first() -> None:
    assert Chooser().share_out(images(1), candidates(5, 0, 5)) == [Share(URLS[1], 0, 1)]
    # The longer queue is the faster one's.
    assert Chooser().share_out(images(1), candidates(4, 2, rates=(0.1, 0.3))) == [Share(URLS[0], 0, 1)]


def test_of_two_equals_the_one_that_got_less_is_chosen() -> None:
    two = candidates(0, 0)
    two[0].share = 5.0
    assert Chooser().share_out(images(1), two) == [Share(URLS[1], 0, 1)]


def test_items_are_split_only_where_that_is_faster() -> None:
    # 2 x 1 unit at 0.1 s: together 0.2 s, apart 0.1 s and one more part.
    assert len(Chooser().share_out(images(1, 1), candidates(0, 0))) == 2
    small = PART_SECONDS / 0.1 / 3
    assert len(Chooser().share_out(images(small, small), candidates(0, 0))) == 1
    assert Chooser().share_out(images(1, 1), candidates(0, 50)) == [Share(URLS[0], 0, 2)]


@pytest.mark.parametrize("seed", range(20))
def test_without_caches_an_encoder_gets_one_run_and_every_item_has_one_encoder(seed: int) -> None:
    chance = random.Random(seed)
    for _ in range(50):
        items = images(*(chance.choice((0.1, 1, 5)) for _ in range(chance.randrange(1, 20))))
        some = candidates(*(chance.choice((0.0, 1, 9)) for _ in range(chance.randrange(1, 5))))
        shares = Chooser().share_out(items, some)
        assert len({share.url for share in shares}) == len(shares)
        assert [index for share in shares for index in range(share.first, share.first + share.count)] == [
            *range(len(items))
        ]


@pytest.mark.parametrize("seed", range(20))
def test_a_run_is_the_work_that_its_encoder_should_get_in_any_order_of_items(seed: int) -> None:
    """Items of one run stay together, so the work may be off by one item."""
    chance = random.Random(seed)
    items = images(*(chance.choice((0.1, 0.5, 2, 8)) for _ in range(chance.randrange(4, 16))))
    some = candidates(0, 0, 0, 0)
    got = dict.fromkeys(URLS, 0.0)
    for share in Chooser().share_out(items, some):
        got[share.url] += sum(item.work for item in items[share.first : share.first + share.count])
    assert all(abs(got[one.url] - one.backlog) <= max(item.work for item in items) for one in some)
    assert sorted(Chooser().share_out(images(*[1] * 10, 10), candidates(0, 0)), key=lambda one: one.first) == [
        Share(URLS[0], 0, 10), Share(URLS[1], 10, 1)
    ]  # fmt: skip


def test_work_that_is_given_counts_for_the_next_modality() -> None:
    two = candidates(0, 0)
    Chooser().share_out(images(1), two)
    assert sorted((one.backlog, one.share) for one in two) == [(0, 0), (1, 1)]


def test_a_known_item_goes_where_it_went_before() -> None:
    chooser = Chooser()
    for item in keyed(30):
        (first,) = chooser.share_out([item], candidates(0, 0, 0, 0, caches=True))
        for _ in range(3):
            some = candidates(0, 0, 0, 0, caches=True)
            random.Random(1).shuffle(some)
            assert chooser.share_out([item], some) == [first]


def test_items_of_one_request_go_by_content_as_runs_in_their_order() -> None:
    chooser = Chooser()
    items = keyed(12)
    shares = chooser.share_out(items, candidates(0, 0, 0, 0, caches=True))
    assert [index for share in shares for index in range(share.first, share.first + share.count)] == [*range(12)]
    assert all(one.url != after.url for one, after in itertools.pairwise(shares))


def test_an_item_without_a_key_makes_the_request_go_by_speed() -> None:
    chooser = Chooser()
    items = [*keyed(1), Item("IMAGE", 1.0)]
    busy = candidates(50, 0, 50, 50, caches=True)
    assert {share.url for share in chooser.share_out(items, busy)} == {URLS[1]}


def test_only_encoders_with_caches_are_homes() -> None:
    chooser = Chooser()
    for item in keyed(40):
        mixed = candidates(0, 0, 0, 0)
        mixed[2].caches = True
        assert chooser.share_out([item], mixed) == [Share(URLS[2], 0, 1)]


def test_a_kept_item_is_encoded_elsewhere_while_its_encoder_is_too_busy() -> None:
    chooser = Chooser()
    (item,) = keyed(1)
    (home,) = chooser.share_out([item], candidates(0, 0, 0, 0, caches=True))
    for backlog in (1.0, BUSY_BOUND_OF_KEPT - 1.1):  # it finishes not much later than the others would
        some = candidates(0, 0, 0, 0, caches=True)
        next(one for one in some if one.url == home.url).backlog = backlog
        assert chooser.share_out([item], some) == [home]
    some = candidates(5, 5, 5, 5, caches=True)
    next(one for one in some if one.url == home.url).backlog = 7 * BUSY_BOUND_OF_KEPT
    (other,) = chooser.share_out([item], some)
    assert other.url != home.url
    # This once: its home still keeps it.
    assert chooser.share_out([item], candidates(0, 0, 0, 0, caches=True)) == [home]


def test_an_item_whose_encoder_is_gone_gets_another_home_and_stays_there() -> None:
    chooser = Chooser()
    (item,) = keyed(1)
    (home,) = chooser.share_out([item], candidates(0, 0, 0, 0, caches=True))
    left = [one for one in candidates(0, 0, 0, 0, caches=True) if one.url != home.url]
    (other,) = chooser.share_out([item], left)
    assert other.url != home.url
    assert chooser.share_out([item], candidates(0, 0, 0, 0, caches=True)) == [other]


def test_a_key_with_a_lone_surrogate_has_a_home() -> None:
    assert Chooser().share_out([Item("IMAGE", 1.0, "\ud800")], candidates(0, 0, caches=True))


@contextmanager
def remembering(items: int) -> Iterator[None]:
    before = choice._REMEMBERED_ITEMS
    choice._REMEMBERED_ITEMS = items
    try:
        yield
    finally:
        choice._REMEMBERED_ITEMS = before


def test_memory_of_items_is_limited_and_the_newest_stay() -> None:
    with remembering(10):
        chooser = Chooser()
        items = keyed(11)
        for item in [*items[:10], items[0], items[10]]:
            chooser.share_out([item], candidates(0, 0, caches=True))
        assert set(chooser._went) == {item.key for item in items} - {items[1].key}


class Server:
    """One language server: a chooser, and encoders whose work is done long before the next request."""

    def __init__(self, urls: list[str]) -> None:
        self.chooser = Chooser()
        self.shares = dict.fromkeys(urls, 0.0)

    def send(self, item: Item) -> str:
        some = [Candidate(url, 0.0, 0.1, share, True) for url, share in self.shares.items()]
        (share,) = self.chooser.share_out([item], some)
        self.shares[share.url] += item.work
        return share.url


def test_two_servers_agree_on_the_homes_of_nearly_all_items() -> None:
    chance = random.Random(3)
    items = keyed(2000)
    one, other = Server(URLS), Server(URLS)
    first = {item.key: one.send(item) for item in items}
    chance.shuffle(items)
    second = {item.key: other.send(item) for item in items}
    assert sum(first[key] == second[key] for key in first) >= 0.95 * len(items)


def test_servers_agree_on_most_homes_also_under_load_and_with_rates_measured_apart() -> None:
    items = keyed(1500)
    homes: list[dict[str, str]] = []
    for seed in range(2):
        chance = random.Random(seed)
        chooser, shares = Chooser(), dict.fromkeys(URLS, 0.0)
        homes.append({})
        for item in chance.sample(items, len(items)):
            some = [
                Candidate(url, chance.uniform(0, 10), 0.1 * chance.uniform(0.8, 1.25), share, True)
                for url, share in shares.items()
            ]
            (share,) = chooser.share_out([item], some)
            shares[share.url] += item.work
            homes[-1][item.key] = share.url
    assert sum(homes[0][item.key] == homes[1][item.key] for item in items) >= 0.85 * len(items)


def test_an_encoder_that_is_stuck_is_no_home_for_new_items() -> None:
    for item in keyed(50):
        some = candidates(100, 2, 3, 1, caches=True)
        assert Chooser().share_out([item], some)[0].url != URLS[0]


def test_a_home_is_found_whatever_was_measured() -> None:
    for rates in ((0.0, 0.0, 0.0, 0.0), (0.0, 1e9, 1.0, 1e-9), (1e-9, 0.0, 0.0, 1e9)):
        for backlog in (0.0, 1e9):
            some = candidates(backlog, 0, backlog, 0, rates=rates, caches=True)
            assert sum(share.count for share in Chooser().share_out(keyed(20), some)) == 20
    assert Chooser().share_out(keyed(3), candidates(9, caches=True)) == [Share(URLS[0], 0, 3)]


def test_an_encoder_less_moves_its_own_items_alone() -> None:
    items = keyed(1000)
    all_of_them, fewer = Server(URLS), Server(URLS[:3])
    before = {item.key: all_of_them.send(item) for item in items}
    after = {item.key: fewer.send(item) for item in items}
    stayed = [key for key, url in before.items() if url in URLS[:3]]
    assert sum(before[key] == after[key] for key in stayed) >= 0.93 * len(stayed)


def test_no_encoder_gets_much_more_than_its_share() -> None:
    """100 new items, for 200 random sets of URLs."""
    chance = random.Random(7)
    for trial in range(200):
        urls = [f"http://{chance.randbytes(4).hex()}:{chance.randrange(1, 65536)}" for _ in range(4)]
        server = Server(urls)
        got = Counter(server.send(item) for item in keyed(100, f"{trial} "))
        assert max(got.values()) <= 1.3 * 100 / len(urls)
