"""Self-attention against torch's convolution, in float64."""

import itertools
import math

import pytest
import torch

from sslrun.claims.theory.convolution import (
    attend,
    build_layer,
    compute_attention,
    compute_bound,
    convolve,
    draw_case,
    embed_pixels,
    list_shifts,
    make_table,
    measure_errors,
)
from sslrun.results.formats import to_markdown

EXACT = 1e-13
"""Rounding of a sum of some dozens of products of order 1 to 10."""


@pytest.mark.parametrize(("kernel", "dilation"), [(1, 1), (3, 1), (5, 1), (3, 2)])
@pytest.mark.parametrize("padding", ["replicate", "zeros"])
def test_hard_attention_equals_the_convolution_up_to_rounding(kernel, dilation, padding):
    x, weight, bias = draw_case(kernel, size=9)
    x = x[..., :8]  # not square
    expected = convolve(x, weight, bias, padding, dilation)
    assert (attend(x, weight, bias, math.inf, padding, dilation) - expected).abs().max() < EXACT
    assert (attend(x, weight, None, math.inf, padding, dilation) - expected).abs().max() > 0.1


@pytest.mark.parametrize("alpha", [800.0, math.inf])
def test_on_integers_the_limit_equals_the_convolution_to_the_bit(alpha):
    # Sums of integers do not round, and exp(-800) is 0, so any difference would come from the
    # construction.
    x, weight, bias = (tensor.mul(10).round() for tensor in draw_case(5, size=9))
    for padding in ("replicate", "zeros"):
        assert torch.equal(
            attend(x, weight, bias, alpha, padding), convolve(x, weight, bias, padding)
        )


def test_convolve_equals_conv2d():
    x, weight, bias = draw_case()
    assert torch.equal(
        convolve(x, weight, bias, "zeros"), torch.nn.functional.conv2d(x, weight, bias, padding=1)
    )


def test_the_error_falls_as_exp_of_minus_alpha_and_stays_under_the_bound():
    errors = measure_errors([5, 10, 15, 20, 25, 46, math.inf])
    for what in ("inside", "whole, border repeated", "whole, zero padding"):
        logs = [math.log(errors[alpha][what]) for alpha in (10, 15, 20, 25)]
        slopes = [(b - a) / 5 for a, b in itertools.pairwise(logs)]
        assert slopes == pytest.approx([-1] * 3, abs=0.02)
        assert all(row[what] <= row["bound"] + EXACT for row in errors.values())
        assert errors[46][what] < EXACT
        assert errors[math.inf][what] < EXACT
    assert errors[5]["inside"] > 0.05  # soft attention differs from the convolution


def test_the_border_is_repeated_and_not_zero():
    x, weight, bias = draw_case()
    layer = attend(x, weight, bias, math.inf, "replicate")
    gap = (layer - convolve(x, weight, bias, "zeros")).abs()
    assert gap[..., 1:-1, 1:-1].max() < EXACT
    assert gap[..., 0, :].max() > 0.1


def test_attention_is_a_distribution_centered_at_its_shift():
    shifts = list_shifts(3)
    assert len(shifts) == 9
    soft, hard = compute_attention(5, 6, shifts, 2.0), compute_attention(5, 6, shifts, math.inf)
    assert torch.allclose(soft.sum(-1), torch.ones(9, 30, dtype=torch.float64), atol=1e-14)
    query = 2 * 6 + 3
    for head, (down, right) in enumerate(shifts.int().tolist()):
        assert (
            soft[head, query].argmax() == hard[head, query].argmax() == (2 + down) * 6 + 3 + right
        )
    assert hard.max(-1).values.min() == 1
    with pytest.raises(ValueError, match="no center"):
        list_shifts(2)


@pytest.mark.parametrize(("kernel", "channels", "out"), [(3, 3, 5), (3, 1, 40), (5, 4, 2)])
def test_sslruns_own_attention_equals_the_convolution_too(kernel, channels, out):
    x, weight, bias = draw_case(kernel, size=8, channels=channels, out=out)
    layer = build_layer(weight, bias, alpha=60.0)
    channels_out = layer(embed_pixels(x, layer.proj.in_features)).transpose(1, 2)
    image = channels_out[:, :out].unflatten(-1, (8, 8))
    assert (image - convolve(x, weight, bias, "replicate")).abs().max() < 1e-12
    assert not channels_out[:, out:].any()
    soft = build_layer(weight, bias, alpha=1.0)
    same = attend(x, weight, bias, 1.0, "replicate")
    soft_channels = soft(embed_pixels(x, layer.proj.in_features)).transpose(1, 2)
    soft_image = soft_channels[:, :out].unflatten(-1, (8, 8))
    assert (soft_image - same).abs().max() < EXACT * 10


def test_sslruns_own_attention_needs_more_than_one_pixel():
    _, weight, bias = draw_case(1, channels=2, out=2)
    with pytest.raises(ValueError, match="too small"):
        build_layer(weight, bias, 10.0)


def test_the_table_has_a_row_for_each_alpha():
    errors_table = make_table(alphas=(1, 40, math.inf), seeds=(0, 1))
    assert [row.name for row in errors_table.rows] == ["alpha 1", "alpha 40", "hard attention"]
    assert "e-1" in to_markdown(errors_table)
    x, weight, _ = draw_case()
    assert compute_bound(x, weight, 2, "replicate") > compute_bound(x, weight, 3, "replicate")
