"""Ray: options, errors, and a cluster of two nodes on this machine that loses one of them."""

import builtins
import socket
import threading

import pytest

from sslrun.errors import UserError
from sslrun.launch import Workers, build
from sslrun.launch.ray import run_worker
from sslrun.stages.sweep import launch


def test_without_ray_there_is_one_line(tmp_path, monkeypatch):
    original = builtins.__import__

    def refuse(name, *arguments):
        if name == "ray":
            raise ImportError(name)
        return original(name, *arguments)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(UserError, match=r"ray is not installed; run `pip install 'sslrun\[ray\]'`"):
        build("ray", ()).start(Workers((), 2, "cpu", tmp_path, "mine"))


@pytest.mark.parametrize("address", ["127.0.0.1:{port}", "ray://127.0.0.1:{port}", "nowhere:x"])
def test_an_address_that_does_not_answer_is_one_line_at_once(address, tmp_path):
    pytest.importorskip("ray", reason="ray is not installed")
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        address = address.format(port=unused.getsockname()[1])
    with pytest.raises(UserError, match=f"-E address={address}: no Ray cluster answers there"):
        build("ray", [f"address={address}"]).start(Workers((), 2, "cpu", tmp_path, "mine"))


def test_a_node_that_does_not_share_the_folder_of_the_runs_says_so(tmp_path):
    with pytest.raises(FileNotFoundError, match="that all nodes share"):
        run_worker((), "mine", str(tmp_path / "logs" / "1.log"), str(tmp_path), {})


def test_a_sweep_survives_the_loss_of_a_node(tiny, expected, capsys):
    pytest.importorskip("ray", reason="ray is not installed")
    from ray.cluster_utils import Cluster

    arguments = {"num_cpus": 1, "object_store_memory": 80 * 2**20, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=arguments)
    try:
        del arguments["include_dashboard"]
        node = cluster.add_node(**arguments)
        engine = build("ray", [f"address={cluster.address}"])

        def lose_the_node():
            tiny.wait_for_held(2)
            cluster.remove_node(node, allow_graceful=False)

        killer = threading.Thread(target=lose_the_node)
        killer.start()
        failures = launch([tiny.plan], tiny.context, engine, tiny.workers)
        killer.join()
    finally:
        cluster.shutdown()
    assert failures == []
    deaths = [line for line in capsys.readouterr().err.splitlines() if "died" in line]
    assert len(deaths) == 1
    assert "another one takes its place" in deaths[0]
    assert tiny.outcome == expected
