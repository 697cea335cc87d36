"""Learning from a frozen backbone: its features are computed once, and classifiers are fitted to them."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from math import log10
from typing import Annotated, Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from sslrun.backbones.base import Backbone, Features
from sslrun.data.examples import Batch, Examples
from sslrun.errors import UserError
from sslrun.registry import Options
from sslrun.tasks.base import outputs_of
from sslrun.tasks.metrics import accuracy

CHUNK = 2**24
"""Elements of an intermediate tensor, above which rows are done in turns: 64 MiB of float32."""


def extract(
    backbone: Backbone,
    examples: Examples,
    inputs: Callable[[Batch], Any],
    device: torch.device,
    batch: int,
    reads: Callable[[Features], Tensor] = lambda features: features.pooled,
    counter: AbstractContextManager[Any] | None = None,
) -> Tensor:
    """Features (N, D) float32 of all examples on `device`: one pass in eval mode, under the caller's autocast.

    `inputs` makes of a raw batch what the backbone takes, as `Task.inputs` does, and `reads` takes of what it gives
    one vector an example, as `Task.vector`. `counter`: entered around one batch, to count its FLOPs. The backbone
    is left in the mode it was in. UserError if a feature is not finite.
    """
    training = backbone.training
    backbone.eval()
    with torch.inference_mode():
        (found,) = outputs_of(examples, lambda raw: (reads(backbone(inputs(raw))).float(),), device, batch, counter)
    every = found.clone()  # outside, so that heads may be trained on it
    backbone.train(training)
    if not every.isfinite().all():
        raise UserError("the backbone's features are not finite: its training diverged; lower the learning rate there")
    return every


class KnnOptions(Options):
    """Weighted nearest neighbours on frozen features (Wu et al. 2018)."""

    k: int = Field(default=20, ge=1)
    """Neighbours that vote; 200 in Wu et al., 20 in DINO (Caron et al. 2021)."""
    temperature: float = Field(default=0.07, gt=0)
    """A neighbour of cosine similarity s votes with weight exp(s / temperature)."""


def weighted_knn(train_x: Tensor, train_y: Tensor, test_x: Tensor, k: int, temperature: float, classes: int) -> Tensor:
    """Scores (M, C) of test features (M, D) by their `k` nearest training features (N, D) of labels (N,).

    The vote of Wu et al. (CVPR 2018), divided by its sum: a score is a share of the votes. `k` is at most N.
    """
    bank = F.normalize(train_x, dim=1).T
    scores = test_x.new_zeros(len(test_x), classes)
    rows = max(256, CHUNK // bank.shape[1])
    for queries, votes in zip(test_x.split(rows), scores.split(rows), strict=True):
        similarity, nearest = (F.normalize(queries, dim=1) @ bank).topk(min(k, bank.shape[1]), dim=1)
        votes.scatter_add_(1, train_y[nearest], (similarity / temperature).softmax(dim=1))
    return scores


class LogisticOptions(Options):
    """L2-regularised multinomial logistic regression on frozen features, its strength chosen on validation.

    Minimises mean cross-entropy + l2/2 ||W||^2 over features standardised by one mean and one deviation (Kumar et al.
    2022; their C is 1 / (l2 N)).
    """

    l2_min: float = Field(default=1e-6, gt=0)
    """Weakest L2 regularisation tried."""
    l2_max: float = Field(default=10.0, gt=0)
    """Strongest L2 regularisation tried."""
    l2_count: int = Field(default=15, ge=1)
    """Strengths tried, log-spaced; SimCLR's transfer has 45 (Chen et al. 2020), Kumar et al. about 50."""
    iterations: int = Field(default=200, ge=1)
    """L-BFGS iterations at most."""
    tolerance: float = Field(default=1e-5, gt=0)
    """A solution is reached where no element of the gradient is larger."""

    def strengths(self) -> list[float]:
        """The L2 strengths to try, ascending."""
        exponents = torch.linspace(log10(self.l2_min), log10(self.l2_max), self.l2_count, dtype=torch.float64)
        return [10**exponent for exponent in exponents.tolist()]

    @model_validator(mode="after")
    def _ordered(self) -> LogisticOptions:
        if self.l2_min > self.l2_max:
            raise ValueError(f"l2_min ({self.l2_min:g}) is above l2_max ({self.l2_max:g})")
        return self


