"""Distortion of pretrained features by fine-tuning, in two-layer linear networks.

Kumar, Raghunathan, Jones, Ma and Liang, "Fine-Tuning can Distort Pretrained Features and
Underperform Out-of-Distribution", ICLR 2022, section 3.

A network v·B x has features B (k, d) and a head v (k,). The truth is y = v*·B* x; the rows of B*
are orthonormal, and w* = B*ᵀ v*. The n examples X (n, d) lie in a subspace S of R^d. Learning
starts from pretrained features B0 and a random head v0, and follows the gradient flow of the mean
squared error:

    g = XᵀX (Bᵀ v - w*) / n,    dv/dt = -2 B g,    dB/dt = -2 v gᵀ.

- LP (linear probing) keeps B fixed.
- FT (fine-tuning) learns B and v.
- LP-FT is FT that starts from the head of LP.

With w = Bᵀ v, the errors are ID |P_S (w - w*)|² and OOD |w - w*|². These are mean squared errors
over inputs whose second moment is the projection P_S onto S, or the identity. The OOD error is also
the largest squared error of any input of norm 1. The theory predicts:

- The features of inputs orthogonal to S never change, because g lies in S and so does every row
  that is added to B.
- v vᵀ - B Bᵀ never changes (Du, Hu and Lee, NeurIPS 2018).
- With perfect features, B0 = U B* for a rotation U, LP ends at OOD error 0 and LP-FT stays there
  (Proposition 3.2 of the first version of the paper).
- The OOD error of FT is at all times at least `Problem.bound`, however well FT fits the examples.
  This is the argument of the main theorem (3.2) with all constants carried through. The theorem's
  own formula promises too much for k = 1; `Problem.bound` gives the counterexample.

Distortion is the difference between the two kinds of inputs: features change for inputs in S and
not for inputs orthogonal to S, while the head adapts to the changed ones.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from sslrun.errors import UserError
from sslrun.metric import Metric
from sslrun.results.address import Column, Row
from sslrun.results.table import Table

Array = np.ndarray

TOLERANCE = 1e-10
"""Relative tolerance of the solver at each step."""
FITTED = 1e-20
"""Mean squared training error at which a flow has converged."""
MAX_TIME = 1e4
"""Time after which a flow is abandoned if it does not converge."""
PLOT_START = 0.01
"""Start of the plot's logarithmic time axis."""


@dataclass(frozen=True)
class Network:
    """A two-layer linear network v·B x."""

    features: Array
    """B (k, d)."""
    head: Array
    """v (k,)."""

    @property
    def weight(self) -> Array:
        """w (d,): the network as one linear map."""
        return self.features.T @ self.head

    @property
    def balance(self) -> Array:
        """v vᵀ - B Bᵀ (k, k), which gradient flow conserves."""
        return np.outer(self.head, self.head) - self.features @ self.features.T


