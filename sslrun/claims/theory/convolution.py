"""Multi-head self-attention expresses any convolution, by weights written down.

Cordonnier, Loukas, Jaggi, "On the Relationship between Self-Attention and Convolutional Layers",
ICLR 2020, Theorem 1. A K x K kernel takes K² heads, one for each shift Δ of the kernel's pixels.
With the quadratic encoding of the relative position δ = key - query,

    r_δ = (|δ|², δ₁, δ₂),    v_h = -α (1, -2 Δ₁, -2 Δ₂),    scores = r_δ · v_h = -α (|δ - Δ|² - |Δ|²),

and neither queries nor keys of the content, head h attends to the pixel at Δ from the query, the
more narrowly the larger α. Its values are the pixels as they are, and the output map of head h is
the kernel's slice at Δ.

Borders: a query whose shifted pixel lies outside attends to the nearest pixel inside. So the layer
as it stands is the convolution that repeats the border ('replicate'); on the pixels from which the
kernel stays inside it is any convolution; zero padding it is everywhere if the image is given a rim
of zeros first, which is then cut off ('zeros').

The error falls as exp(-α): at most (T - 1) exp(-α) of a head's attention misses its pixel among T,
since the second nearest pixel of a grid is farther from Δ by at least 1 (squared). In float64 the
layer is the convolution to rounding from α of about 40 on. `alpha=inf` is the limit itself: each
head reads one pixel, weights are 0 and 1 exactly, and what differs from `conv2d` is only the order
in which products are added up.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from sslrun.backbones.transformer import Attention
from sslrun.metric import Metric
from sslrun.results.address import Column, Row
from sslrun.results.table import Table

Padding = Literal["replicate", "zeros"]


def shifts(kernel: int, dilation: int = 1) -> Tensor:
    """(K², 2): rows and columns from the query to each pixel under the kernel. ValueError: an even kernel has no centre."""
    if kernel % 2 == 0:
        raise ValueError(f"a kernel of {kernel} pixels has no middle one")
    places = dilation * (torch.arange(kernel, dtype=torch.float64) - kernel // 2)
    return torch.cartesian_prod(places, places).reshape(-1, 2)


def pixels(height: int, width: int) -> Tensor:
    """(T, 2): row and column of each pixel."""
    rows, columns = (
        torch.arange(height, dtype=torch.float64),
        torch.arange(width, dtype=torch.float64),
    )
    return torch.cartesian_prod(rows, columns).reshape(-1, 2)


def weights(height: int, width: int, towards: Tensor, alpha: float) -> Tensor:
    """Attention (heads, T, T) of every pixel to every pixel; heads look `towards` shifts (heads, 2).

    alpha=inf: all of it on the nearest pixel, which on a grid is one.
    """
    places = pixels(height, width)
    relative = places[None] - places[:, None]
    encoding = torch.cat([relative.square().sum(-1, keepdim=True), relative], dim=-1)
    centre = torch.cat([torch.ones(len(towards), 1, dtype=torch.float64), -2 * towards], dim=1)
    distances = torch.einsum("qkr,hr->hqk", encoding, centre)
    if math.isinf(alpha):
        return F.one_hot(distances.argmin(-1), height * width).double()
    return (-alpha * distances).softmax(-1)


def attend(
    x: Tensor,
    kernel: Tensor,
    bias: Tensor | None,
    alpha: float,
    padding: Padding,
    dilation: int = 1,
) -> Tensor:
    """The layer of the theorem: x (B, C, H, W) float64 -> (B, D, H, W), for a kernel (D, C, K, K) of conv2d.

    Head h: attention to its shift, values the pixels themselves, output map the slice `kernel[:, :,
    h]`.
    """
    rim = dilation * (kernel.shape[-1] // 2) if padding == "zeros" else 0
    x = F.pad(x, [rim] * 4)
    height, width = x.shape[-2:]
    attention = weights(height, width, shifts(kernel.shape[-1], dilation), alpha)
    values = x.flatten(2).transpose(1, 2)
    heads = torch.einsum("hqk,bkc->bhqc", attention, values)
    out = torch.einsum("bhqc,dch->bdq", heads, kernel.flatten(2)).unflatten(-1, (height, width))
    if bias is not None:
        out = out + bias[:, None, None]
    return out[..., rim : height - rim, rim : width - rim]


def convolve(
    x: Tensor, kernel: Tensor, bias: Tensor | None, padding: Padding, dilation: int = 1
) -> Tensor:
    """torch's own, of the same size as x."""
    rim = dilation * (kernel.shape[-1] // 2)
    x = F.pad(x, [rim] * 4, mode="replicate" if padding == "replicate" else "constant")
    return F.conv2d(x, kernel, bias, dilation=dilation)


def bound(x: Tensor, kernel: Tensor, alpha: float, padding: Padding) -> float:
    """What the error can't exceed: the attention that misses, times the farthest that two pixels can be apart."""
    rim = kernel.shape[-1] - 1 if padding == "zeros" else 0
    missing = ((x.shape[-2] + rim) * (x.shape[-1] + rim) - 1) * math.exp(-alpha)
    return float(kernel.abs().sum(dim=(1, 2, 3)).max() * 2 * x.abs().max() * missing)


def random_case(
    kernel: int = 3, size: int = 7, channels: int = 3, out: int = 5, seed: int = 0
) -> tuple[Tensor, ...]:
    """x (2, C, S, S), kernel (D, C, K, K), bias (D,): normal, float64."""
    generator = torch.Generator().manual_seed(seed)
    shapes = (2, channels, size, size), (out, channels, kernel, kernel), (out,)
    return tuple(torch.randn(shape, dtype=torch.float64, generator=generator) for shape in shapes)


def errors(
    alphas: Sequence[float], kernel: int = 3, size: int = 7, seed: int = 0
) -> dict[float, dict[str, float]]:
    """Largest absolute difference from conv2d, by alpha: inside (against either padding), and on the whole image."""
    x, weight, bias = random_case(kernel, size, seed=seed)
    rim = kernel // 2
    inside = ..., slice(rim, size - rim), slice(rim, size - rim)
    found: dict[float, dict[str, float]] = {}
    for alpha in alphas:
        gap = {
            padding: (
                attend(x, weight, bias, alpha, padding) - convolve(x, weight, bias, padding)
            ).abs()
            for padding in ("replicate", "zeros")
        }
        found[alpha] = {
            "inside": gap["replicate"][inside].max().item(),
            "whole, border repeated": gap["replicate"].max().item(),
            "whole, zero padding": gap["zeros"].max().item(),
            "bound": bound(x, weight, alpha, "zeros"),
        }
    return found


def table(
    alphas: Sequence[float] = (1, 5, 10, 20, 40, math.inf),
    kernel: int = 3,
    size: int = 7,
    seeds: Sequence[int] = (0, 1, 2),
) -> Table:
    """The errors of random images and kernels, rows by alpha."""
    made = Table(
        f"self-attention as a {kernel} x {kernel} convolution ({kernel**2} heads, {size} x {size} pixels)",
        format_spec=".1e", marks_best=False,
    )  # fmt: skip
    for seed in seeds:
        for alpha, row in errors(alphas, kernel, size, seed).items():
            for what, value in row.items():
                name = "hard attention" if math.isinf(alpha) else f"alpha {alpha:g}"
                made.add(
                    Row(name),
                    Column(metric=Metric(what, unit="", better="lower")),
                    value,
                    str(seed),
                )
    made.note(
        f"largest absolute difference from conv2d, float64, mean ± standard deviation over {len(seeds)} random images and kernels"
    )
    made.note(
        "bound: (T - 1) exp(-alpha) of the attention misses; hard attention differs by the order of summation alone"
    )
    return made


# ---------------------------------------------------------------- the house's own attention


def block(kernel: Tensor, bias: Tensor | None, alpha: float, dilation: int = 1) -> Attention:
    """sslrun's attention with weights under which it is the convolution, on the tokens of `tokens`.

    It has no relative positions; it doesn't need them. |δ - Δ|² = |k|² - 2 k·(q + Δ) + |q + Δ|², of
    which the last term is the same for all keys and leaves the softmax as it is, so the score is a
    product of a query (2 (q + Δ), -1) and a key (k, |k|²) that are linear in a token that carries
    its place. Heads are as wide as the larger of C and 3.
    """
    out, channels, size, _ = kernel.shape
    towards = shifts(size, dilation)
    heads, head = len(towards), max(channels, 3, -(-out // len(towards)))
    width = heads * head
    layer = Attention(width, heads).double()
    # Where a token keeps its pixel, its row, its column, their squares' sum, and 1; zeros fill it
    # up.
    row, column, square, one = range(channels, channels + 4)
    if one >= width:
        raise ValueError(
            f"a token of {width} channels can't hold {channels} and a place; the kernel is too small"
        )
    # The block divides scores by the root of a head's width.
    scale = alpha * head**0.5
    with torch.no_grad():
        for each in layer.parameters():
            each.zero_()
        q, k, v = layer.qkv.weight.split(width)
        for h, (down, right) in enumerate(towards):
            at = h * head
            q[at, row], q[at, one] = 2 * scale, 2 * scale * down
            q[at + 1, column], q[at + 1, one] = 2 * scale, 2 * scale * right
            q[at + 2, one] = -scale
            k[at, row] = k[at + 1, column] = k[at + 2, square] = 1
            v[at : at + channels, :channels] = torch.eye(channels, dtype=torch.float64)
            layer.proj.weight[:out, at : at + channels] = kernel.flatten(2)[:, :, h]
        if bias is not None:
            layer.proj.bias[:out] = bias
    return layer.eval()


def tokens(x: Tensor, width: int) -> Tensor:
    """Images (B, C, H, W) as `block` reads them: (B, H W, width), each pixel with its place."""
    places = pixels(*x.shape[-2:])
    place = torch.cat(
        [places, places.square().sum(1, keepdim=True), torch.ones(len(places), 1)], dim=1
    )
    values = x.flatten(2).transpose(1, 2)
    found = torch.cat([values, place.expand(len(x), -1, -1)], dim=-1)
    return F.pad(found, [0, width - found.shape[-1]])