class LogisticFit(NamedTuple):
    """A classifier of raw features, and how it was chosen."""

    head: nn.Linear
    """Takes features as they are, (N, D) to (N, C)."""
    l2: float
    """The strength chosen."""
    scores: dict[float, float]
    """The validation score of every strength tried, ascending in strength."""


class LogisticRegression:
    """Multinomial logistic regression, all strengths of regularisation fitted at once on the features' device."""

    def __init__(self, options: LogisticOptions | None = None) -> None:
        self.options = options or LogisticOptions()

    def fit(
        self,
        train_x: Tensor,
        train_y: Tensor,
        val_x: Tensor,
        val_y: Tensor,
        classes: int,
        score: Callable[[Tensor, Tensor], float] = accuracy,
    ) -> LogisticFit:
        """The classifier of the highest validation `score` (of scores (M, C) and labels); of equals the most regular.

        Features (N, D) and (M, D), labels (N,) and (M,).
        """
        strengths = self.options.strengths()
        weights, biases = logistic(
            train_x, train_y, classes, strengths, self.options.iterations, self.options.tolerance
        )
        scores = {
            l2: score(torch.addmm(bias, val_x, weight.T), val_y)
            for l2, weight, bias in zip(strengths, weights, biases, strict=True)
        }
        best = max(range(len(strengths)), key=lambda i: (scores[strengths[i]], strengths[i]))
        head = nn.Linear(train_x.shape[1], classes, device=train_x.device, dtype=train_x.dtype)
        with torch.no_grad():
            head.weight.copy_(weights[best])
            head.bias.copy_(biases[best])
        return LogisticFit(head, strengths[best], scores)