@dataclass(frozen=True)
class Problem:
    """Examples (n, d), the network that labels them, and the pretrained network."""

    examples: Array
    truth: Network
    start: Network

    @classmethod
    def random(
        cls,
        noise: float = 0.0,
        *,
        dimensions: int = 100,
        features: int = 10,
        span: int = 40,
        examples: int = 80,
        head: float = 1.0,
        seed: int = 0,
    ) -> Problem:
        """Draw normal examples in a random subspace, a true network and a pretrained one.

        The true head has norm 1.

        Args:
            noise: size of the perturbation of the true features, relative to their norm. The
                perturbed features are made orthonormal again, then rotated; the rotation must not
                matter to any protocol.
            dimensions: d.
            features: k.
            span: dimension of the subspace S.
            examples: n.
            head: approximate norm of v0.
            seed: seed of all draws.
        """
        generator = np.random.default_rng(seed)
        normal = generator.standard_normal
        subspace = np.linalg.qr(normal((dimensions, span)))[0]
        truth = _orthonormalize(normal((features, dimensions)))
        target = normal(features)
        perturbed = _orthonormalize(truth + noise * normal(truth.shape) / dimensions**0.5)
        rotation = _orthonormalize(normal((features, features)))
        return cls(
            normal((examples, span)) @ subspace.T,
            Network(truth, target / np.linalg.norm(target)),
            Network(rotation @ perturbed, head * normal(features) / features**0.5),
        )

    @cached_property
    def moment(self) -> Array:
        """Second moment of the examples, XᵀX / n (d, d)."""
        return self.examples.T @ self.examples / len(self.examples)

    @cached_property
    def bases(self) -> tuple[Array, Array]:
        """Orthonormal bases of the examples' span S (d, m) and of its complement (d, d - m)."""
        values, vectors = np.linalg.svd(self.examples)[1:]
        rank = int((values > values[0] * 1e-10).sum())
        return vectors[:rank].T, vectors[rank:].T

    def error_id(self, network: Network) -> float:
        """Compute the error in distribution, |P_S (w - w*)|²."""
        return float(np.sum((self.bases[0].T @ (network.weight - self.truth.weight)) ** 2))

    def error_ood(self, network: Network) -> float:
        """Compute the error out of distribution, |w - w*|²."""
        return float(np.sum((network.weight - self.truth.weight) ** 2))

    def feature_change(self, network: Network) -> tuple[float, float]:
        """How far features moved from the pretrained ones, for inputs in S and orthogonal to S.

        Both values are the root mean square distance over inputs of norm 1.
        """
        change = network.features - self.start.features
        in_span, orthogonal = (
            np.sum((change @ basis) ** 2) / max(1, basis.shape[1]) for basis in self.bases
        )
        return float(in_span**0.5), float(orthogonal**0.5)

    @property
    def head_error(self) -> float:
        """Distance of the initial head from the true one, phi = sqrt |(v0·v*)² - (v*·v*)²|.

        v* is rotated as the pretrained features are.
        """
        aligned = self._rotation @ self.truth.head
        return float(abs((self.start.head @ aligned) ** 2 - (aligned @ aligned) ** 2) ** 0.5)

    @property
    def feature_error(self) -> float:
        """Distance of the pretrained features from the true ones, epsilon = |B0 - U B*|.

        The norm is the spectral one. U is the rotation that minimizes the Frobenius norm of the
        difference (Procrustes).
        """
        return float(np.linalg.norm(self.start.features - self._rotation @ self.truth.features, 2))

    @property
    def bound(self) -> float:
        """Lower bound of FT's OOD error, valid at all times and for every k; 0 promises nothing.

        Let v* and B* be rotated to B0, and P, Q the projections onto S and its complement. Let
        s = |P B0ᵀ v*|, b = |P B0ᵀ|, c the smallest singular value of B0 Q (k, d), and
        E = (B0 - B*)ᵀ v*; b is a spectral norm. Suppose that sqrt(OOD) = e at some time. Then:

        1. B Q = B0 Q never changes, so Q (w - w*) = Q B0ᵀ (v - v*) + Q E. Hence
           |v - v*| <= h = (e + |Q E|) / c.
        2. B P Bᵀ - v vᵀ never changes either, so |P Bᵀ x|² <= |P B0ᵀ x|² + (v·x)². With
           x = v* - v, and as |v| <= |v*| + h, P Bᵀ v* = P w + P Bᵀ x is within
           g = e + |P E| + h sqrt(b² + (|v*| + h)²) of P B0ᵀ v* = P w* + P E.
        3. v*ᵀ (B P Bᵀ - v vᵀ) v* therefore moved by at most 2 s g + g² in its first term, and
           (v·v*)² is within 2 |v*|³ h + |v*|² h² of |v*|⁴. Together:

            phi² = |(v0·v*)² - |v*|⁴| <= 2 |v*|³ h + |v*|² h² + 2 s g + g².

        The right side grows with e: the bound is e² where the two sides are equal. It is 0 if the
        right side exceeds phi² at e = 0, as the features are too far from perfect, or if c = 0, as
        S leaves the features no room.

        The paper states the closed form

            e >= cos(theta) / sqrt(k) * min(phi, phi² / |w*|) / (1 + |w*|)² - |B0 - B*|,

        where theta is the largest principal angle between the features and the complement of S. It
        does not hold for k = 1: perfect features at an angle of a to S, |v*| = 1 and v0 = 0 end at
        e = 0.22 sin(a) for a of 10 degrees; the closed form says 0.25 sin(a).
        """
        inside, outside = self.bases
        start, target = self.start.features, self._rotation @ self.truth.head
        if outside.shape[1] < len(start):
            return 0.0
        least = np.linalg.svd(start @ outside, compute_uv=False)[-1]
        if least < 1e-12:
            return 0.0
        off = start.T @ target - self.truth.weight
        off_inside, off_outside = (float(np.linalg.norm(basis.T @ off)) for basis in self.bases)
        size, largest = np.linalg.norm(target), np.linalg.norm(start @ inside, 2)
        aligned = np.linalg.norm(inside.T @ start.T @ target)

        def largest_head_error(root: float) -> float:
            """Largest phi² with which the root of the OOD error can be `root`."""
            head = (root + off_outside) / least
            moved = root + off_inside + head * (largest**2 + (size + head) ** 2) ** 0.5
            return float(2 * size**3 * head + (size * head) ** 2 + 2 * aligned * moved + moved**2)

        return _last_below(largest_head_error, self.head_error**2) ** 2

    @cached_property
    def _rotation(self) -> Array:
        """The rotation U (k, k) that brings B* nearest to B0."""
        left, _, right = np.linalg.svd(self.start.features @ self.truth.features.T)
        return left @ right


