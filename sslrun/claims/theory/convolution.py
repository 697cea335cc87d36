"""Self-attention that computes a convolution: Theorem 1 of Cordonnier, Loukas and Jaggi, ICLR 2020.

"On the Relationship between Self-Attention and Convolutional Layers" constructs attention weights
for which multi-head self-attention equals a given convolution. A K x K kernel takes K² heads, one
for each shift Δ from the query to a pixel under the kernel. With the quadratic encoding of the
relative position δ = key - query, the scores of head h are

    r_δ = (|δ|², δ₁, δ₂),    v_h = -α (1, -2 Δ₁, -2 Δ₂),    r_δ · v_h = -α (|δ - Δ|² - |Δ|²).

They depend on positions alone, not on the content of queries or keys. Head h attends to the pixel
at shift Δ from the query; a larger α makes its attention narrower. Its values are the unchanged
pixels, and its output map is the kernel's slice at Δ.

Borders: if the shifted pixel lies outside the image, the head attends to the nearest pixel inside.

- Where the kernel fits inside the image, the layer equals a convolution with any padding.
- On the whole image, the layer is the convolution that repeats the border ("replicate").
- For zero padding ("zeros"), the image gets a border of zeros first, which is cropped afterwards.

The error falls as exp(-α). On a grid, the squared distance of the second nearest pixel from Δ is
larger than that of the nearest by at least 1, so at most (T - 1) exp(-α) of a head's attention
misses its pixel, among T pixels. In float64 the layer equals the convolution up to rounding from
α ≈ 40. `alpha=inf` is the limit, hard attention: each head reads one pixel with weight exactly 1.
It differs from `conv2d` only in the order of summation.
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


def list_shifts(kernel: int, dilation: int = 1) -> Tensor:
    """List the shifts (K², 2) from the query to each pixel under the kernel, as (row, column).

    Raises ValueError for an even kernel, which has no center.
    """
    if kernel % 2 == 0:
        raise ValueError(f"a kernel of {kernel} pixels has no center; choose an odd size")
    offsets = dilation * (torch.arange(kernel, dtype=torch.float64) - kernel // 2)
    return torch.cartesian_prod(offsets, offsets).reshape(-1, 2)


def list_pixels(height: int, width: int) -> Tensor:
    """List the coordinates (T, 2) of all pixels, as (row, column)."""
    rows = torch.arange(height, dtype=torch.float64)
    columns = torch.arange(width, dtype=torch.float64)
    return torch.cartesian_prod(rows, columns).reshape(-1, 2)


def compute_attention(height: int, width: int, shifts: Tensor, alpha: float) -> Tensor:
    """Compute attention (heads, T, T) from each query pixel to each key pixel.

    `shifts` (heads, 2) is where each head looks. With `alpha=inf`, all of a head's attention is on
    the nearest pixel, which is unique on a grid.
    """
    # q: query pixel, k: key pixel, r: entry of the encoding, h: head.
    pixels = list_pixels(height, width)
    relative = pixels[None] - pixels[:, None]
    encoding = torch.cat([relative.square().sum(-1, keepdim=True), relative], dim=-1)
    centers = torch.cat([torch.ones(len(shifts), 1, dtype=torch.float64), -2 * shifts], dim=1)
    distances = torch.einsum("qkr,hr->hqk", encoding, centers)
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
    """Apply the theorem's attention layer to images.

    Args:
        x: images (B, C, H, W), float64.
        kernel: weight of the convolution (D, C, K, K), as `conv2d` takes it.
        bias: (D,), or None.
        alpha: inverse width of each head's attention; inf for hard attention.
        padding: how the convolution pads the image.
        dilation: distance between neighboring pixels under the kernel.

    Returns:
        The layer's output (B, D, H, W).
    """
    border = dilation * (kernel.shape[-1] // 2) if padding == "zeros" else 0
    x = F.pad(x, [border] * 4)
    height, width = x.shape[-2:]
    attention = compute_attention(height, width, list_shifts(kernel.shape[-1], dilation), alpha)
    # b: image, h: head, q: query pixel, k: key pixel, c: input channel, d: output channel.
    values = x.flatten(2).transpose(1, 2)
    heads = torch.einsum("hqk,bkc->bhqc", attention, values)
    out = torch.einsum("bhqc,dch->bdq", heads, kernel.flatten(2)).unflatten(-1, (height, width))
    if bias is not None:
        out = out + bias[:, None, None]
    return out[..., border : height - border, border : width - border]


def convolve(
    x: Tensor, kernel: Tensor, bias: Tensor | None, padding: Padding, dilation: int = 1
) -> Tensor:
    """Convolve with torch's `conv2d`, padded so that the output has the size of `x`."""
    border = dilation * (kernel.shape[-1] // 2)
    x = F.pad(x, [border] * 4, mode="replicate" if padding == "replicate" else "constant")
    return F.conv2d(x, kernel, bias, dilation=dilation)


def compute_bound(x: Tensor, kernel: Tensor, alpha: float, padding: Padding) -> float:
    """Bound the layer's error by the attention that misses its pixel and the largest difference.

    The largest difference is that of two pixels, weighted by the kernel's absolute sum.
    """
    border = kernel.shape[-1] - 1 if padding == "zeros" else 0
    missing = ((x.shape[-2] + border) * (x.shape[-1] + border) - 1) * math.exp(-alpha)
    return float(kernel.abs().sum(dim=(1, 2, 3)).max() * 2 * x.abs().max() * missing)


def draw_case(
    kernel: int = 3, size: int = 7, channels: int = 3, out: int = 5, seed: int = 0
) -> tuple[Tensor, ...]:
    """Draw images (2, C, S, S), a kernel (D, C, K, K) and a bias (D,): standard normal, float64."""
    generator = torch.Generator().manual_seed(seed)
    shapes = (2, channels, size, size), (out, channels, kernel, kernel), (out,)
    return tuple(torch.randn(shape, dtype=torch.float64, generator=generator) for shape in shapes)


def measure_errors(
    alphas: Sequence[float], kernel: int = 3, size: int = 7, seed: int = 0
) -> dict[float, dict[str, float]]:
    """Measure the largest absolute difference from `conv2d`, and its bound, for each alpha.

    "inside" covers the pixels where the kernel fits into the image, on which both paddings agree;
    the other two differences cover the whole image, one for each padding.
    """
    x, weight, bias = draw_case(kernel, size, seed=seed)
    border = kernel // 2
    inside = ..., slice(border, size - border), slice(border, size - border)

    def difference(alpha: float, padding: Padding) -> Tensor:
        layer = attend(x, weight, bias, alpha, padding)
        return (layer - convolve(x, weight, bias, padding)).abs()

    errors: dict[float, dict[str, float]] = {}
    for alpha in alphas:
        replicate = difference(alpha, "replicate")
        errors[alpha] = {
            "inside": replicate[inside].max().item(),
            "whole, border repeated": replicate.max().item(),
            "whole, zero padding": difference(alpha, "zeros").max().item(),
            "bound": compute_bound(x, weight, alpha, "zeros"),
        }
    return errors


def add_errors(table: Table, errors: dict[float, dict[str, float]], seed: int, kernel: str) -> None:
    """Add measured errors to a table, one row for each alpha.

    `kernel` is the second part of the row's name.
    """
    for alpha, quantities in errors.items():
        name = "hard attention" if math.isinf(alpha) else f"alpha {alpha:g}"
        for quantity, value in quantities.items():
            column = Column(metric=Metric(quantity, unit="", better="lower"))
            table.add(Row(name, kernel), column, value, str(seed))


def make_table(
    alphas: Sequence[float] = (1, 5, 10, 20, 40, math.inf),
    kernel: int = 3,
    size: int = 7,
    seeds: Sequence[int] = (0, 1, 2),
) -> Table:
    """Make the table of errors for random images and one random kernel per seed."""
    title = f"self-attention as a {kernel} x {kernel} convolution"
    table = Table(
        f"{title} ({kernel**2} heads, {size} x {size} pixels)",
        format_spec=".1e",
        marks_best=False,
    )
    for seed in seeds:
        add_errors(table, measure_errors(alphas, kernel, size, seed), seed, "")
    table.note(
        "largest absolute difference from conv2d in float64, "
        f"mean ± standard deviation over {len(seeds)} random images and kernels"
    )
    table.note(
        "bound: at most (T - 1) exp(-alpha) of the attention misses its pixel; "
        "hard attention differs from conv2d only in the order of summation"
    )
    return table


# ---------------------------------------------------------------- with sslrun's attention block


def build_layer(kernel: Tensor, bias: Tensor | None, alpha: float, dilation: int = 1) -> Attention:
    """Build sslrun's attention block with weights that compute a convolution of `embed_pixels`.

    The block has no relative positions, and the construction does not need them:

        |δ - Δ|² = |k|² - 2 k·(q + Δ) + |q + Δ|².

    The last term is the same for all keys, so the softmax cancels it. The rest is the negative
    product of a query (2 (q + Δ), -1) and a key (k, |k|²), both linear in a token that contains its
    coordinates. Each head is as wide as its coordinates, values and share of the output need.

    Raises ValueError if the block is too narrow for a pixel with its coordinates.
    """
    out, channels, size, _ = kernel.shape
    shifts = list_shifts(size, dilation)
    head_width = max(channels, 3, -(-out // len(shifts)))
    width = len(shifts) * head_width
    if channels + 4 > width:
        raise ValueError(
            f"the kernel is too small: a token of {width} channels cannot hold "
            f"{channels} channels of a pixel and 4 of its coordinates"
        )
    layer = Attention(width, len(shifts)).double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.zero_()
        # The block divides scores by the square root of the head's width.
        scale = alpha * head_width**0.5
        for head, shift in enumerate(shifts):
            _set_head(layer, head * head_width, shift, kernel.flatten(2)[:, :, head], scale)
        if bias is not None:
            layer.proj.bias[:out] = bias
    return layer.eval()


def _set_head(layer: Attention, first: int, shift: Tensor, kernel: Tensor, scale: float) -> None:
    """Write the weights of the head whose channels begin at `first`; `kernel` (D, C) is its slice.

    A token is (pixel: C channels, row, column, row² + column², 1, zeros), as `embed_pixels` makes
    it. The head's query, key and score are

        query = scale (2 (row + Δ₁), 2 (column + Δ₂), -1),    key = (row, column, row² + column²).
    """
    out, channels = kernel.shape
    row, column, square, one = range(channels, channels + 4)
    down, right = shift
    q, k, v = layer.qkv.weight.split(layer.proj.in_features)
    q[first, row], q[first, one] = 2 * scale, 2 * scale * down
    q[first + 1, column], q[first + 1, one] = 2 * scale, 2 * scale * right
    q[first + 2, one] = -scale
    k[first, row] = k[first + 1, column] = k[first + 2, square] = 1
    v[first : first + channels, :channels] = torch.eye(channels, dtype=torch.float64)
    layer.proj.weight[:out, first : first + channels] = kernel


def embed_pixels(x: Tensor, width: int) -> Tensor:
    """Turn images (B, C, H, W) into tokens (B, H W, width) for the layer of `build_layer`.

    A token is (pixel: C channels, row, column, row² + column², 1, zeros).
    """
    pixels = list_pixels(*x.shape[-2:])
    squares = pixels.square().sum(1, keepdim=True)
    coordinates = torch.cat([pixels, squares, torch.ones(len(pixels), 1)], dim=1)
    values = x.flatten(2).transpose(1, 2)
    tokens = torch.cat([values, coordinates.expand(len(x), -1, -1)], dim=-1)
    return F.pad(tokens, [0, width - tokens.shape[-1]])
