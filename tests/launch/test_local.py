"""Local workers: devices, commands and termination."""

import sys
import time

import pytest
import torch

from sslrun.launch import local


@pytest.mark.parametrize(
    ("device", "count", "expected"),
    [
        ("cuda", 8, [f"cuda:{number}" for number in range(8)]),
        (
            "cuda",
            3,
            ["cuda:0", "cuda:1", "cuda:2", "cuda:0", "cuda:1", "cuda:2", "cuda:0", "cuda:1"],
        ),
        ("cuda:1", 8, ["cuda:1"] * 8),
        ("cpu", 8, ["cpu"] * 8),
    ],
)
def test_each_worker_gets_a_gpu_in_turn(device, count, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    assert local.spread(torch.device(device), 8) == expected


def test_a_workers_command_names_its_device():
    command = local.command_on(["sweep", "a.yaml", "--device=auto", "--runs=x"], "cuda:3")
    assert command[1:] == ["-m", "sslrun", "sweep", "a.yaml", "--runs=x", "--device=cuda:3"]


def test_the_first_worker_waits_for_the_others(tmp_path):
    code = (
        "import os, pathlib, time; time.sleep(0.3); "
        f"pathlib.Path(r'{tmp_path}', os.environ['OMP_NUM_THREADS']).touch()"
    )
    assert local.beside(lambda: "mine", [[sys.executable, "-c", code]], 3) == "mine"
    assert (tmp_path / "3").exists()


def test_the_other_workers_end_with_the_first():
    began = time.monotonic()

    def fails():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        local.beside(fails, [[sys.executable, "-c", "import time; time.sleep(100)"]], 1)
    assert time.monotonic() - began < 30


def test_a_sweep_gives_each_worker_its_device(tmp_path, monkeypatch):
    from sslrun.stages import sweep
    from sslrun.stages.context import Context
    from sslrun.training.device import Compute

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(Compute, "use_threads", lambda *_: None)
    started = []
    monkeypatch.setattr(
        local, "beside", lambda work, commands, threads: started.extend(commands) or []
    )
    assert (
        sweep.launch(
            [],
            Context(tmp_path, Compute(torch.device("cuda"))),
            4,
            ["sweep", "a.yaml", "--device=auto"],
        )
        == []
    )
    assert [command[-1] for command in started] == [
        "--device=cuda:1",
        "--device=cuda:2",
        "--device=cuda:3",
    ]
