"""Where the ranks of a group meet: on the network of a node that Ray's own traffic takes, at a port that is free."""

import os
import socket

import psutil


def interface_of(address: str) -> str | None:
    """The name of the network interface that has `address`; None where none has it."""
    for name, addresses in psutil.net_if_addrs().items():
        if any(each.address.partition("%")[0] == address for each in addresses):
            return name
    return None


def free_port(address: str = "") -> int:
    """A port that nobody listens at, at `address`, or at any of this node's."""
    with socket.socket() as free:
        free.bind((address, 0))
        return int(free.getsockname()[1])


def use_interface_of(address: str) -> None:
    """Have gloo and NCCL take the interface of `address`, unless the user chose: gloo takes what the hostname is.

    On Debian that is 127.0.1.1, at which no other node is met.
    """
    name = interface_of(address)
    if name is not None:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
        os.environ.setdefault("NCCL_SOCKET_IFNAME", f"={name}")  # this one, and none whose name begins like it
