"""What reveals the order of frames: which films and defenses the rows have."""

import torch

from sslrun.claims.measurements import order
from sslrun.claims.measurements.base import measurements
from sslrun.data.source import sources
from sslrun.results.address import Row
from sslrun.training.device import compute


def films(**options):
    chosen = sources["moving-digits"].Options(
        size=16, films=12, test_films=6, labels="pattern", textured=False, lighting=0, noise=0,
        **options,
    )  # fmt: skip
    (batch,) = (
        sources["moving-digits"](chosen)
        .load("train")
        .batches([torch.arange(12)], torch.device("cpu"))
    )
    return batch.inputs.float()


def test_still_films_are_still_and_drifting_ones_only_get_brighter():
    still = films(**order.STILL)
    assert (still == still[:, :1]).all()
    drifting = films(**order.STILL, drift=0.08)
    rise = 1 + 0.08 * torch.arange(4)[:, None, None, None]
    assert (drifting - still * rise).abs().max() < 1.13  # rounding of both, no clipped pixel
    assert not (films() == films()[:, :1]).all()


def test_rows_differ_in_films_and_in_the_defense(monkeypatch, tmp_path):
    seen = {}

    def measure(self, films, task, seed, compute, check):
        seen[len(seen)] = (films, task)
        return 10.0 * len(seen)

    monkeypatch.setattr(order.FrameOrder, "_measure", measure)
    cls = measurements["order"]
    table = cls(cls.Options(rise=0.05)).table(0, compute("cpu"), tmp_path, lambda: None)
    drifting = {**order.STILL, "drift": 0.05}
    assert list(seen.values()) == [
        ({}, {}),
        (order.STILL, {}),
        (drifting, {"drift": 0.0}),
        (drifting, {}),
    ]
    names = ("moving", "still", "still, drifting", "still, drifting, defended")
    assert [table.cells[Row(name), order.ACCURACY] for name in names]
