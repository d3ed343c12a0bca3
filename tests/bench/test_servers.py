"""Whole servers: from the seconds of their requests to the table."""

from sglang_mm_conn.bench.servers import Figures, RoundResult, comparisons


def one_round(alone: float, rate: float) -> RoundResult:
    return RoundResult((alone,) * 3, (1.0,) * 8, 8 / rate, int(8e4 / rate))


def test_transports_are_compared_within_rounds_so_that_noise_affects_all_alike() -> None:
    slow = 10.0  # everything takes ten times as long in the second round
    ours = Figures("conn_multimodal", [one_round(0.1, 30), one_round(0.1 * slow, 30 / slow), one_round(0.1, 33)])
    builtin = Figures("mooncake", [one_round(0.2, 20), one_round(0.2 * slow, 20 / slow), one_round(0.2, 20)])
    (line,) = comparisons([ours, builtin])
    assert (
        "conn_multimodal / mooncake" in line and "requests/s with 8 clients 1.50" in line and "one client 0.50" in line
    )
    assert comparisons([builtin]) == []


def test_row_shows_latency_of_all_requests_and_median_and_extreme_rates_of_rounds() -> None:
    figures = Figures("mooncake", [one_round(0.1, 10), one_round(0.3, 20), one_round(0.2, 60)])
    assert figures.cells() == ("mooncake", "200", "300", "20.00", "10.00 to 60.00", "1000", "500")
