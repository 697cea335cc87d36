"""A protocol without a head: labels spread over a graph of neighbors."""

import torch
import torch.nn.functional as F
from pydantic import Field

from sslrun.protocols.base import Protocol, Scores, protocols
from sslrun.registry import Options


@protocols.register("label-propagation")
class LabelPropagation(Protocol):
    """Spread labels over a graph of nearest neighbors (Zhou et al., NIPS 2003).

    The graph holds the labeled training examples and the examples of one split. Deviation: the
    neighbors are the k most similar examples with equal weights, which is cheaper than the paper's
    Gaussian kernel on all pairs.
    """

    class Options(Options):
        k: int = Field(default=10, ge=1)
        """Number of nearest neighbors of each example in the graph."""
        steps: int = Field(default=20, ge=1)
        """Number of times that each example takes the mean of its neighbors' scores."""
        alpha: float = Field(default=0.9, gt=0, lt=1)
        """Weight of the neighbors' scores; the example's own label has the rest."""

    def run(self, bench):
        train, labels = bench.features("train")
        known = F.one_hot(labels, len(bench.task.classes)).float()
        return Scores(
            {split: self._score(bench, split, train, known) for split in ("val", *bench.tests)}
        )

    def _score(self, bench, split, train, known):
        """Score a split: propagate the labels (N, C) of the training vectors to its vectors.

        Shapes: N training examples, M examples of the split, D features, C classes, k neighbors.
        """
        # vectors: (N + M, D)
        vectors = F.normalize(torch.cat([train, bench.vectors(split)]), dim=1)
        similarity = (vectors @ vectors.T).fill_diagonal_(-1.0)
        neighbors = similarity.topk(self.options.k, dim=1).indices  # (N + M, k)
        start = F.pad(known, (0, 0, 0, len(vectors) - len(known)))  # (N + M, C)
        scores = start
        for _ in range(self.options.steps):
            scores = (
                self.options.alpha * scores[neighbors].mean(dim=1)
                + (1 - self.options.alpha) * start
            )
        return bench.score(split, scores[len(known) :])