@torch.no_grad()
def logistic(
    x: Tensor, y: Tensor, classes: int, l2: list[float], iterations: int = 200, tolerance: float = 1e-5
) -> tuple[Tensor, Tensor]:
    """Weights (L, C, D) and biases (L, C), for features as they are, that minimise each of L objectives

        mean cross-entropy + l2/2 ||W||^2        (the bias is free)

    where W acts on the features (N, D) standardised by their overall mean and deviation. Solved in the principal
    components of the features: there the Hessian at W = 0 is diagonal for every l2 at once, and starts L-BFGS off.
    """
    with _full_precision():
        mean, deviation = x.mean(dim=0), x.std()
        deviation = torch.where(deviation > 0, deviation, 1.0)
        centred = (x - mean) / deviation
        variances, axes = torch.linalg.eigh(centred.T @ centred / len(x))
        # Centred feature by feature: the free bias, carried by a last column of ones, makes up for it.
        z = torch.cat([centred @ axes, x.new_ones(len(x), 1)], dim=1)
        variances = torch.cat([variances.clamp_min(0), x.new_ones(1)])
        penalty = x.new_tensor(l2)[:, None].repeat(1, z.shape[1])
        penalty[:, -1] = 0

        def objective(flat: Tensor, which: Tensor) -> tuple[Tensor, Tensor]:
            weights = flat.view(len(which), classes, -1)
            shrink = weights * penalty[which, None]
            loss, gradient = (shrink * weights).sum(dim=(1, 2)) / 2, shrink
            rows = max(256, CHUNK // (len(which) * classes))
            for part, labels in zip(z.split(rows), y.split(rows), strict=True):
                logits = (part @ weights.flatten(0, 1).T).view(len(part), len(which), classes)
                log_p = logits.log_softmax(dim=2)
                at_label = labels[:, None, None].expand(-1, len(which), 1)
                loss -= log_p.gather(2, at_label).sum(dim=(0, 2)) / len(z)
                error = log_p.exp_().scatter_add_(2, at_label, log_p.new_full((1, 1, 1), -1.0).expand_as(at_label))
                gradient += (error.flatten(1).T @ part).view_as(weights) / len(z)
            return loss, gradient.flatten(1)

        curvature = (variances / classes + penalty).repeat(1, classes)
        solution = _lbfgs(objective, torch.zeros_like(curvature), 1 / curvature, iterations, tolerance)
        solved = solution.view(len(l2), classes, -1)
        weights = solved[..., :-1] @ axes.T / deviation
        return weights, solved[..., -1] - weights @ mean


def _lbfgs(
    objective: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
    start: Tensor,
    inverse: Tensor,
    iterations: int,
    tolerance: float,
    memory: int = 10,
) -> Tensor:
    """Minima (L, P) of L smooth convex functions, solved side by side: L-BFGS (Liu & Nocedal 1989).

    `objective(points (M, P), which (M,))` gives values (M,) and gradients (M, P) of the functions `which`. `inverse`
    (L, P): the diagonal of the first inverse Hessian. A function leaves when no element of its gradient is above
    `tolerance`, or when rounding hides any further decrease.
    """
    eps = torch.finfo(start.dtype).eps
    minima = start.clone()
    which = torch.arange(len(start), device=start.device)
    point, pairs = start, deque[tuple[Tensor, Tensor, Tensor]](maxlen=memory)
    value, gradient = objective(point, which)
    decrease = torch.full_like(value, torch.inf)
    for _ in range(iterations):
        unsolved = (gradient.abs().amax(dim=1) > tolerance) & (decrease > eps * value.abs())
        if not unsolved.all():
            minima[which] = point
            if not unsolved.any():
                return minima
            which, point, value, gradient, inverse = (t[unsolved] for t in (which, point, value, gradient, inverse))
            pairs = deque([(s[unsolved], c[unsolved], w[unsolved]) for s, c, w in pairs], maxlen=memory)
        direction = _two_loops(gradient, pairs, inverse)
        slope = (direction * gradient).sum(dim=1)
        length = torch.ones_like(value)
        for _ in range(20):
            step = length[:, None] * direction
            next_value, next_gradient = objective(point + step, which)
            long = next_value > value + 1e-4 * length * slope + eps * value.abs()
            if not long.any():
                break
            length = torch.where(long, length / 2, length)
        change = next_gradient - gradient
        agreement = (step * change).sum(dim=1)
        # A pair in which rounding hides the curvature gets weight 0.
        weight = torch.where(agreement > eps * (change * change).sum(dim=1), 1 / agreement, 0.0)
        pairs.append((step, change, weight))
        decrease = value - next_value
        # Where nothing along the direction is lower, the function stays where it is, and leaves.
        point = torch.where(decrease[:, None] > 0, point + step, point)
        value, gradient = next_value, next_gradient
    minima[which] = point
    return minima


def _two_loops(gradient: Tensor, pairs: deque[tuple[Tensor, Tensor, Tensor]], inverse: Tensor) -> Tensor:
    """The quasi-Newton direction (M, P), from pairs of steps, changes of gradient, and 1 / their product (M,)."""
    direction = -gradient
    shares = []
    for step, change, weight in reversed(pairs):
        share = weight * (step * direction).sum(dim=1)
        direction = direction - share[:, None] * change
        shares.append(share)
    direction = direction * inverse
    for (step, change, weight), share in zip(pairs, reversed(shares), strict=True):
        direction = direction + (share - weight * (change * direction).sum(dim=1))[:, None] * step
    return direction


class FewshotOptions(Options):
    """Linear classification of frozen features by regularised least squares, from a few examples a class.

    As ViT's few-shot accuracy (Dosovitskiy et al. 2021, section 4.1), the strength as in the evaluator that its authors
    published (big_vision).
    """

    shots: tuple[Annotated[int, Field(ge=1)], ...] = Field((1, 5, 10, 25), min_length=1)
    """Labelled examples a class, in place of the task's `labels`; drawn by the seed, fewer of them among more."""
    l2: float = Field(1024.0, gt=0)
    """Strength of the regularisation, of features standardised one by one."""


@torch.no_grad()
def least_squares(x: Tensor, y: Tensor, classes: int, l2: float) -> nn.Linear:
    """The map of features (N, D) as they are to {-1, 1}^C, 1 at the label (N,), that minimises

        sum of squared errors + l2 ||W||^2        (the bias is free)

    where W acts on the features less their mean, each by its own deviation. In closed form, in float64 (on the CPU where
    the device has none), from whichever of the features' and the examples' products is smaller. big_vision's bias is a
    column of 100 and so almost free; the deviation is that of its code, too: a feature that never changes is left out.
    """
    device, dtype = x.device, x.dtype
    if device.type == "mps":
        x, y = x.cpu(), y.cpu()
    x = x.double()
    mean, deviation = x.mean(dim=0), x.std(dim=0, correction=0) + 1e-5
    z = (x - mean) / deviation
    targets = 2 * F.one_hot(y, classes).double() - 1
    middle = targets.mean(dim=0)
    wide = z.shape[1] > len(z)
    gram = z @ z.T if wide else z.T @ z
    gram.diagonal().add_(l2)
    factor = torch.linalg.cholesky(gram)
    weights = z.T @ torch.cholesky_solve(targets, factor) if wide else torch.cholesky_solve(z.T @ targets, factor)
    head = nn.Linear(x.shape[1], classes, device=device, dtype=dtype)
    head.weight.copy_((weights / deviation[:, None]).T)
    head.bias.copy_(middle - (mean / deviation) @ weights)
    return head


@contextmanager
def _full_precision() -> Iterator[None]:
    """float32 products in float32: TF32 would stop the line search early."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


Classifier = Literal["nearest-neighbours", "logistic-regression", "random-forest", "svm"]
"""The names of scikit-learn's classifiers that `classical` fits."""


class ClassicalFit(NamedTuple):
    """A scikit-learn classifier's answers, and how it was chosen."""

    scores: Tensor
    """(M, C) of the test examples; -inf for a class that the training examples lack."""
    chosen: dict[str, float]
    """The hyper-parameter with the highest validation accuracy."""
    accuracy: float
    """Its validation accuracy, in percent."""


def classical(
    model: Classifier,
    train_x: Tensor,
    train_y: Tensor,
    val_x: Tensor,
    val_y: Tensor,
    test_x: Tensor,
    classes: int,
    seed: int,
) -> ClassicalFit:
    """A classifier before deep learning, of scikit-learn, on the CPU; (N, ...) inputs are flattened.

    The hyper-parameter it is most sensitive to is chosen on validation from a few values. All but the forest see inputs
    standardised feature by feature.
    """
    # Imported here: they take a second that no other protocol needs.
    from sklearn.ensemble import RandomForestClassifier
    from sklearn.linear_model import LogisticRegression as SklearnLogistic
    from sklearn.neighbors import KNeighborsClassifier
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler
    from sklearn.svm import SVC
    from threadpoolctl import threadpool_limits

    x, x_val, x_test = (t.flatten(1).float().cpu().numpy() for t in (train_x, val_x, test_x))
    make: Callable[..., Any]
    values: Sequence[float]
    match model:
        case "nearest-neighbours":
            make, option, values = KNeighborsClassifier, "n_neighbors", [k for k in (1, 5, 20) if k <= len(x)]
        case "logistic-regression":
            make, option, values = partial(SklearnLogistic, max_iter=1000), "C", [1e-3, 1e-2, 1e-1, 1.0]
        case "random-forest":
            forest = partial(RandomForestClassifier, n_estimators=300, random_state=seed, n_jobs=-1)
            make, option, values = forest, "min_samples_leaf", [1, 5]
        case "svm":
            make, option, values = SVC, "C", [0.1, 1.0, 10.0]
    best: tuple[float, Any, float] | None = None
    for value in values:
        scaling = [] if model == "random-forest" else [StandardScaler()]
        # Beside other workers, BLAS would start a thread per core of the machine; they wait for each other.
        with threadpool_limits(torch.get_num_threads()):
            fitted = make_pipeline(*scaling, make(**{option: value})).fit(x, train_y.cpu().numpy())
            score = 100 * fitted.score(x_val, val_y.cpu().numpy())
        if best is None or score > best[0]:
            best = score, fitted, value
    assert best is not None
    score, fitted, chosen = best
    found = fitted.decision_function(x_test) if model == "svm" else fitted.predict_proba(x_test)
    if found.ndim == 1:
        found = torch.stack([torch.from_numpy(-found), torch.from_numpy(found)], dim=1)
    scores = torch.full((len(x_test), classes), -torch.inf)
    scores[:, torch.from_numpy(fitted.classes_)] = torch.as_tensor(found, dtype=torch.float32)
    return ClassicalFit(scores, {option: chosen}, score)
