"""Addresses of this machine are found without a name and without sending anything, and an attempt to reach one ends in time."""

from __future__ import annotations

import ipaddress
import socket
import time

import psutil
import pytest

from rlhf_ray import network


def test_an_interface_is_found_by_its_address() -> None:
    lo = network.interface_with(network.LOOPBACK)
    assert lo is not None
    assert network.LOOPBACK in {one.address for one in psutil.net_if_addrs()[lo]}
    assert network.interface_with("198.51.100.77") is None


def test_gloo_nccl_and_vllm_are_told_the_interface_and_nccl_its_whole_name() -> None:
    lo = network.interface_with(network.LOOPBACK)
    told = network.variables_at(network.LOOPBACK)
    assert told == {"VLLM_HOST_IP": network.LOOPBACK, "GLOO_SOCKET_IFNAME": lo, "NCCL_SOCKET_IFNAME": f"={lo}"}
    assert network.variables_at("198.51.100.77") == {"VLLM_HOST_IP": "198.51.100.77"}


def test_no_name_is_resolved_to_find_the_address_that_others_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(*_: object) -> None:
        raise socket.gaierror("Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    monkeypatch.setattr(socket, "gethostbyname", unknown)
    monkeypatch.setattr(socket, "gethostname", lambda: "nowhere")
    address = network.outward_address()
    assert not ipaddress.ip_address(address).is_unspecified
    assert network.interface_with(address) is not None
    others = {
        one.address
        for name, addresses in psutil.net_if_addrs().items()
        for one in addresses
        if one.family == socket.AF_INET and psutil.net_if_stats()[name].isup and not network.is_loopback(one.address)
    }
    assert not others or address in others


def test_without_a_default_route_others_reach_an_interface_that_is_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(network, "ELSEWHERE", ("255.255.255.255", 9))  # the kernel refuses to connect there
    address = network.outward_address()
    assert network.interface_with(address) is not None


@pytest.mark.parametrize(
    ("configured", "variable", "joined"),
    [
        (None, None, None),
        (None, "10.0.0.1:6379", "10.0.0.1:6379"),
        ("auto", "10.0.0.1:6379", "10.0.0.1:6379"),
        ("auto", None, "auto"),
        ("10.0.0.2:6379", "10.0.0.1:6379", "10.0.0.2:6379"),
        (None, "", None),
        (None, "local", None),
        ("local", "10.0.0.1:6379", None),
    ],
)
def test_the_cluster_to_join_is_the_configs_or_that_of_the_environment(
    configured: str | None, variable: str | None, joined: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    if variable is not None:
        monkeypatch.setenv("RAY_ADDRESS", variable)
    assert network.cluster_address(configured) == joined


@pytest.mark.parametrize(
    ("address", "every", "loopback"),
    [
        ("0.0.0.0", True, False),
        ("::", True, False),
        ("::ffff:0.0.0.0", True, False),
        ("127.0.1.1", False, True),
        ("::ffff:127.0.0.1", False, True),
        ("10.0.0.1", False, False),
    ],
)
def test_an_address_is_known_in_every_spelling(address: str, every: bool, loopback: bool) -> None:
    assert (network.is_every_address(address), network.is_loopback(address)) == (every, loopback)


def test_an_attempt_to_reach_something_ends_in_time_and_says_why() -> None:
    with socket.socket() as held:
        held.bind((network.LOOPBACK, 0))
        began = time.monotonic()
        assert network.failure_to_reach(network.LOOPBACK, held.getsockname()[1], 1.0) == "Connection refused"
        held.listen()
        assert network.failure_to_reach(network.LOOPBACK, held.getsockname()[1], 1.0) is None
    assert network.failure_to_reach("a" * 70, 1, 1.0) is not None
    assert network.failure_to_reach(network.LOOPBACK, 70_000, 1.0) is not None
    assert time.monotonic() - began < 10


def test_what_accepts_no_connection_is_given_up_at_the_limit() -> None:
    with socket.socket() as full:
        full.bind((network.LOOPBACK, 0))
        full.listen(0)
        waiting = [socket.socket() for _ in range(4)]
        for one in waiting:
            one.setblocking(False)
            one.connect_ex(full.getsockname())
        assert network.failure_to_reach(*full.getsockname(), 0.3) == "no answer within 0.3 s"
        for one in waiting:
            one.close()
