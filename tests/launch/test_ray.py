"""Ray: options, errors, and a cluster of two nodes on this machine that loses one of them."""

import builtins
import socket
import threading
from dataclasses import replace

import pytest

from sslrun.errors import UserError
from sslrun.launch import Workers, build
from sslrun.launch.engine import describe_exit
from sslrun.launch.ray import Tasks, run_worker
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


def test_several_gpus_train_one_network_and_not_a_worker_of_a_sweep(tmp_path):
    engine = build("ray", ["gpus=2"])
    sweep = Workers((), 2, "cuda", tmp_path, "mine")
    assert engine.count_devices(replace(sweep, is_sweep=False)) == 2
    with pytest.raises(UserError, match="-E gpus=2: a worker of a sweep uses one GPU"):
        engine.count_devices(sweep)
    with pytest.raises(UserError, match=r"-E gpus=1.5: should be a whole number, or below 1"):
        build("ray", ["gpus=1.5"])
    assert build("ray", ["gpus=0.25"]).count_devices(sweep) == 1


class FakeRay:
    """Tasks that end at once with an exit code."""

    def __init__(self, code):
        self.code, self.starts = code, 0

    def remote(self, *arguments):
        self.starts += 1
        return self.starts

    def wait(self, references, **options):
        return references, []

    def get(self, reference):
        return "here", self.code, describe_exit(self.code)


@pytest.mark.parametrize(("code", "starts"), [(0, 1), (2, 1), (130, 1), (-9, 4), (1, 4)])
def test_a_worker_that_made_a_mistake_is_not_started_again(code, starts, tmp_path):
    fake = FakeRay(code)
    workers = Workers((), 1, "cpu", tmp_path, "mine")
    tasks = Tasks(fake, fake, workers, build("ray", ["retries=3"]).options)
    ends = []
    while tasks.is_running:
        ends += tasks.ends()
    assert fake.starts == len(ends) == starts
    assert not ends[-1].restarted


RESOURCES = {"num_cpus": 1, "object_store_memory": 80 * 2**20}
"""Of a node."""


@pytest.fixture(scope="module")
def cluster():
    """A Ray cluster of one node on this machine."""
    pytest.importorskip("ray", reason="ray is not installed")
    from ray.cluster_utils import Cluster

    arguments = {**RESOURCES, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=arguments)
    yield cluster
    cluster.shutdown()


@pytest.mark.usefixtures("cheap_workers")
def test_a_sweep_survives_the_loss_of_a_node(cluster, tiny, expected, waiting, capsys):
    node = cluster.add_node(**RESOURCES)
    engine = build("ray", [f"address={cluster.address}"])

    def lose_the_node():
        tiny.wait_for_held(2)
        cluster.remove_node(node, allow_graceful=False)
        waiting.unlink()

    killer = threading.Thread(target=lose_the_node)
    killer.start()
    failures = launch([tiny.plan], tiny.context, engine, tiny.workers)
    killer.join()
    assert failures == []
    deaths = [line for line in capsys.readouterr().err.splitlines() if "died" in line]
    assert len(deaths) == 1
    assert "another one takes its place" in deaths[0]
    assert tiny.outcome == expected


@pytest.mark.usefixtures("cheap_workers")
def test_a_pretraining_gives_the_bits_of_this_machine(cluster, tmp_path, sslrun):
    (tmp_path / "one.yaml").write_text(
        "name: one\nbackbone: {name: mlp, width: 16}\ndata: {name: digits, size: 8}\n"
        "pretext: rotation\npretrain: {steps: 5, batch: 32}\n"
    )
    command = ("pretrain", "one.yaml", "--device=cpu")
    engine = ("--engine=ray", f"-Eaddress={cluster.address}")
    there = sslrun(*command, "--runs=there", *engine, cwd=tmp_path).stdout.strip()
    here = sslrun(*command, "--runs=here", cwd=tmp_path).stdout.strip()
    names = ("backbone.safetensors", "recipe.yaml")
    for name in names:
        assert (tmp_path / there / name).read_bytes() == (tmp_path / here / name).read_bytes()
    done = sslrun(*command, "--gpus=2", *engine, cwd=tmp_path, code=2)
    assert done.stderr == "sslrun: --gpus 2: with --engine ray write -E gpus=2\n"