@dataclass(frozen=True)
class Trajectory:
    """A gradient flow: networks at increasing times, the last of them converged."""

    times: Array
    networks: list[Network]

    @property
    def end(self) -> Network:
        return self.networks[-1]

    @property
    def drift(self) -> float:
        """Largest change over time of any entry of the conserved matrix v vᵀ - B Bᵀ."""
        first = self.networks[0].balance
        return max(float(np.abs(network.balance - first).max()) for network in self.networks)


def solve_flow(problem: Problem, start: Network) -> Trajectory:
    """Follow the gradient flow from `start` until the examples are fitted, with the DOP853 solver.

    Raises UserError if they are not fitted by `MAX_TIME`.
    """
    from scipy.integrate import solve_ivp  # half a second to import

    # The solver's state is one vector: the features row by row, then the head.
    shape, target, moment = start.features.shape, problem.truth.weight, problem.moment
    split = start.features.size

    def unpack(state: Array) -> Network:
        return Network(state[:split].reshape(shape), state[split:])

    def velocity(_: float, state: Array) -> Array:
        network = unpack(state)
        gradient = moment @ (network.weight - target)
        return -2 * np.concatenate(
            [np.outer(network.head, gradient).ravel(), network.features @ gradient]
        )

    def excess_error(_: float, state: Array) -> float:
        return float(np.mean((problem.examples @ (unpack(state).weight - target)) ** 2)) - FITTED

    excess_error.terminal = True  # type: ignore[attr-defined]
    state = np.concatenate([start.features.ravel(), start.head])
    if excess_error(0.0, state) <= 0:
        return Trajectory(np.zeros(1), [start])
    solution = solve_ivp(
        velocity,
        (0, MAX_TIME),
        state,
        method="DOP853",
        rtol=TOLERANCE,
        atol=TOLERANCE / 1000,
        events=excess_error,
    )
    if solution.status != 1:
        raise UserError(
            f"the gradient flow does not fit the examples by time {MAX_TIME:g}; "
            "it is slow if the examples barely span their subspace, so take more examples"
        )
    return Trajectory(solution.t, [unpack(state) for state in solution.y.T])


def fit_head(problem: Problem) -> Network:
    """Compute where the gradient flow of the head alone ends.

    It is the least-squares fit on the pretrained features. If several heads fit equally well, the
    one nearest to v0 is the limit.
    """
    features, head = problem.start.features, problem.start.head
    inputs = problem.examples @ features.T
    residual = problem.examples @ problem.truth.weight - inputs @ head
    return Network(features, head + np.linalg.lstsq(inputs, residual, rcond=None)[0])


def train_all(problem: Problem) -> dict[str, Trajectory]:
    """Train by each protocol; LP in closed form, with only its start and its end."""
    probed = fit_head(problem)
    return {
        "LP": Trajectory(np.array([0.0, np.inf]), [problem.start, probed]),
        "FT": solve_flow(problem, problem.start),
        "LP-FT": solve_flow(problem, probed),
    }


NOISE = {
    "perfect features": 0.0,
    "nearly perfect features": 0.01,
    "good features": 0.1,
    "poor features": 0.7,
}
"""Relative perturbation of the true features, by row of the table."""


def make_table(
    seeds: Sequence[int] = range(5), noise: dict[str, float] = NOISE, **sizes: int
) -> Table:
    """Make the table of errors, feature change and bound of LP, FT and LP-FT over random problems.

    `sizes` are the sizes of `Problem.random`.
    """
    table = Table("two-layer linear networks", format_spec=".2g", marks_best=False)
    drift = 0.0
    for name, share in noise.items():
        for seed in seeds:
            problem = Problem.random(share, seed=seed, **sizes)
            trajectories = train_all(problem)
            for protocol, trajectory in trajectories.items():
                for quantity, value in _describe_end(problem, protocol, trajectory.end).items():
                    column = Column(metric=Metric(quantity, unit="", better="lower"))
                    table.add(Row(name, protocol), column, value, str(seed))
            drift = max(drift, trajectories["FT"].drift, trajectories["LP-FT"].drift)
    table.note(
        f"mean ± standard deviation over {len(seeds)} random problems; "
        "Kumar et al., ICLR 2022, section 3"
    )
    table.note(f"v vᵀ - B Bᵀ, which gradient flow conserves, drifted by at most {drift:.1g}")
    return table


