"""Whole servers: from the seconds of their requests to what the table says."""

from sglang_mm_conn.bench.servers import Figures, RoundResult, comparisons


def turn(alone: float, rate: float) -> RoundResult:
    return RoundResult((alone,) * 3, (1.0,) * 8, 8 / rate, int(8e4 / rate))


def test_transports_are_compared_within_rounds_so_that_noise_hits_all_alike() -> None:
    slow = 10.0  # everything takes ten times as long in the second round
    ours = Figures("conn_multimodal", [turn(0.1, 30), turn(0.1 * slow, 30 / slow), turn(0.1, 33)])
    builtin = Figures("mooncake", [turn(0.2, 20), turn(0.2 * slow, 20 / slow), turn(0.2, 20)])
    (line,) = comparisons([ours, builtin])
    assert "beside mooncake" in line and "1.50 times the requests/s" in line and "0.50 times the time alone" in line
    assert comparisons([builtin]) == []


def test_a_row_shows_all_requests_alone_and_the_median_worst_and_best_rate_of_the_rounds() -> None:
    figures = Figures("mooncake", [turn(0.1, 10), turn(0.3, 20), turn(0.2, 60)])
    assert figures.cells() == ("mooncake", "200", "300", "20.00", "10.00 to 60.00", "1000", "500")
