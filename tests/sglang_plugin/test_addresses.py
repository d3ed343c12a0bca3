"""Where a server says that it is found."""

import pytest

from sglang_mm_conn.sglang_plugin.addresses import bind_address, reached_at


@pytest.mark.parametrize("host", ("10.0.0.2", "fd00::2"))
def test_a_server_with_an_address_of_its_own_is_reached_there_whatever_sglang_takes_for_the_hosts(
    host: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SGLANG_HOST_IP", "127.0.0.1")
    assert reached_at(host) == bind_address(host) == host


@pytest.mark.parametrize("host", ("127.0.0.1", "localhost", "0.0.0.0", "::", "", None))
def test_a_server_whose_host_says_nothing_to_others_is_reached_where_sglang_says(
    host: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SGLANG_HOST_IP", "10.0.0.7")
    assert reached_at(host) == "10.0.0.7"
    assert bind_address(host) in ("127.0.0.1", "::1", "0.0.0.0", "::")
