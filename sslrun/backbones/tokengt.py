"""TokenGT (Kim et al., NeurIPS 2022, arXiv:2207.02505): a plain Transformer on nodes and edges."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from sslrun.backbones.base import Features, backbones
from sslrun.backbones.graph import CategoryEmbedding, GraphBackbone
from sslrun.backbones.transformer import (
    Block,
    BlockStyle,
    Stack,
    depth_rates,
    initialize,
    layers_of,
)
from sslrun.data.graph.graphs import EIGENVECTORS, Graphs
from sslrun.data.specs import GraphSpec
from sslrun.errors import UserError
from sslrun.registry import Options

SPECIAL = 2
"""Number of tokens before the nodes: [graph] and [null]."""
EVALUATION_SEED = 0
"""Seed of the identifiers in evaluation."""


class TokenGT(GraphBackbone):
    """A Transformer whose tokens are [graph], [null], all nodes, and all edges.

    Kim et al., NeurIPS 2022. A token is the sum of its features, a linear map of the identifiers
    [P_u; P_v] of its two nodes (a node is its own pair), and an embedding of its type. Nothing else
    says which nodes an edge connects: without identifiers a graph is a bag of its nodes and edges.
    `pooled` is the last layer at [graph]; `tokens` are nodes, then edges.

    Random identifiers are drawn for each graph and step in training. In evaluation they are fixed
    matrices, and the features are means over `draws` of them. Deviations from the authors' code:
    orthogonal identifiers are rows of one matrix of the full dimension, so that they neither depend
    on the other graphs of the batch nor lose their orthogonality; and dropout is where `Block` has
    it.
    """

    class Options(Options):
        ids: Literal["orf", "lap", "random", "none"] = "lap"
        """Identifiers of nodes. orf: random orthonormal vectors. lap: eigenvectors of the
        normalized Laplacian. random: random vectors. none: no identifiers."""
        dimension: int = Field(64, ge=EIGENVECTORS)
        """Dimension of the identifiers; at least the number of nodes of the largest graph for
        orf."""
        types: bool = True
        """Whether tokens carry the type node or edge."""
        draws: int = Field(1, ge=1)
        """Number of random identifiers whose features are averaged in evaluation."""
        lap_dropout: float = Field(0.2, ge=0, lt=1)
        """Dropout rate on the entries of eigenvectors in training."""
        dropout: float = Field(0.1, ge=0, lt=1)
        """Dropout rate on attention weights and the output of each branch."""
        drop_path: float = Field(0.0, ge=0, lt=1)
        """Largest rate of stochastic depth; it grows linearly with the layer."""
        depth: int | None = Field(None, ge=1)
        """Number of layers; default: the named model's."""
        width: int | None = Field(None, ge=1)
        """Width of a token; default: the named model's."""
        heads: int | None = Field(None, ge=1)
        """Number of attention heads; default: the named model's."""

        @model_validator(mode="after")
        def _draws_of_random(self) -> TokenGT.Options:
            if self.draws > 1 and self.ids in ("lap", "none"):
                raise ValueError(f"draws: {self.draws} needs ids: orf or random")
            return self

    shape: ClassVar[tuple[int, int, int, int]]
    """Depth, width, heads, and width of the MLP as a multiple of the width."""
    options: Options
    fixed: Tensor
    """(draws, dimension, dimension): identifiers in evaluation, one row per node."""

    def __init__(self, options: Options, spec: GraphSpec) -> None:
        super().__init__(options, spec)
        if options.ids in ("orf", "random") and spec.largest > options.dimension:
            raise UserError(
                f"{self.name}: the largest graph has {spec.largest} nodes, more than the "
                f"{options.dimension} identifiers: set backbone.dimension to {spec.largest}, or "
                "take backbone.ids: lap"
            )
        depth, width, heads, expansion = self.shape
        depth, width, heads = options.depth or depth, options.width or width, options.heads or heads
        if width % heads:
            raise UserError(f"{self.name}: width {width} is not a multiple of heads {heads}")
        self.width = width
        self.spectral = options.ids == "lap"
        self.special = nn.Parameter(torch.zeros(SPECIAL, width))
        self.node_embed = CategoryEmbedding(spec.nodes, width)
        self.bond_embed = CategoryEmbedding(spec.bonds, width)
        self.type_embed = nn.Embedding(2, width) if options.types else None
        self.identify = (
            None if options.ids == "none" else nn.Linear(2 * options.dimension, width, bias=False)
        )
        style = BlockStyle(expansion=expansion)
        self.blocks = Stack(
            Block(width, heads, style, dropout=options.dropout, drop_path=rate)
            for rate in depth_rates(options.drop_path, depth)
        )
        self.norm = nn.LayerNorm(width, eps=1e-6)
        initialize(self, width**-0.5)
        nn.init.trunc_normal_(self.special, std=0.02)
        if options.ids in ("orf", "random"):
            generator = torch.Generator().manual_seed(EVALUATION_SEED)
            shape = (options.draws, options.dimension, options.dimension)
            noise = torch.randn(shape, generator=generator, device="cpu")
            fixed = draw_identifiers(noise, options.ids)
            self.register_buffer("fixed", fixed, persistent=False)

    @classmethod
    def draws(cls, options: TokenGT.Options) -> bool:
        """Whether the network draws random numbers in training; only `none` may draw none."""
        return options.ids != "none" or super().draws(options)

    def forward(self, inputs: Graphs) -> Features:
        real = inputs.real
        results = [self._encode(inputs, ids, real) for ids in self._identifiers(inputs)]
        x = results[0] if len(results) == 1 else torch.stack(results).mean(dim=0)
        return Features(x[:, 0], x[:, SPECIAL:], mask=real)

    def _identifiers(self, inputs: Graphs) -> list[Tensor]:
        """Identifiers (B, n, d) of the nodes: several draws in evaluation, else one."""
        batch, count = inputs.nodes.shape[:2]
        match self.options.ids:
            case "none":
                return [inputs.spectrum.new_zeros(batch, count, 0)]
            case "lap":
                return [self._eigenvectors(inputs.spectrum)]
            case kind if self.training:
                shape = (batch, self.options.dimension, count)
                noise = torch.randn(shape, device=inputs.nodes.device)
                return [draw_identifiers(noise, kind)]
        return [ids[:count].expand(batch, -1, -1) for ids in self.fixed]

    def _eigenvectors(self, spectrum: Tensor) -> Tensor:
        """Eigenvectors (B, n, d), with random signs and dropout in training."""
        if self.training:
            coins = torch.rand(len(spectrum), 1, spectrum.shape[2], device=spectrum.device) < 0.5
            spectrum = torch.where(coins, -spectrum, spectrum)
            spectrum = F.dropout(spectrum, self.options.lap_dropout)
        return F.pad(spectrum, (0, self.options.dimension - spectrum.shape[2]))

    def _encode(self, inputs: Graphs, ids: Tensor, real: Tensor) -> Tensor:
        """Tokens (B, 2 + n + e, D) after the last layer."""
        x = self.embed_tokens(inputs, ids)
        special = self.special.expand(len(x), -1, -1)
        mask = F.pad(real, (SPECIAL, 0), value=True)[:, None, None]
        return self.norm(self.blocks(torch.cat([special, x], dim=1), mask))

    def embed_tokens(self, inputs: Graphs, ids: Tensor) -> Tensor:
        """Embed nodes, then edges, (B, n + e, D), with identifiers (B, n, d) of nodes."""
        nodes, edges = self.node_embed(inputs.nodes), self.bond_embed(inputs.bonds)
        if self.type_embed is not None:
            nodes, edges = nodes + self.type_embed.weight[0], edges + self.type_embed.weight[1]
        if self.identify is None:
            return torch.cat([nodes, edges], dim=1)
        graph = torch.arange(len(ids), device=ids.device)[:, None]
        ends = torch.cat(
            [ids[graph, inputs.edges[..., 0]], ids[graph, inputs.edges[..., 1]]], dim=-1
        )
        pairs = torch.cat([torch.cat([ids, ids], dim=-1), ends], dim=1)
        return torch.cat([nodes, edges], dim=1) + self.identify(pairs)

    def layers(self) -> list[list[nn.Parameter]]:
        return layers_of(self, self.blocks, self.norm)


