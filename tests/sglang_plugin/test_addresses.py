"""Where a server says that it is found."""

import socket

import pytest

from sglang_mm_conn.sglang_plugin.addresses import bind_address, reached_at


def own_address() -> str:
    """An address of this host that is not loopback; empty where it has none. Nothing is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # RFC 5737: nobody's
        except OSError:
            return ""
        return str(probe.getsockname()[0])


OWN = own_address()


@pytest.mark.skipif(not OWN, reason="this machine has no address but loopback; test_two_hosts.py makes some")
def test_server_with_its_own_address_is_reached_there_whatever_sglang_takes_for_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("SGLANG_HOST_IP", "127.0.0.1")
    assert reached_at(OWN) == bind_address(OWN) == OWN


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "0.0.0.0", "::", "", None])
def test_a_server_whose_host_says_nothing_to_others_is_reached_where_sglang_says(
    host: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SGLANG_HOST_IP", "10.0.0.7")
    assert reached_at(host) == "10.0.0.7"
    assert bind_address(host) in ("127.0.0.1", "::1", "0.0.0.0", "::")


@pytest.mark.parametrize("host", ["192.0.2.1", "2001:db8::1"])
def test_a_node_that_was_given_another_nodes_host_is_not_reached_there(
    host: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SGLANG_HOST_IP", "10.0.0.7")
    assert reached_at(host) == "10.0.0.7"
