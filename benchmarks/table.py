"""Measure the time and the memory of `sslrun table` on the folders of many runs.

python benchmarks/table.py [--runs 1000]

Writes runs of a probe with three seeds for each of many recipes into a temporary folder, and prints
the seconds and the peak memory of a process that prints their table.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from sslrun.runs import Run
from sslrun.shipped import find

SEEDS = 3


def write_runs(root: Path, count: int) -> None:
    """Write the folders of finished evaluations, each with a recipe of the usual length.

    Runs in a process of its own: a process inherits the peak memory of the one that starts it, and
    reading recipes imports torch.
    """
    from sslrun.recipe import load_sweep

    recipe = load_sweep(find(Path("quickstart"))).rows["ResNet · SimCLR"].resolved()
    for number in range(count):
        write_run(root, number, recipe)


def write_run(root: Path, number: int, contents: Mapping[str, Any]) -> None:
    """Write the folder of a finished evaluation."""
    recipe, seed = f"recipe-{number // SEEDS}", number % SEEDS
    run = Run(root, recipe, "probe", {"task": "digits", "seed": seed})
    run.start({**contents, "name": recipe}, {"device": "cpu", "torch": "2"})
    score = {"accuracy": 50 + number % 37 + seed / 10}
    run.finish(
        {
            "stage": "probe",
            "recipe": recipe,
            "backbone": "resnet18",
            "pretext": "simclr",
            "task": "digits",
            "protocol": "probe",
            "labels": 1.0,
            "labelled": 1200,
            "seed": seed,
            "metric": {"name": "accuracy", "unit": "%", "better": "higher"},
            "metrics": {"val": score, "test": score},
            "seconds": 1.0,
            "flops": 1e12,
        }
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=1000, help="number of runs")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        writer = get_context("spawn").Process(target=write_runs, args=(Path(folder), args.runs))
        writer.start()
        writer.join()
        command = [sys.executable, "-m", "sslrun", "table", folder, "--runs", folder]
        start = time.perf_counter()
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        lines = process.stdout.read().splitlines()
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - start
    if status:
        sys.exit(f"sslrun table failed with status {status}")
    print(
        f"{args.runs} runs, {len(lines)} lines: {seconds:.1f} s, user {usage.ru_utime:.1f} s, "
        f"{usage.ru_maxrss / 1024:.0f} MB"
    )


if __name__ == "__main__":
    main()
