"""Planted evaluations: folders that records read like real runs."""

import itertools

import pytest

from sslrun.results.record import RunRecord
from sslrun.runs import Run

ACCURACY = {"name": "accuracy", "unit": "%", "better": "higher", "digits": 1}


@pytest.fixture
def planted(tmp_path):
    """Write an evaluation's folder and return its record.

    `facts`: data, epochs, steps and parameters of its pretraining, which is planted beside it.
    """
    count = itertools.count()

    def plant(
        row,
        value,
        *,
        task="digits",
        protocol="finetune",
        labels=1.0,
        seed=0,
        metric=None,
        facts=None,
        **more,
    ):
        index, stated = next(count), dict(facts or {})
        metric = {**ACCURACY, **(metric or {})}
        origin, recipe = {}, {}
        if stated:
            pretraining = Run(tmp_path, "planted", "pretrain", {"index": index})
            pretraining.finish(
                {"stage": "pretrain", **{key: stated.get(key) for key in ("steps", "parameters")}}
            )
            origin = {"origin": {"pretrain": pretraining.hash}}
            recipe = {
                "data": {"name": stated.get("data")},
                "pretrain": {"epochs": stated.get("epochs")},
            }
        run = Run(tmp_path, "planted", protocol, {"index": index, **origin})
        run.start(recipe, {"device": "cpu"})
        shifts = {name: {metric["name"]: score} for name, score in more.pop("shifts", {}).items()}
        result = {
            "stage": protocol,
            "protocol": protocol,
            "recipe": "r",
            "backbone": "b",
            "pretext": "p",
            "task": task,
            "labels": labels,
            "seed": seed,
            "metric": metric,
            "metrics": {"test": {metric["name"]: value}},
            "shifts": shifts,
            "seconds": 1.0,
        }
        run.finish({**result, **more})
        return RunRecord(run.path, row)

    return plant
