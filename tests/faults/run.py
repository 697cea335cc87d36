"""Prove that runs survive faults: python tests/faults/run.py [--cases N] [--seed S] [--only PART]

Kills, damage, failing machines and mutated recipes; prints the counts as a table, and exits with 1
if anything was found that must not happen: a traceback, a hang, or silently another result. A
finding names its seed, with which it can be seen again. Moments of kills are random times, so that
a trial may take another course in a second run.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))  # this checkout's sslrun, even if another is installed
os.environ["OMP_NUM_THREADS"] = "1"  # a process with threads cannot be forked safely
os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1")
PARTS = {"kills": 400, "damage": 600, "machine": 60, "fuzz": 2000}
"""Parts, and their number of trials if nothing else is said."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, help="trials of each part, instead of its own number")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", action="append", choices=[*PARTS], help="a part; may be repeated")
    parser.add_argument("--name", action="append", default=[], help="a pretext task or protocol")
    parser.add_argument("--keep", type=Path, help="folder for the files of the trials that failed")
    options = parser.parse_args()
    start_quickly()
    from tally import Tally

    tally = Tally()
    try:
        with tempfile.TemporaryDirectory(prefix="sslrun-faults-") as temporary:
            folder = (options.keep or Path(temporary)).resolve()
            for part in options.only or PARTS:
                started = time.monotonic()
                cases = PARTS[part] if options.cases is None else options.cases
                module = importlib.import_module(part)
                module.run(cases, options.seed, folder, tally, set(options.name))
                print(f"{part}: {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)
    finally:
        print(tally.render(), flush=True)
    sys.exit(1 if tally.findings else 0)


def start_quickly() -> None:
    """Import once what every forked command needs, and log every step."""
    import torch

    torch.set_num_threads(1)
    sys.path.insert(0, str(ROOT / "tests"))
    import forks

    for module in (*forks.MODULES, "every_step"):
        importlib.import_module(module)


if __name__ == "__main__":
    main()
