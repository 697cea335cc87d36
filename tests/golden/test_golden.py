"""Golden losses of each pretext task, and losses and scores of the protocols, bit for bit.

A refactoring must not change them. If a change is meant to, renew the files and say why in the
commit:

    python tests/golden/renew.py [NAME...]

It prints each number that changed. Losses are compared exactly on the processor and packages that
made the files (see "environment" in them), and within a tolerance elsewhere, because sums are added
up in another order there.
"""

from __future__ import annotations

import json
import math
import os
import platform
import signal
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from sslrun import cli
from sslrun.stages import fit  # for LOG_SECONDS, the only internal name used here

HERE = Path(__file__).parent
RECIPES = yaml.safe_load((HERE / "recipes.yaml").read_text())["recipes"]
TOLERANCE = 5e-4
"""Relative difference of losses and weights on another processor: training amplifies the rounding
of differently ordered sums. Measured between AVX-512 and AVX2: at most 7e-5 (simclr, step 4), 5e-5
after 12 steps of fine-tuning (digits)."""
NEAR_ZERO = 1e-5
"""Absolute difference that is always allowed: a loss of cosines may be as small as 0.003."""
SCORE_TOLERANCE = 2.0
"""Points between scores of a few hundred test examples; some examples lie at a decision
boundary."""


def environment() -> dict[str, str]:
    """Return what the last bits depend on."""
    packages = {name: version(name) for name in ("torch", "numpy", "scikit-learn", "tokenizers")}
    return {
        **packages,
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "processor": processor(),
    }


def processor() -> str:
    """Return name, family, model and stepping: on virtual machines, generations share a name."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    facts = {
        name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)
    }
    if "model name" not in facts:
        return platform.processor() or platform.machine()
    numbers = [facts.get(name, "?") for name in ("cpu family", "model", "stepping")]
    return f"{facts['model name']} ({'/'.join(numbers)})"


@contextmanager
def reproducible(folder: Path) -> Iterator[None]:
    """Use one thread, log every step and read no old cache; restore all of it afterwards."""
    threads, pause, cache = torch.get_num_threads(), fit.LOG_SECONDS, os.environ.get("SSLRUN_CACHE")
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    torch.set_num_threads(1)
    fit.LOG_SECONDS = -1.0
    os.environ["SSLRUN_CACHE"] = str(folder / "cache")
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        fit.LOG_SECONDS = pause
        if cache is None:
            del os.environ["SSLRUN_CACHE"]
        else:
            os.environ["SSLRUN_CACHE"] = cache
        for number, handler in handlers.items():
            signal.signal(number, handler)


def measure(name: str, folder: Path) -> dict[str, Any]:
    """Run a recipe through the command line; losses, weights and scores as hexadecimal floats."""
    recipe = folder / f"{name}.yaml"
    recipe.write_text(yaml.safe_dump({"name": name, **RECIPES[name]}))
    command = "sweep" if "evaluate" in RECIPES[name] else "pretrain"
    with reproducible(folder):
        cli.app(
            [command, str(recipe), "--runs", str(folder), "--device", "cpu"], standalone_mode=False
        )
    runs: dict[str, Path] = {}
    for result in sorted(folder.glob(f"{name}/*/result.json")):
        assert key(result.parent) not in runs, (
            f"two runs are {key(result.parent)}: one would hide the other"
        )
        runs[key(result.parent)] = result.parent
    return {"losses": losses(runs), "weights": weights(runs), "scores": scores(runs)}


def key(run: Path) -> str:
    """Return a run's stage and task, without its hash, which changes with identity rules."""
    result = json.loads((run / "result.json").read_text())
    return " ".join(filter(None, [result["stage"], result.get("task")]))


def losses(runs: dict[str, Path]) -> dict[str, list[str]]:
    losses_by_run = {}
    for name, run in runs.items():
        log = run / "metrics.jsonl"
        records = (
            [json.loads(line) for line in log.read_text().splitlines()] if log.is_file() else []
        )
        if records:
            losses_by_run[name] = [record["loss"].hex() for record in records if "loss" in record]
    return losses_by_run


