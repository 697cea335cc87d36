"""Fine-tuning distorts pretrained features: two-layer linear networks, where every step of the argument can be read off.

Kumar, Raghunathan, Jones, Ma, Liang, "Fine-Tuning can Distort Pretrained Features and Underperform
Out-of-Distribution", ICLR 2022, section 3. A network v·B x with features B (k, d) and a head v (k,)
learns y = v*·B* x (rows of B* orthonormal, w* = B*ᵀ v*) from examples that lie in a subspace S of
R^d, starting from pretrained features B0 and a random head v0, by gradient flow on the mean squared
error:

    g = XᵀX (Bᵀ v - w*) / n,    dv/dt = -2 B g,    dB/dt = -2 v gᵀ  (FT; LP holds B still; LP-FT starts from LP's head).

Errors are ID |P_S (w - w*)|² and OOD |w - w*|², with w = Bᵀ v: mean squared errors where the
inputs' second moment is the projection onto S, and the identity (which is also the worst case over
inputs of norm 1). What must hold:

- the features of inputs orthogonal to S never change: g lies in S, and so does every row that is added to B;
- v vᵀ - B Bᵀ never changes (Du, Hu, Lee, NeurIPS 2018);
- LP with perfect features, B0 = U B* with U a rotation, ends at OOD error 0, and LP-FT stays there (Proposition 3.2 of the
  first version of the paper);
- FT's OOD error is at all times at least `bound` (its main theorem), however well it fits the examples.

Features that change for inputs in S, and not for those orthogonal to it, are what distorts: the
head follows the first.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from sslrun.errors import UserError
from sslrun.metric import Metric
from sslrun.results.address import Column, Row
from sslrun.results.table import Table

Array = np.ndarray

TOLERANCE = 1e-10
"""Of the solver, relative, at each step."""
FITTED = 1e-20
"""Mean squared training error at which a flow has arrived."""
LONGEST = 1e4
"""Time after which a flow that has not arrived is given up."""

EARLY = 0.01
"""Where the time axis of a plot begins."""


@dataclass(frozen=True)
class Network:
    """v·B x."""

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
    """Examples (n, d), the network that labels them, and the one that learning starts from."""

    examples: Array
    truth: Network
    start: Network

    @classmethod
    def random(
        cls, noise: float = 0.0, *, dimensions: int = 100, features: int = 10, span: int = 40, examples: int = 80,
        head: float = 1.0, seed: int = 0,
    ) -> Problem:  # fmt: skip
        """Normal examples in a random subspace of dimension `span`, and a truth of norm 1.

        noise: what is added to the true features before they are made orthonormal again, as a share
        of their norm; they are then rotated, which no protocol may notice. head: the norm of v0,
        about.
        """
        generator = np.random.default_rng(seed)
        normal = generator.standard_normal
        subspace = np.linalg.qr(normal((dimensions, span)))[0]
        truth = _orthonormal(normal((features, dimensions)))
        target = normal(features)
        perturbed = _orthonormal(truth + noise * normal(truth.shape) / dimensions**0.5)
        rotation = _orthonormal(normal((features, features)))
        return cls(
            normal((examples, span)) @ subspace.T,
            Network(truth, target / np.linalg.norm(target)),
            Network(rotation @ perturbed, head * normal(features) / features**0.5),
        )

    @cached_property
    def moment(self) -> Array:
        """XᵀX / n (d, d)."""
        return self.examples.T @ self.examples / len(self.examples)

    @cached_property
    def bases(self) -> tuple[Array, Array]:
        """Orthonormal bases (d, m) of the examples' span S, and (d, d - m) of what is orthogonal to it."""
        values, vectors = np.linalg.svd(self.examples)[1:]
        rank = int((values > values[0] * 1e-10).sum())
        return vectors[:rank].T, vectors[rank:].T

    def error_id(self, network: Network) -> float:
        return float(np.sum((self.bases[0].T @ (network.weight - self.truth.weight)) ** 2))

    def error_ood(self, network: Network) -> float:
        return float(np.sum((network.weight - self.truth.weight) ** 2))

    def feature_change(self, network: Network) -> tuple[float, float]:
        """How far the features of an input of norm 1 moved, root mean square: of inputs in S, and orthogonal to it."""
        moved = network.features - self.start.features
        in_span, orthogonal = (
            np.sum((moved @ basis) ** 2) / max(1, basis.shape[1]) for basis in self.bases
        )
        return float(in_span**0.5), float(orthogonal**0.5)

    @property
    def head_error(self) -> float:
        """phi = sqrt |(v0·v*)² - (v*·v*)²|, v* turned as the features are: how far the head starts from the true one."""
        aligned = self._rotation @ self.truth.head
        return float(abs((self.start.head @ aligned) ** 2 - (aligned @ aligned) ** 2) ** 0.5)

    @property
    def feature_error(self) -> float:
        """epsilon = |B0 - U B*| (spectral), U the rotation that brings them nearest (Frobenius: Procrustes)."""
        return float(np.linalg.norm(self.start.features - self._rotation @ self.truth.features, 2))

    @property
    def bound(self) -> float:
        """What FT's OOD error can't fall below, at any time:

            sqrt(OOD) >= cos(theta) / sqrt(k) * min(phi, phi² / |w*|) / (1 + |w*|)² - epsilon,

        theta the largest principal angle between the rows of B* and the orthogonal complement of S.
        0 where that says nothing: features too far from perfect, or S too large.
        """
        outside = self.bases[1]
        count = len(self.truth.features)
        if outside.shape[1] < count:
            return 0.0
        cosine = np.linalg.svd(self.truth.features @ outside, compute_uv=False)[-1]
        norm = np.linalg.norm(self.truth.weight)
        phi = self.head_error
        root = cosine / count**0.5 * min(phi, phi**2 / norm) / (1 + norm) ** 2 - self.feature_error
        return float(max(0.0, root) ** 2)

    @cached_property
    def _rotation(self) -> Array:
        left, _, right = np.linalg.svd(self.start.features @ self.truth.features.T)
        return left @ right


