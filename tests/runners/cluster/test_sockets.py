"""What listens while a local Ray runs, and what of it answers whoever has no token."""

import contextlib
import os
import socket
from ipaddress import ip_address

import psutil
import pytest

from deadbench.runners.cluster import joining
from deadbench.runners.cluster.network import free_port

# A method of each service, which does no harm where it is let through.
METHODS = (
    "/ray.rpc.NodeInfoGcsService/GetAllNodeInfo", "/ray.rpc.NodeManagerService/GetSystemConfig",
    "/ray.rpc.CoreWorkerService/GetCoreWorkerStats", "/ray.rpc.ReporterService/GetTraceback",
)  # fmt: skip


def listening():
    """(process, place) of each listening socket of this process and those that it started."""
    me = psutil.Process()
    for process in (me, *me.children(recursive=True)):
        for each in process.net_connections("inet"):
            if each.status == psutil.CONN_LISTEN:
                yield process.name(), (each.laddr.ip.removeprefix("::ffff:"), each.laddr.port)  # IPv4 in IPv6


def over_http(place):
    """The status of an answer to a GET, None where it is none of HTTP."""
    with socket.create_connection(place, timeout=3) as connection:
        connection.sendall(b"GET /metrics HTTP/1.0\r\n\r\n")
        words = connection.recv(64).split()
    return int(words[1]) if words and words[0].startswith(b"HTTP/") else None


def over_grpc(place):
    """What becomes of a call of each method without a token."""
    import grpc

    with grpc.insecure_channel(f"{place[0]}:{place[1]}") as channel:
        for method in METHODS:
            try:
                channel.unary_unary(method)(b"", timeout=3)
            except grpc.RpcError as error:
                yield error.code().name
            else:
                yield "answered"


def test_all_that_listens_is_on_the_loopback_address(ray_session):
    ray_session.get(ray_session.remote(lambda: None).remote())
    places = [(process, ip_address(place[0])) for process, place in listening()]
    assert {process for process, _ in places} >= {"gcs_server", "raylet", "ray::DashboardAgent", "ray::RuntimeEnvAgent"}
    assert [(process, place) for process, place in places if not place.is_loopback] == []


def test_nothing_but_metrics_answers_without_the_token(ray_session):
    ray_session.get(ray_session.remote(lambda: None).remote())
    told, refused = [], 0
    for process, place in listening():
        status = over_http(place)
        if status is not None:
            told.append((process, status))
            continue
        codes = set(over_grpc(place))
        assert codes <= {"UNAUTHENTICATED", "UNIMPLEMENTED"}, (process, place)
        refused += "UNAUTHENTICATED" in codes
    assert refused >= 4, "head, raylet, driver and a worker"
    answered = {process for process, status in told if status == 200}
    assert answered <= {"ray::DashboardAgent"}, "and that is off in a run"
    assert 401 in [status for _, status in told], "the agent of runtime environments"


def test_a_local_run_has_no_metrics_for_all_to_read(monkeypatch):
    from ray._private import ray_constants

    asked, ports = {}, ("AUTOSCALER_METRIC_PORT", "DASHBOARD_METRIC_PORT")

    def init(**options):
        asked.update(options, cluster=ray_constants.ENABLE_RAY_CLUSTER, ports=[os.environ[each] for each in ports])

    for each in ports:
        monkeypatch.delenv(each, raising=False)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    monkeypatch.setattr("ray.init", init)
    monkeypatch.delenv(ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR, raising=False)
    monkeypatch.setattr("ray.shutdown", lambda: None)
    monkeypatch.setattr(joining, "_close_token", lambda: None)
    monkeypatch.setattr(joining, "watched", lambda folder: contextlib.nullcontext())
    joining.connect("local").leave()
    assert asked["_system_config"] == {"enable_metrics_collection": False}
    assert asked["ports"] == ["-1", "-1"], "of which none can be"
    assert not {*ports} & set(os.environ)
    assert asked["include_dashboard"] is False
    assert asked["cluster"] is False, "on loopback"
    monkeypatch.setenv(ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR, "1")
    joining.connect("local").leave()
    assert asked["cluster"] is ray_constants.ENABLE_RAY_CLUSTER is True


@pytest.mark.slow
def test_the_place_where_ranks_meet_is_at_its_address_alone(monkeypatch):
    import torch.distributed as dist

    from deadbench.runners.worker.group import join_group

    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    place = ("127.0.0.1", free_port("127.0.0.1"))
    group = join_group(0, 1, place)
    try:
        group.store.set("is", "there")
        mine = [each.laddr for each in psutil.Process().net_connections("inet") if each.status == psutil.CONN_LISTEN]
        assert place in [tuple(each) for each in mine]
        assert [each for each in mine if not ip_address(each.ip.removeprefix("::ffff:")).is_loopback] == []
    finally:
        dist.destroy_process_group()