def weights(runs: dict[str, Path]) -> dict[str, str]:
    """Return the sum of squares of each run's saved backbone in float64.

    It is exact, because torch's sum depends on the alignment.
    """
    sums = {}
    for name, run in runs.items():
        path = run / "backbone.safetensors"
        if path.is_file():
            values = [
                value
                for tensor in load_file(path).values()
                for value in tensor.double().flatten().tolist()
            ]
            sums[name] = math.fsum(value * value for value in values).hex()
    return sums


def scores(runs: dict[str, Path]) -> dict[str, dict[str, str]]:
    """Return every metric of every split and shift."""
    scores_by_run = {}
    for name, run in runs.items():
        result = json.loads((run / "result.json").read_text())
        splits = {**result.get("metrics", {}), **result.get("shifts", {})}
        if splits:
            scores_by_run[name] = {
                f"{split} {metric}": float(value).hex()
                for split, metrics in sorted(splits.items())
                for metric, value in sorted(metrics.items())
            }
    return scores_by_run


def differences(now: Any, golden: Any, place: str = "") -> list[str]:
    """Return every changed number, as "place: golden -> now (relative difference)"."""
    if isinstance(now, dict):
        keys = sorted(now.keys() | golden.keys())
        return [
            text
            for name in keys
            for text in differences(now.get(name), golden.get(name), f"{place} {name}")
        ]
    if isinstance(now, list) and isinstance(golden, list) and len(now) == len(golden):
        pairs = enumerate(zip(now, golden, strict=True), start=1)
        return [
            text for step, (a, b) in pairs for text in differences(a, b, f"{place} step {step}")
        ]
    if now == golden:
        return []
    if not isinstance(now, str) or not isinstance(golden, str):
        return [f"{place}: {golden} -> {now}"]
    a, b = float.fromhex(now), float.fromhex(golden)
    return [f"{place}: {b:.9g} -> {a:.9g} ({(a - b) / max(abs(b), 1e-12):+.1e})"]


def close(now: Any, golden: Any, relative: float, absolute: float) -> bool:
    """Return whether both have the same places and all numbers agree within a tolerance."""
    if isinstance(golden, dict):
        return now.keys() == golden.keys() and all(
            close(now[k], golden[k], relative, absolute) for k in golden
        )
    if isinstance(golden, list):
        return len(now) == len(golden) and all(
            close(a, b, relative, absolute) for a, b in zip(now, golden, strict=True)
        )
    return float.fromhex(now) == pytest.approx(float.fromhex(golden), rel=relative, abs=absolute)


@pytest.mark.parametrize("name", RECIPES)
def test_losses_are_golden(name, tmp_path, capsys):
    golden = json.loads((HERE / f"{name}.json").read_text())
    now = measure(name, tmp_path)
    same_environment = golden.pop("environment") == environment()
    changed = "\n".join(differences(now, golden))
    if same_environment:
        assert not changed, changed
        return
    for part, absolute in (("losses", NEAR_ZERO), ("weights", 0.0)):
        assert close(now[part], golden[part], TOLERANCE, absolute), changed
    assert close(now["scores"], golden["scores"], 0.0, SCORE_TOLERANCE), changed


def test_a_changed_loss_is_reported():
    golden = json.loads((HERE / "simclr.json").read_text())
    changed = json.loads((HERE / "simclr.json").read_text())
    first = float.fromhex(golden["losses"]["pretrain"][0])
    changed["losses"]["pretrain"][0] = (first * 1.001).hex()
    assert len(differences(changed, golden)) == 1
    assert not close(changed["losses"], golden["losses"], TOLERANCE, NEAR_ZERO)


def renew(names: list[str]) -> None:
    """Rewrite the golden files and print what changed."""
    for name in names or list(RECIPES):
        path = HERE / f"{name}.json"
        golden = json.loads(path.read_text()) if path.is_file() else {}
        golden.pop("environment", None)
        with tempfile.TemporaryDirectory() as folder:
            now = measure(name, Path(folder))
        path.write_text(json.dumps({"environment": environment(), **now}, indent=1) + "\n")
        changed = differences(now, golden) if golden else ["new"]
        print(f"{name}: {len(changed)} changed", *changed, sep="\n  ")  # noqa: T201