@dataclass(frozen=True)
class Way:
    """A gradient flow: networks at times, the last where it arrived."""

    times: Array
    networks: list[Network]

    @property
    def end(self) -> Network:
        return self.networks[-1]

    @property
    def drift(self) -> float:
        """The largest change, on the way, of any entry of what is conserved."""
        first = self.networks[0].balance
        return max(float(np.abs(each.balance - first).max()) for each in self.networks)


def flow(problem: Problem, start: Network) -> Way:
    """Gradient flow from `start` until the examples are fitted (DOP853). UserError: they aren't, however long."""
    from scipy.integrate import solve_ivp  # half a second to import

    shape, target, moment = start.features.shape, problem.truth.weight, problem.moment
    split = start.features.size

    def unpack(state: Array) -> Network:
        return Network(state[:split].reshape(shape), state[split:])

    def velocity(_: float, state: Array) -> Array:
        network = unpack(state)
        slope = moment @ (network.weight - target)
        return -2 * np.concatenate(
            [np.outer(network.head, slope).ravel(), network.features @ slope]
        )

    def arrived(_: float, state: Array) -> float:
        return float(np.mean((problem.examples @ (unpack(state).weight - target)) ** 2)) - FITTED

    arrived.terminal = True  # type: ignore[attr-defined]
    state = np.concatenate([start.features.ravel(), start.head])
    if arrived(0.0, state) <= 0:
        return Way(np.zeros(1), [start])
    solved = solve_ivp(
        velocity,
        (0, LONGEST),
        state,
        method="DOP853",
        rtol=TOLERANCE,
        atol=TOLERANCE / 1000,
        events=arrived,
    )
    if solved.status != 1:
        raise UserError(
            f"the flow has not fitted the examples by time {LONGEST:g}: where they hardly span their space it takes long; "
            "take more examples"
        )
    return Way(solved.t, [unpack(each) for each in solved.y.T])


def probe(problem: Problem) -> Network:
    """Where the flow of the head alone ends: least squares on the features, from v0 where they leave it free."""
    features, head = problem.start.features, problem.start.head
    inputs = problem.examples @ features.T
    left = problem.examples @ problem.truth.weight - inputs @ head
    return Network(features, head + np.linalg.lstsq(inputs, left, rcond=None)[0])


def learn(problem: Problem) -> dict[str, Way]:
    """Each protocol's way. LP's is in closed form: where it starts, and where it ends."""
    probed = probe(problem)
    return {
        "LP": Way(np.array([0.0, np.inf]), [problem.start, probed]),
        "FT": flow(problem, problem.start),
        "LP-FT": flow(problem, probed),
    }


