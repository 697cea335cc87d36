"""Forecasts on GPUs that are not there follow from FLOPs, gradients and stated assumptions."""

import pytest

from sslrun.stages import scale

COSTS = {
    "row": "mae",
    "flops": 1e18,
    "steps": 1000,
    "flops_an_example": 1e13,
    "state_bytes": 2_000_000_000,
    "trained_parameters": 100_000_000,
    "convolutional": False,
    "length": None,
}


def test_more_gpus_divide_the_computing_until_gradients_take_longer():
    one, eight = (scale.forecast(COSTS, gpus) for gpus in (1, 8))
    assert one.reduce_seconds == 0
    assert one.seconds == pytest.approx(1e18 / (scale.PEAK * scale.TRANSFORMERS))
    assert eight.seconds == pytest.approx(one.seconds / 8)
    assert eight.reduce_seconds == pytest.approx(2 * 7 / 8 * 4e8 / scale.NODE_BANDWIDTH)
    assert one.batch == 100
    assert eight.examples_a_second == pytest.approx(8 * one.examples_a_second)
    many = scale.forecast(COSTS, 512)
    assert many.limit == "network"
    assert many.seconds == pytest.approx(1000 * 2 * 511 / 512 * 4e8 / scale.BANDWIDTH)


def test_what_is_unknown_has_no_forecast():
    rows = [COSTS, {"row": "pixels"}, {**COSTS, "row": "unknown length", "flops": None}]
    first, assumptions = scale.describe_all(rows, 64)
    assert first.startswith("mae: on 64 GPU(s) about ")
    assert "not measured" in assumptions