def _describe_end(problem: Problem, protocol: str, network: Network) -> dict[str, float]:
    """Compute the table's quantities for a trained network; only FT has a bound."""
    in_span, orthogonal = problem.feature_change(network)
    quantities = {
        "ID error": problem.error_id(network),
        "OOD error": problem.error_ood(network),
        "features' change in span": in_span,
        "orthogonal to it": orthogonal,
    }
    if protocol == "FT":
        quantities["OOD error at least"] = problem.bound
    return quantities


# ---------------------------------------------------------------- plot


def plot(path: Path, noise: float = 0.01, seed: int = 0, **sizes: int) -> str:
    """Plot errors and feature change over the time of the flow, and return a line that says so.

    With the default `noise`, the features are so nearly perfect that the bound keeps FT's OOD
    error away from 0. Without matplotlib nothing is drawn, and the line says that.
    """
    if importlib.util.find_spec("matplotlib") is None:
        return f"{path}: not drawn, matplotlib isn't installed (pip install matplotlib)"
    from matplotlib.figure import Figure

    problem = Problem.random(noise, seed=seed, **sizes)
    figure = Figure(figsize=(13, 3.8), layout="constrained")
    figure.suptitle(
        f"two-layer linear networks, true features perturbed by {noise:g} of their norm"
    )
    panels = dict(zip(PANELS, figure.subplots(1, 3), strict=True))
    for color, (protocol, trajectory) in enumerate(train_all(problem).items()):
        _plot_protocol(panels, problem, protocol, trajectory, f"C{color}")
    if problem.bound:
        panels["OOD error"].axhline(
            problem.bound, label="lower bound of FT", color="gray", linestyle=":"
        )
    for title, axes in panels.items():
        axes.set(
            title=title,
            xlabel="time of the gradient flow",
            xscale="log",
            yscale="log",
            xlim=(PLOT_START, None),
        )
        axes.legend(fontsize="small")
    panels["ID error"].set(ylabel="mean squared error", ylim=(1e-8, None))
    panels["feature change"].set(
        ylabel="root mean square over inputs of norm 1", ylim=(1e-17, None)
    )
    figure.savefig(path, dpi=150)
    return f"{path}: drawn"


PANELS = ("ID error", "OOD error", "feature change")
"""Titles of the plot's panels."""


def _plot_protocol(
    panels: dict[str, Any], problem: Problem, protocol: str, trajectory: Trajectory, color: str
) -> None:
    """Add one protocol's curves to the panels; for LP, a horizontal line at its final errors."""
    for title, error in (("ID error", problem.error_id), ("OOD error", problem.error_ood)):
        axes = panels[title]
        if protocol == "LP":
            axes.axhline(error(trajectory.end), label="LP, at its end", color=color, linestyle="--")
        else:
            errors = [error(network) for network in trajectory.networks]
            axes.plot(trajectory.times, errors, label=protocol, color=color)
    if protocol == "LP":
        return
    in_span, orthogonal = zip(*map(problem.feature_change, trajectory.networks), strict=True)
    axes = panels["feature change"]
    axes.plot(trajectory.times, in_span, label=f"{protocol}, inputs in S", color=color)
    axes.plot(
        trajectory.times,
        orthogonal,
        label=f"{protocol}, inputs orthogonal to S",
        color=color,
        linestyle=":",
    )


def _orthonormalize(rows: Array) -> Array:
    """Compute the matrix of orthonormal rows nearest to `rows`: its polar factor."""
    left, _, right = np.linalg.svd(rows, full_matrices=False)
    return left @ right


def _last_below(function: Callable[[float], float], limit: float) -> float:
    """Compute where an increasing function reaches `limit`, rounded down; 0 if it starts above.

    The function is at most `limit` at the result, which is found by bisection.
    """
    low, high = 0.0, 1.0
    if function(low) > limit:
        return 0.0
    while function(high) <= limit:
        high *= 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if function(middle) <= limit else (low, middle)
    return low
