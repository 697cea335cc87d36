"""Golden losses: five steps of one recipe for each pretext task, and the scores of the protocols, bit for bit.

A refactoring must not change them. Where a change is meant to, renew them and say why in the commit:

    python tests/golden/test_golden.py [NAME...]

prints what changed. Losses are compared exactly on the processor and torch that made the files (see
"environment" in them), and within `TOLERANCE` elsewhere, where sums are added up in another order.
"""

from __future__ import annotations

import json
import platform
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from sslrun import cli
from sslrun.stages import fit

HERE = Path(__file__).parent
RECIPES = yaml.safe_load((HERE / "recipes.yaml").read_text())["recipes"]
TOLERANCE = 2e-3
"""Relative difference of losses and of weights between instruction sets, after five steps in float32."""
SCORE_TOLERANCE = 3.0
"""Points between scores of a few hundred test examples, some of which lie at a decision boundary."""


def environment() -> dict[str, str]:
    """What the last bits depend on."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "torch": torch.__version__,
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "processor": names[0] if names else platform.machine(),
    }


def measure(name: str, folder: Path) -> dict[str, Any]:
    """Run a recipe through the command line on one thread; losses, weights and scores as hexadecimal floats."""
    recipe = folder / f"{name}.yaml"
    given = {key: value for key, value in RECIPES[name].items() if value is not None}
    recipe.write_text(yaml.safe_dump({"name": name, **given}))
    threads, pause = torch.get_num_threads(), fit.LOG_SECONDS
    torch.set_num_threads(1)
    fit.LOG_SECONDS = -1.0  # every step is logged
    try:
        command = "sweep" if "evaluate" in given else "pretrain"
        cli.app([command, str(recipe), "--runs", str(folder), "--device", "cpu"], standalone_mode=False)
    finally:
        torch.set_num_threads(threads)
        fit.LOG_SECONDS = pause
    runs = {path.parent.name: path.parent for path in sorted(folder.glob(f"{name}/*/result.json"))}
    return {"losses": losses(runs), "weights": weights(runs), "scores": scores(runs)}


def key(run: Path) -> str:
    """A run's stage and task: its hash changes with the rules of identity, which are not of interest here."""
    result = json.loads((run / "result.json").read_text())
    return " ".join(filter(None, [result["stage"], result.get("task")]))


def losses(runs: dict[str, Path]) -> dict[str, list[str]]:
    found = {}
    for run in runs.values():
        log = run / "metrics.jsonl"
        records = [json.loads(line) for line in log.read_text().splitlines()] if log.is_file() else []
        if records:
            found[key(run)] = [record["loss"].hex() for record in records if "loss" in record]
    return found


def weights(runs: dict[str, Path]) -> dict[str, str]:
    """The sum of squares of each run's saved backbone, in float64."""
    found = {}
    for run in runs.values():
        path = run / "backbone.safetensors"
        if path.is_file():
            tensors = load_file(path)
            squares = [tensors[name].double().square().sum().item() for name in sorted(tensors)]
            found[key(run)] = sum(squares).hex()
    return found


def scores(runs: dict[str, Path]) -> dict[str, dict[str, str]]:
    """Every metric of every split and shift."""
    found = {}
    for run in runs.values():
        result = json.loads((run / "result.json").read_text())
        splits = {**result.get("metrics", {}), **result.get("shifts", {})}
        if splits:
            found[key(run)] = {
                f"{split} {metric}": float(value).hex()
                for split, metrics in sorted(splits.items())
                for metric, value in sorted(metrics.items())
            }
    return found


def differences(now: Any, golden: Any, place: str = "") -> list[str]:
    """Every number that is not the same, as "place: golden -> now (relative difference)"."""
    if isinstance(now, dict):
        keys = sorted(now.keys() | golden.keys())
        return [text for name in keys for text in differences(now.get(name), golden.get(name), f"{place} {name}")]
    if isinstance(now, list) and isinstance(golden, list) and len(now) == len(golden):
        pairs = enumerate(zip(now, golden, strict=True), start=1)
        return [text for at, (a, b) in pairs for text in differences(a, b, f"{place} step {at}")]
    if now == golden:
        return []
    if not isinstance(now, str) or not isinstance(golden, str):
        return [f"{place}: {golden} -> {now}"]
    a, b = float.fromhex(now), float.fromhex(golden)
    return [f"{place}: {b:.9g} -> {a:.9g} ({(a - b) / max(abs(b), 1e-12):+.1e})"]


def close(now: Any, golden: Any, relative: float, absolute: float) -> bool:
    """Whether all numbers are equal within a tolerance, and of the same places."""
    if isinstance(golden, dict):
        return now.keys() == golden.keys() and all(close(now[k], golden[k], relative, absolute) for k in golden)
    if isinstance(golden, list):
        return len(now) == len(golden) and all(
            close(a, b, relative, absolute) for a, b in zip(now, golden, strict=True)
        )
    return float.fromhex(now) == pytest.approx(float.fromhex(golden), rel=relative, abs=absolute)


@pytest.mark.parametrize("name", RECIPES)
def test_losses_are_golden(name, tmp_path, capsys):
    golden = json.loads((HERE / f"{name}.json").read_text())
    now = measure(name, tmp_path)
    if golden.pop("environment") == environment():
        assert differences(now, golden) == []
        return
    told = "\n".join(differences(now, golden))
    for part, absolute in (("losses", 1e-3), ("weights", 0.0)):
        assert close(now[part], golden[part], TOLERANCE, absolute), told
    assert close(now["scores"], golden["scores"], 0.0, SCORE_TOLERANCE), told


def test_a_changed_loss_is_noticed():
    golden = json.loads((HERE / "simclr.json").read_text())
    changed = json.loads((HERE / "simclr.json").read_text())
    first = float.fromhex(golden["losses"]["pretrain"][0])
    changed["losses"]["pretrain"][0] = (first * 1.003).hex()
    assert len(differences(changed, golden)) == 1
    assert not close(changed["losses"], golden["losses"], TOLERANCE, 1e-3)


def renew(names: list[str]) -> None:
    """Write the golden files anew, and print what changed."""
    for name in names or list(RECIPES):
        path = HERE / f"{name}.json"
        golden = json.loads(path.read_text()) if path.is_file() else {}
        golden.pop("environment", None)
        with tempfile.TemporaryDirectory() as folder:
            now = measure(name, Path(folder))
        path.write_text(json.dumps({"environment": environment(), **now}, indent=1) + "\n")
        changed = differences(now, golden) if golden else ["new"]
        print(f"{name}: {len(changed)} changed", *changed, sep="\n  ")


if __name__ == "__main__":
    renew(sys.argv[1:])