NOISE = {
    "perfect features": 0.0,
    "nearly perfect features": 0.01,
    "good features": 0.1,
    "poor features": 0.7,
}


def table(seeds: Sequence[int] = range(5), noise: dict[str, float] = NOISE, **sizes: int) -> Table:
    """ID error, OOD error, features' change and the bound, of LP, FT and LP-FT, over random problems."""
    made = Table("two-layer linear networks", format_spec=".2g", marks_best=False)
    drift = 0.0
    for name, share in noise.items():
        for seed in seeds:
            problem = Problem.random(share, seed=seed, **sizes)
            for protocol, path in learn(problem).items():
                in_span, orthogonal = problem.feature_change(path.end)
                for what, value in (
                    ("ID error", problem.error_id(path.end)),
                    ("OOD error", problem.error_ood(path.end)),
                    ("features' change in span", in_span),
                    ("orthogonal to it", orthogonal),
                ):
                    made.add(Row(name, protocol), _column(what), value, str(seed))
                if protocol == "FT":
                    made.add(
                        Row(name, protocol), _column("OOD error at least"), problem.bound, str(seed)
                    )
                drift = max(drift, path.drift if protocol != "LP" else 0.0)
    made.note(
        f"mean ± standard deviation over {len(seeds)} random problems; Kumar et al., ICLR 2022, section 3"
    )
    made.note(f"v vᵀ - B Bᵀ, which gradient flow conserves, drifted by at most {drift:.1g}")
    return made


def _column(quantity: str) -> Column:
    return Column(metric=Metric(quantity, unit="", better="lower"))


def plot(path: Path, noise: float = 0.01, seed: int = 0, **sizes: int) -> str:
    """Draw errors and the features' change over the time of the flow, and what the theorems say of them; returns what was
    done, which is nothing without matplotlib.

    noise: by default the features are so near to perfect that the theorem bounds FT's OOD error
    away from 0.
    """
    if importlib.util.find_spec("matplotlib") is None:
        return f"{path}: not drawn, matplotlib isn't installed (pip install matplotlib)"
    from matplotlib.figure import Figure

    problem = Problem.random(noise, seed=seed, **sizes)
    figure = Figure(figsize=(13, 3.8), layout="constrained")
    figure.suptitle(
        f"two-layer linear networks, features off the true ones by a share of {noise:g}"
    )
    ways = learn(problem)
    panels = dict(
        zip(("ID error", "OOD error", "features' change"), figure.subplots(1, 3), strict=True)
    )
    for (protocol, way), color in zip(ways.items(), ("C0", "C1", "C2"), strict=True):
        for title, error in (("ID error", problem.error_id), ("OOD error", problem.error_ood)):
            if protocol == "LP":
                panels[title].axhline(
                    error(way.end), label="LP, at its end", color=color, linestyle="--"
                )
            else:
                panels[title].plot(
                    way.times, [error(each) for each in way.networks], label=protocol, color=color
                )
        if protocol != "LP":  # whose features stay as they are
            in_span, orthogonal = zip(*map(problem.feature_change, way.networks), strict=True)
            panels["features' change"].plot(
                way.times, in_span, label=f"{protocol}, in the examples' span", color=color
            )
            panels["features' change"].plot(
                way.times,
                orthogonal,
                label=f"{protocol}, orthogonal to it",
                color=color,
                linestyle=":",
            )
    if problem.bound:
        panels["OOD error"].axhline(
            problem.bound, label="FT's is never below (theorem)", color="gray", linestyle=":"
        )
    for title, axes in panels.items():
        axes.set(
            title=title,
            xlabel="time of the gradient flow",
            xscale="log",
            yscale="log",
            xlim=(EARLY, None),
        )
        axes.legend(fontsize="small")
    panels["ID error"].set(ylabel="mean squared", ylim=(1e-8, None))
    panels["features' change"].set(
        ylabel="of an input of norm 1, root mean square", ylim=(1e-17, None)
    )
    figure.savefig(path, dpi=150)
    return f"{path}: drawn"


def _orthonormal(rows: Array) -> Array:
    """The matrix of orthonormal rows nearest to `rows` (its polar factor)."""
    left, _, right = np.linalg.svd(rows, full_matrices=False)
    return left @ right
