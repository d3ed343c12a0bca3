"""From seconds to figures."""

from typing import Any

import pytest

from sglang_mm_conn.bench.cpu_cost import seconds_per_room, seconds_per_wake
from sglang_mm_conn.bench.measurement import comparisons, quantile, ratio_by_round, rooms_per_second, rows
from sglang_mm_conn.bench.records import Result

MIB = 1 << 20
NOTHING: dict[str, Any] = {"calls": {}}


def result(transport: str, seconds: list[float], *, in_flight: int = 0, number: int = 0, calls: int = 0) -> Result:
    side = {"calls": {"sockets": calls}}
    return Result(transport, MIB, in_flight, seconds, sum(seconds), 0.5, side, NOTHING, number)


def test_quantile_takes_a_value_that_was_measured() -> None:
    values = [float(number) for number in range(1, 101)]
    assert quantile(values, 0.99) == 99.0
    assert quantile(values, 0.5) == 50.0
    assert quantile([3.0], 0.99) == 3.0


def test_transports_are_compared_within_rounds_so_that_noise_affects_all_alike() -> None:
    slow_round, quick_round = 10.0, 1.0
    baseline = [result("memcpy", [quick_round]), result("memcpy", [slow_round], number=1)]
    transport = [result("shm", [2 * quick_round]), result("shm", [2 * slow_round], number=1)]
    assert ratio_by_round(baseline, transport) == 0.5


def test_a_row_separates_rooms_one_after_the_other_from_concurrent_ones() -> None:
    [baseline, row] = rows(
        [
            result("memcpy", [0.001]),
            result("shm", [0.002, 0.004, 0.002]),
            result("shm", [1.0] * 4, in_flight=4),
        ]
    )
    assert baseline.of_baseline == 1.0
    assert (row.median_ms, row.best_ms, row.rooms) == (2.0, 2.0, 3)
    assert row.of_baseline == 0.5
    assert row.rooms_per_s == {4: 1.0}
    assert row.cpu_s_per_gbyte == pytest.approx(0.5 / (4 * MIB / 1e9))
    assert row.gbytes_per_s == pytest.approx(MIB / 0.002 / 1e9)


def test_what_is_created_is_counted_per_room() -> None:
    [row] = rows([result("zmq", [0.001] * 4, calls=8)])
    assert row.per_room["sockets"] == 2.0
    assert row.of_baseline is None


def test_a_transport_is_compared_with_the_better_built_in_one() -> None:
    results = [result("zmq_to_scheduler", [0.008]), result("mooncake_builtin", [0.004]), result("shm", [0.002])]
    assert [row.speed_up for row in rows(results)] == [0.5, 1.0, 2.0]


def test_mooncake_is_compared_with_the_engine_and_one_copy() -> None:
    [one] = comparisons([result("engine", [0.003]), result("memcpy", [0.001]), result("mooncake", [0.006])])
    assert (one.nbytes, one.ratio, one.best) == (MIB, 1.5, 1.5)
    assert one.what == "latency ratio mooncake / (engine + memcpy)"


def test_a_round_that_was_interrupted_is_left_out() -> None:
    whole = [result("engine", [0.003]), result("memcpy", [0.001]), result("mooncake", [0.006])]
    [one] = comparisons([*whole, result("mooncake", [0.1], number=1)])
    assert one.ratio == 1.5


def test_rooms_per_second_are_those_at_the_highest_concurrency() -> None:
    results = [
        result("shm", [0.001]),
        result("shm", [1.0] * 4, in_flight=4),
        result("shm", [0.25] * 8, in_flight=8),
        result("shm", [0.5] * 8, in_flight=8, number=1),
        result("shm", [0.125] * 8, in_flight=8, number=2),
    ]
    assert rooms_per_second(results, MIB, "shm") == 4.0
    assert rooms_per_second(results[:1], MIB, "shm") is None and rooms_per_second(results, MIB, "memcpy") is None


def test_waking_a_thread_takes_time() -> None:
    assert 0 < seconds_per_wake(20) < 1


def test_the_logic_of_a_room_takes_time_on_both_sides() -> None:
    encoder, language = seconds_per_room(20, 8, 8192)
    assert encoder > 0 and language > 0
