"""Planted runs with hostile names: folders that a report reads like real runs."""

import json
from pathlib import Path

import pytest
import torch

from sslrun.pretexts.guesses import Guess, MaskedText
from sslrun.results.record import ANSWERS, GUESSES, RunRecord
from sslrun.runs import Run
from sslrun.stages.predictions import write_predictions, write_shown
from sslrun.tasks.answers import MarkedAnswer

HOSTILE = "<script>alert(1)</script>&\"'"
ACCURACY = {"name": "accuracy", "unit": "%", "better": "higher", "digits": 1}


def plant_pretraining(root, recipe, seed, steps=4, **pretext):
    """Write the folder of a finished pretraining, with a log of `steps` lines."""
    identity = {"pretext": {"name": HOSTILE, **pretext}, "seed": seed}
    run = Run(root, recipe, "pretrain", identity)
    run.start({"name": recipe, "pretext": HOSTILE}, {"sslrun": "0.1.0", "command": ["a", HOSTILE]})
    for step in range(1, steps + 1):
        run.log({"step": step, "loss": 1 / step + seed, "knn": 10.0 * step, "lr": 0.1})
    run.finish({"stage": "pretrain", "seconds": 2.0, "steps": steps, "watched": {"rankme": 3.0}})
    return run


def plant_evaluation(root, recipe, seed, labels, wrong, pretraining):
    """Write the folder of a finished probe of 8 examples, `wrong` of them misclassified."""
    identity = {"origin": {"pretrain": pretraining.hash}, "labels": labels, "seed": seed}
    run = Run(root, recipe, "probe", identity)
    run.start({"name": recipe}, {"sslrun": "0.1.0", "device": "cpu"})
    truth = torch.arange(8, dtype=torch.int32) % 2
    predicted = truth.clone()
    predicted[:wrong] = 1 - predicted[:wrong]
    margin = torch.linspace(0, 1, 8)
    write_predictions(
        run.path, {"truth": truth, "predicted": predicted, "margin": margin}, ("no", HOSTILE)
    )
    accuracy = 100 * (8 - wrong) / 8
    run.finish(
        {
            "stage": "probe", "protocol": "probe", "recipe": recipe, "backbone": HOSTILE,
            "pretext": HOSTILE, "task": HOSTILE, "labels": labels, "labelled": 4, "seed": seed,
            "metric": ACCURACY, "metrics": {"test": {"accuracy": accuracy}},
            "shifts": {HOSTILE: {"accuracy": accuracy / 2}}, "seconds": 1.0,
        }
    )  # fmt: skip
    return RunRecord(run.path)


@pytest.fixture
def plant():
    """Write the folder of a finished pretraining; see `plant_pretraining`."""
    return plant_pretraining


@pytest.fixture
def planted(tmp_path):
    """Write two recipes of two seeds and two amounts of labels, and return the root."""
    for number, recipe in enumerate(("first", "second")):
        for seed in (0, 1):
            pretraining = plant_pretraining(tmp_path, recipe, seed)
            for labels in (0.1, 1.0):
                plant_evaluation(tmp_path, recipe, seed, labels, 1 + seed + number, pretraining)
    return tmp_path


@pytest.fixture
def damaged(planted):
    """The planted runs, one with a broken result and one unfinished."""
    next(iter((planted / "first").glob("probe-*/result.json"))).write_text('{"protocol": "probe"')
    Path(next(iter((planted / "second").glob("pretrain-*/result.json")))).unlink()
    environment = next(iter((planted / "second").glob("probe-*/environment.json")))
    environment.with_name("sums.json").unlink()
    environment.write_text(json.dumps({"sslrun": "0.0.9"}))
    return planted


def change_result(folder, **entries):
    """Change entries of a finished run's result, which loses its checksums."""
    (folder / "sums.json").unlink()
    path = folder / "result.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


@pytest.fixture
def texts(planted):
    """The planted runs, with two pretrainings on text and an evaluation on questions."""
    first, second = (
        plant_pretraining(planted, name, 0, task=name) for name in ("masked", "causal")
    )
    for run in (first, second):
        change_result(run.path, tokens=1000)
    guess = Guess(1, 0.02, 17, [("cat", 0.6), (HOSTILE, 0.1)])
    write_shown(first.path / GUESSES, [MaskedText(["the", "dog", "##gy", HOSTILE], [guess])])
    folder = plant_evaluation(planted, "masked", 0, 1.0, 3, first).folder
    change_result(folder, metrics={"test": {"accuracy": 62.5, "exact_match": 62.5}})
    passage = [("A ", ""), ("dog", "true"), (HOSTILE, "predicted"), ("x" * 300, "")]
    answers = [
        MarkedAnswer(HOSTILE, passage, "dog", HOSTILE, 0.0, False, 3.5),
        MarkedAnswer("Who?", [("cat", "both")], "cat", "cat", 1.0, True, 1.5),
    ]
    write_shown(folder / ANSWERS, answers)
    return planted
