"""Addresses of this machine: the interface that has one, the one that others can reach, and whether anything answers there.

Invariants: nothing is sent to find an address out, and no name is resolved for it: a machine whose own name is unknown, or
is a loopback address, gives the same answers as any other. Every attempt to reach something ends within its limit.
"""

from __future__ import annotations

import ipaddress
import os
import socket

import psutil

LOOPBACK = "127.0.0.1"
ELSEWHERE = ("198.51.100.1", 9)
"""An address of no machine (RFC 5737). The kernel says which of ours a packet to it would carry; none is sent."""


def cluster_address(configured: str | None) -> str | None:
    """The Ray cluster to join: ``configured``, else what ``RAY_ADDRESS`` says; none (or ``local``) starts Ray here.

    As in Ray, ``auto`` is what ``RAY_ADDRESS`` says where it is set.
    """
    said = os.environ.get("RAY_ADDRESS") or None
    address = said or configured if configured in (None, "", "auto") else configured
    return None if address in (None, "", "local") else address


def interface_with(address: str) -> str | None:
    """The network interface of this machine that has ``address``; none if no interface has it."""
    for name, addresses in psutil.net_if_addrs().items():
        if any(one.address.partition("%")[0] == address for one in addresses):
            return name
    return None


def variables_at(address: str) -> dict[str, str]:
    """What tells gloo, NCCL and vLLM to use the interface that has ``address``."""
    variables = {"VLLM_HOST_IP": address}
    interface = interface_with(address)
    if interface is not None:
        # By itself gloo binds to what the host name resolves to. NCCL takes a name for the beginning of one, but for the "=".
        variables |= {"GLOO_SOCKET_IFNAME": interface, "NCCL_SOCKET_IFNAME": f"={interface}"}
    return variables


def is_loopback(address: str) -> bool:
    """Whether ``address`` is one that only this machine can reach."""
    known = ipaddress.ip_address(address)
    return (getattr(known, "ipv4_mapped", None) or known).is_loopback


def is_every_address(address: str) -> bool:
    """Whether a socket bound to ``address`` listens at all addresses of the machine."""
    known = ipaddress.ip_address(address)
    return (getattr(known, "ipv4_mapped", None) or known).is_unspecified


def outward_address() -> str:
    """The address at which others reach this machine: where its default route begins, else that of an interface that is up."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(ELSEWHERE)
            return str(probe.getsockname()[0])
        except OSError:  # no way out
            pass
    states = psutil.net_if_stats()
    for name, addresses in psutil.net_if_addrs().items():
        for one in addresses:
            if one.family == socket.AF_INET and states[name].isup and not is_loopback(one.address):
                return str(one.address)
    return LOOPBACK


def free_port(address: str) -> int:
    """A port at ``address``, one of this machine's, at which nothing listens now."""
    with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET) as probe:
        probe.bind((address, 0))
        return int(probe.getsockname()[1])


def failure_to_reach(host: str, port: int, limit_s: float) -> str | None:
    """Why nothing accepts a connection at ``host:port`` within ``limit_s`` seconds; none if something does."""
    try:
        socket.create_connection((host, port), timeout=limit_s).close()
    except TimeoutError:
        return f"no answer within {limit_s:g} s"
    except OSError as error:
        return error.strerror or str(error)
    except (UnicodeError, OverflowError) as error:  # no host name, or no port
        return str(error)
    return None