def draw_identifiers(noise: Tensor, ids: str) -> Tensor:
    """Turn Gaussian noise (B, d, n) with n <= d into identifiers (B, n, d), one row per node.

    orf: the columns of the noise are made orthonormal, so that the rows are the first n of a
    random orthogonal matrix, uniformly distributed (Mezzadri 2007, arXiv:math-ph/0609050).
    Otherwise rows have length 1 on average.
    """
    if ids != "orf":
        return noise.transpose(1, 2) * noise.shape[1] ** -0.5
    q, r = torch.linalg.qr(noise.float())
    return (q * r.diagonal(dim1=1, dim2=2).sign()[:, None]).transpose(1, 2)


def _tokengt(name: str, shape: tuple[int, int, int, int], about: str) -> None:
    tags = {"__doc__": about, "__module__": __name__, "shape": shape}
    backbones.register(name)(type(name, (TokenGT,), tags))


_tokengt("tokengt-tiny", (3, 64, 4, 4), "TokenGT of 3 layers, 64 wide.")
_tokengt("tokengt-small", (6, 192, 6, 4), "TokenGT of 6 layers, 192 wide.")
_tokengt(
    "tokengt-base",
    (12, 768, 32, 1),
    "TokenGT of Kim et al. 2022 for PCQM4Mv2: 12 layers, 768 wide, 32 heads.",
)
