"""A tiny sweep that engines run, and its outcome in this process."""

import os
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from sslrun import plugins
from sslrun.launch import Workers
from sslrun.pretexts.base import pretexts
from sslrun.recipe import load_sweep
from sslrun.stages.context import Context
from sslrun.stages.sweep import Plan, work
from sslrun.training.device import compute

SWEEP = """\
name: few
base:
  name: tiny
  backbone: {name: mlp, width: 16, depth: 1}
  data: {name: digits, size: 8}
  pretext: waiting
  pretrain: {steps: 60, batch: 32}
  evaluate: {digits: {protocols: [knn]}}
rows:
  one: {}
  two: {pretrain.lr: 0.01}
"""


PLUGIN = Path(__file__).with_name("waiting.py")
"""Its pretext task lets a worker hold a run until the test goes on."""


class TinySweep:
    """The sweep in a folder: its plan there, its workers, and which of them holds which run."""

    def __init__(self, folder: Path):
        self.file, self.runs = folder / "few.yaml", folder / "runs"
        self.file.write_text(SWEEP)
        self.plan = Plan.of(load_sweep(self.file), self.runs)
        arguments = ("sweep", str(self.file), f"--runs={self.runs}", f"--import={PLUGIN}")
        self.workers = Workers(arguments, 2, "cpu", folder / "logs", folder.name)
        self.context = Context(self.runs, compute("cpu"))

    def wait_for_held(self, count, seconds=120.0):
        """Wait until workers hold `count` pretrainings; return (holder, run) pairs."""
        runs = {job.run.path: job.run for job in self.plan.jobs if job.run.stage == "pretrain"}
        end = time.monotonic() + seconds
        while len(held := [run for run in runs.values() if run.holders]) < count:
            assert time.monotonic() < end, f"after {seconds:.0f} s workers hold {held}"
            time.sleep(0.05)
        return [(run.holders[-1], run) for run in held]

    @property
    def outcome(self):
        """The table's text and the weights, which are the same however the sweep is run."""
        weights = sorted(self.runs.glob("tiny/pretrain-*/backbone.safetensors"))
        table = self.plan.table()
        return table.to_json(), [path.read_bytes() for path in weights]


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))


@pytest.fixture
def waiting(tmp_path, monkeypatch):
    """A file; while it exists, a worker stays in the first step of the run that it holds."""
    path = tmp_path / "waiting"
    path.touch()
    monkeypatch.setenv("SSLRUN_WAIT", str(path))
    return path


@pytest.fixture
def cheap_workers(monkeypatch, forking_python):
    """Let engines start their workers by fork, as each import of torch takes ten seconds."""
    paths = (forking_python.parent, Path(__file__).parents[2])
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(map(str, paths)))
    monkeypatch.setattr(sys, "executable", str(forking_python))


@contextmanager
def plugin_loaded():
    """Know the plug-in's pretext task in this process, for a while."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plugins, "_modules", {})
        patch.setattr(pretexts, "_classes", dict(pretexts._classes))
        plugins.load_files([PLUGIN])
        yield


@pytest.fixture
def tiny(tmp_path):
    folder = tmp_path / "tiny"
    folder.mkdir()
    with plugin_loaded():
        yield TinySweep(folder)


@pytest.fixture(scope="session")
def expected(tmp_path_factory):
    """The outcome of the sweep in this process."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the workers; another number adds in another order
    try:
        with plugin_loaded():
            sweep = TinySweep(tmp_path_factory.mktemp("expected"))
            assert work([sweep.plan], sweep.context) == []
            return sweep.outcome
    finally:
        torch.set_num_threads(threads)
