"""A short version of `make faults`: a few kills of fine-tuning, and a few mutated recipes."""

import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("hypothesis")
sys.path.insert(0, str(Path(__file__).parent))

import fuzz
import kills
from tally import Tally

from sslrun.stages import fit


@pytest.mark.skipif(sys.platform != "linux", reason="forks processes that have imported torch")
def test_killed_fine_tuning_ends_with_the_same_bits(tmp_path, monkeypatch):
    monkeypatch.setattr(fit, "LOG_SECONDS", -1.0)
    threads, tally = torch.get_num_threads(), Tally()
    torch.set_num_threads(1)  # a process with threads cannot be forked safely
    try:
        kills.run(1, 0, tmp_path, tally, {"finetune"})
    finally:
        torch.set_num_threads(threads)
    assert not tally.findings, tally.render()
    assert tally.outcomes_of("the same bits") == 1


def test_mutated_recipes_are_built_or_refused_in_one_line(tmp_path):
    tally = Tally()
    fuzz.run(25, 0, tmp_path, tally, {"simclr-cifar10", "mlm-wikipedia", "digits", "quickstart"})
    assert not tally.findings, tally.render()
    assert sum(tally.outcomes.values()) == 25
    assert tally.outcomes_of("builds") > 0


def test_a_difference_is_found():
    import processes

    before = {"a/result.json": {"accuracy": 1.0}, "a/head.safetensors": "0f"}
    assert processes.differences(dict(before), before) == []
    after = {"a/result.json": {"accuracy": 1.1}, "a/.left.0a1b2c3d": "1e"}
    assert processes.differences(after, before) == sorted({*before, *after})
