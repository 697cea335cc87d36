"""Measure the time and the size of `sslrun report` on the folders of many runs.

python benchmarks/report.py [--runs 100 1000]

Pretrains and evaluates once on the digits of scikit-learn, for a few seconds, and copies the five
runs under other recipes and seeds, each with its log, weights and predictions. Prints the CPU
seconds and the peak memory of a process that writes their report, and the size of the page.
"""

from __future__ import annotations

import argparse
import copy
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml

from sslrun.results.record import RunRecord, find_records
from sslrun.runs import Run

SEEDS = 3
COPIED = shutil.ignore_patterns("*.json", "recipe.yaml", "last", "checkpoint", ".lock")
"""Files that are written for each copy, and those that are left out."""
SWEEP = {
    "name": "tiny",
    "seeds": [0],
    "base": {
        "backbone": {"name": "resnet18", "stem": "small", "channels": 4},
        "data": {"name": "digits"},
        "pretext": {"name": "simclr"},
        "pretrain": {"steps": 100, "batch": 16, "precision": "fp32"},
        "probe": {"precision": "fp32"},
        "watch": {"every": 1, "examples": 200},
        "evaluate": {"digits": {"protocols": ["knn", "probe"], "labels": [0.1, 1.0]}},
    },
    "rows": {"SimCLR": {}},
}


def run_once(folder: Path) -> list[RunRecord]:
    """Run the sweep, and return its runs in the order of completion."""
    recipe = folder / "tiny.yaml"
    recipe.write_text(yaml.safe_dump(SWEEP))
    root = folder / "original"
    command = [sys.executable, "-m", "sslrun", "sweep", str(recipe), "--runs", str(root)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return find_records(root)


def copy_runs(originals: list[RunRecord], root: Path, number: int) -> None:
    """Write a pretraining and its evaluations, as of another recipe or seed."""
    recipe, seed = f"recipe-{number // SEEDS}", number % SEEDS
    temperature = 0.1 + 0.001 * (number // SEEDS)
    pretrained = ""
    for original in originals:
        identity: dict[str, Any] = copy.deepcopy(dict(original.identity))
        result = {**original.result, "recipe": recipe, "seed": seed}
        stage = identity.pop("stage")
        identity["seed"] = seed
        if stage == "pretrain":
            identity["pretext"]["temperature"] = temperature
        else:
            identity["origin"]["pretrain"] = pretrained
            change = number % 37 / 10
            scores = {key: value - change for key, value in original.test.items()}
            result["metrics"] = {**result["metrics"], "test": scores}
        run = Run(root, recipe, stage, identity)
        if stage == "pretrain":
            pretrained = run.hash
        shutil.copytree(original.folder, run.path, ignore=COPIED)
        for name in ("spec.json", "tokenizer.json"):
            if (original.folder / name).is_file():
                shutil.copy(original.folder / name, run.path)
        run.start({**original.recipe, "name": recipe}, dict(original.environment))
        run.finish(result)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, nargs="+", default=[100, 1000], help="numbers of runs")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        originals = run_once(Path(folder))
        for count in args.runs:
            root, page = Path(folder) / f"{count}-runs", Path(folder) / "report.html"
            for number in range(count // len(originals)):
                copy_runs(originals, root, number)
            command = [sys.executable, "-m", "sslrun", "report", str(root), "-o", str(page)]
            process = subprocess.Popen([*command, "--runs", str(root)], stdout=subprocess.DEVNULL)
            _, status, usage = os.wait4(process.pid, 0)
            if status:
                sys.exit(f"sslrun report failed with status {status}")
            print(
                f"{count} runs: user {usage.ru_utime:.1f} s, {usage.ru_maxrss / 1024:.0f} MB, "
                f"page {page.stat().st_size / 1e6:.2f} MB",
                flush=True,
            )


if __name__ == "__main__":
    main()
