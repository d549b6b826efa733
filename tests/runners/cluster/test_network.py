"""Ranks take the network interface that Ray's own traffic takes."""

import os
import socket
from types import SimpleNamespace

import psutil
import pytest
import ray

from deadbench.runners.cluster import actors
from deadbench.runners.cluster.network import interface_of, use_interface_of


@pytest.fixture
def interfaces(monkeypatch):
    def at(address, family=socket.AF_INET):
        return SimpleNamespace(family=family, address=address)

    found = {
        "lo": [at("127.0.0.1")],
        "eth0": [at("10.0.0.7"), at("fe80::1%eth0", socket.AF_INET6)],
        "ib0": [at("10.1.0.7")],
    }
    monkeypatch.setattr(psutil, "net_if_addrs", lambda: found)
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


def test_the_interface_is_the_one_that_holds_rays_address(interfaces):
    assert [interface_of(each) for each in ("10.1.0.7", "127.0.0.1", "fe80::1", "127.0.1.1")] == [
        "ib0",
        "lo",
        "eth0",
        None,
    ]
    use_interface_of("10.1.0.7")
    assert (os.environ["GLOO_SOCKET_IFNAME"], os.environ["NCCL_SOCKET_IFNAME"]) == ("ib0", "=ib0")


def test_an_actor_listens_where_ray_does_before_it_does_anything_else(interfaces, monkeypatch):
    monkeypatch.setattr(ray, "remote", lambda **options: lambda kind: kind)
    monkeypatch.setattr(ray.util, "get_node_ip_address", lambda: "10.1.0.7")
    monkeypatch.setattr(actors, "mark_process", lambda token: None)
    actors.actor_class({})("a token")
    assert (os.environ["GLOO_SOCKET_IFNAME"], os.environ["NCCL_SOCKET_IFNAME"]) == ("ib0", "=ib0")


def test_what_the_user_chose_stays(interfaces, monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth0")
    use_interface_of("10.1.0.7")
    assert os.environ["GLOO_SOCKET_IFNAME"] == "eth0"
