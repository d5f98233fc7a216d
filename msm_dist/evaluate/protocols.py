"""Shallow classifiers on fixed vectors, by three protocols: linear, hear, knn.

In: vectors of clips [N, E], their targets [N, C] and which clips are for what. Out: scores of the test clips, and what
was chosen on the validation clips. A result is a function of its inputs and a seed; torch's own generator is left as
it was. Fails with DataError where validation clips have no label, or none of their scores is a number.

    linear  standardised vectors, one linear layer, Adam, the learning rate chosen on validation (as EVAR does it)
    hear    the HEAR kit's predictor and its grid of eight points, chosen on validation (Turian et al., 2022)
    knn     standardised vectors, the ten nearest training clips by cosine

Legend: N clips, E numbers of a vector, C classes, B clips of a batch, K neighbours.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, log_softmax, normalize

from msm_dist.errors import DataError
from msm_dist.evaluate.scores import resampled
from msm_dist.evaluate.tasks import Parts

Protocol = Literal["linear", "hear", "knn"]

LINEAR_RATES = (3e-5, 3e-4)
NARROW_RATES = (*LINEAR_RATES, 3e-3)
"""For the log-mel's statistics, 320 numbers: a narrow layer is slow to train, and they may not lose by that alone."""
LINEAR_BATCH, LINEAR_EPOCHS, LINEAR_PATIENCE = 200, 200, 20
LINEAR_LEAST_STEPS = 8
"""Of an epoch: with ten clips of each class it would be one step, and a run of 20 without luck the end."""

HEAR_BATCH, HEAR_EPOCHS, HEAR_VALID_EVERY, HEAR_PATIENCE = 1024, 500, 3, 20
HEAR_WIDTH, HEAR_DROPOUT = 1024, 0.1
HEAR_ORDER_SEED = 0

NEIGHBOURS = 10
TIE_BREAK = 1e-6
ROWS_AT_ONCE = 4096
WHOLE_VALUES = 2**27
"""N x E that are standardised as a whole, half a gigabyte; more go batch by batch."""


class HearPoint(NamedTuple):
    """A point of the kit's grid."""

    layers: int
    init: Literal["uniform", "normal"]
    """Xavier's."""
    lr: float


HEAR_GRID = (
    HearPoint(1, "normal", 1e-4),
    HearPoint(2, "uniform", 1e-3),
    HearPoint(1, "normal", 1e-3),
    HearPoint(1, "normal", 3.2e-4),
    HearPoint(2, "normal", 3.2e-4),
    HearPoint(2, "uniform", 3.2e-4),
    HearPoint(2, "normal", 3.2e-3),
    HearPoint(2, "uniform", 3.2e-3),
)
"""The eight of its sixteen points that the kit takes by default, in its order."""


@dataclass(frozen=True)
class Problem:
    """What a classifier is fitted to. `score` (scores.WEIGHTED) chooses on the validation clips."""

    vectors: Tensor
    """float32 [N, E], on the CPU; may be a memory map."""
    targets: np.ndarray
    """float32 [N, C] of zeros and ones."""
    parts: Parts
    multilabel: bool
    score: str
    device: str | torch.device = "cpu"


@dataclass(frozen=True)
class Fitted:
    """Scores of the test clips in their order, float [M, C], and what was chosen: settings, epoch, its score."""

    scores: np.ndarray
    chosen: dict[str, Any]


def fit(
    protocol: Protocol,
    problem: Problem,
    seed: int,
    rates: tuple[float, ...] = LINEAR_RATES,
    point: HearPoint | None = None,
) -> Fitted:
    """Fit a classifier by a protocol and apply it to the test clips. Raises DataError.

    `rates` are those of the protocol linear. `point` spares the protocol hear its grid: the kit searches it on the
    first rotation only.
    """
    if protocol == "linear":
        return linear(problem, seed, rates)
    if protocol == "hear":
        return hear(problem, seed, HEAR_GRID if point is None else (point,))
    return knn(problem)


def linear(problem: Problem, seed: int, rates: tuple[float, ...] = LINEAR_RATES) -> Fitted:
    """One linear layer on standardised vectors, at the learning rate that does best on the validation clips.

    Up to 200 epochs of batches of 200, or of an eighth of the training clips where these are fewer than 1,600, stopped
    after 20 without a better validation score, or at an equal one a lower validation loss; the best epoch is kept.
    """
    batch = min(LINEAR_BATCH, max(1, len(problem.parts.train) // LINEAR_LEAST_STEPS))
    rows = _Rows(problem, _standard(problem))

    def start(rng: torch.Generator) -> nn.Module:
        layer = nn.Linear(rows.num_inputs, rows.num_classes)
        bound = 1 / math.sqrt(rows.num_inputs)
        for parameter in layer.parameters():
            nn.init.uniform_(parameter.data, -bound, bound, generator=rng)
        return layer

    recipe = _Recipe(batch, LINEAR_EPOCHS, LINEAR_PATIENCE, valid_every=1, shuffled=True, settles_ties=True)
    return _best(problem, (({"lr": rate}, _descend(rows, start, rate, recipe, seed)) for rate in rates))


def hear(problem: Problem, seed: int, grid: tuple[HearPoint, ...] = HEAR_GRID) -> Fitted:
    """The HEAR kit's predictor: hidden layers of 1,024 with batch norm, dropout and ReLU on vectors as they are.

    Adam on batches of 1,024 in an order that is drawn once, as the kit draws it: files often go class by class. Up to
    500 epochs, validation every 3, stopped after 20 validations without a better score; the best point of the grid and
    its best validation are kept.
    """
    order = np.random.default_rng(HEAR_ORDER_SEED).permutation(problem.parts.train)
    problem = replace(problem, parts=replace(problem.parts, train=order))
    rows = _Rows(problem, (torch.zeros(problem.vectors.shape[1]), torch.ones(problem.vectors.shape[1])))
    recipe = _Recipe(HEAR_BATCH, HEAR_EPOCHS, HEAR_PATIENCE, HEAR_VALID_EVERY, shuffled=False, settles_ties=False)

    def fits() -> Iterator[tuple[dict[str, Any], "_Descended | None"]]:
        for point in grid:

            def start(rng: torch.Generator, point: HearPoint = point) -> nn.Module:
                return _predictor(rows.num_inputs, rows.num_classes, point, rng)

            yield point._asdict(), _descend(rows, start, point.lr, recipe, seed)

    return _best(problem, fits())


def knn(problem: Problem, neighbours: int = NEIGHBOURS) -> Fitted:
    """The mean of the targets of the nearest training clips, by the cosine of standardised vectors.

    Between classes with as many neighbours the nearer ones decide.
    """
    rows = _Rows(problem, _standard(problem))
    known = normalize(torch.cat([x for x, _ in rows.batches(problem.parts.train, ROWS_AT_ONCE)]))
    targets = rows.targets[problem.parts.train].to(known.device)
    count = min(neighbours, len(known))
    found = []
    for x, _ in rows.batches(problem.parts.test, ROWS_AT_ONCE // 8):
        near = (normalize(x) @ known.T).topk(count)
        # In float32 the tie-break is lost beside votes near a half.
        votes = targets[near.indices].double() * (1 + TIE_BREAK * near.values.double()[..., None])
        found.append(votes.mean(1))
    return Fitted(torch.cat(found).cpu().numpy(), {"neighbours": count})


@dataclass(frozen=True)
class _Recipe:
    batch: int
    epochs: int
    patience: int
    """Validations without a better one before the end."""
    valid_every: int
    """Epochs."""
    shuffled: bool
    settles_ties: bool
    """Whether at an equal score a lower validation loss is better."""


@dataclass(frozen=True)
class _Descended:
    scores: np.ndarray
    valid: float
    valid_loss: float
    epoch: int


class _Rows:
    """Batches of a problem, standardised on the device where they are used."""

    def __init__(self, problem: Problem, scale: tuple[Tensor, Tensor]):
        self.problem = problem
        self.targets = torch.from_numpy(problem.targets)
        self.mean, self.inverse_std = (value.to(problem.device) for value in scale)
        self.num_inputs, self.num_classes = problem.vectors.shape[1], problem.targets.shape[1]
        self.whole = self._scaled(problem.vectors) if problem.vectors.numel() <= WHOLE_VALUES else None

    def batches(self, places: np.ndarray | Tensor, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """(vectors [B, E], targets [B, C]) of clips, `size` at a time."""
        for some in torch.as_tensor(places).split(size):
            x = (
                self._scaled(self.problem.vectors[some])
                if self.whole is None
                else self.whole[some.to(self.mean.device)]
            )
            yield x, self.targets[some].to(self.mean.device)

    def _scaled(self, x: Tensor) -> Tensor:
        return (x.to(self.mean.device) - self.mean) * self.inverse_std

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Mean over clips: cross entropy, or over clips and classes of a sigmoid each."""
        if self.problem.multilabel:
            return binary_cross_entropy_with_logits(logits, targets)
        return cross_entropy(logits, targets.argmax(1))


def _standard(problem: Problem) -> tuple[Tensor, Tensor]:
    """Mean and inverse deviation of the training clips' vectors, float32 [E]; a constant number stays as it is."""
    total, squares = (torch.zeros(problem.vectors.shape[1], dtype=torch.float64) for _ in range(2))
    places = torch.from_numpy(problem.parts.train)
    # Squares about a first vector keep the digits of a large mean.
    origin = problem.vectors[places[0]].double()
    for some in places.split(ROWS_AT_ONCE):
        x = problem.vectors[some].double() - origin
        total += x.sum(0)
        squares += x.square().sum(0)
    mean = total / len(places)
    deviation = (squares / len(places) - mean.square()).clamp(min=0).sqrt()
    inverse = torch.where(deviation > 1e-9 * (origin + mean).abs().clamp(min=1e-9), 1 / deviation, 1.0)
    return (mean + origin).float(), inverse.float()


def _descend(
    rows: _Rows, start: Callable[[torch.Generator], nn.Module], lr: float, recipe: _Recipe, seed: int
) -> _Descended | None:
    """Train by Adam and give the test scores of the epoch that does best on the validation clips.

    None where no epoch's validation score is a number.
    """
    problem = rows.problem
    devices = [problem.device] if torch.device(problem.device).type == "cuda" else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed)  # of dropout
        rng = torch.Generator().manual_seed(seed)
        model = start(rng).to(problem.device)
        optimizer = torch.optim.Adam(model.parameters(), lr=lr)
        order = torch.from_numpy(problem.parts.train)
        best, since, state = (-math.inf, -math.inf), 0, {}
        best_epoch = 0
        for epoch in range(1, recipe.epochs + 1):
            if recipe.shuffled:
                order = order[torch.randperm(len(order), generator=rng)]
            model.train()
            for x, y in rows.batches(order, recipe.batch):
                if len(x) == 1 and not recipe.shuffled and len(order) > 1:
                    continue  # Batch norm has no deviation of a single clip.
                optimizer.zero_grad()
                rows.loss(model(x), y).backward()
                optimizer.step()
            if epoch % recipe.valid_every:
                continue
            found = _judge(rows, model)
            if found > best if recipe.settles_ties else found[0] > best[0]:
                best, since, best_epoch = found, 0, epoch
                state = {name: value.clone() for name, value in model.state_dict().items()}
            elif (since := since + 1) >= recipe.patience:
                break
        if not state:
            return None
        model.load_state_dict(state)
        scores, _ = _apply(rows, model, problem.parts.test)
    return _Descended(scores, best[0], -best[1], best_epoch)


@torch.no_grad()
def _apply(rows: _Rows, model: nn.Module, places: np.ndarray) -> tuple[np.ndarray, float]:
    """Scores of clips [n, C] and their mean loss."""
    model.eval()
    scores, total = [], 0.0
    for x, y in rows.batches(places, ROWS_AT_ONCE):
        logits = model(x)
        # mAP compares a class over clips: what a softmax takes no notice of must have no say in it.
        scores.append(logits if rows.problem.multilabel else log_softmax(logits, 1))
        total += rows.loss(logits, y).item() * len(x)
    return torch.cat(scores).cpu().numpy(), total / len(places)


def _judge(rows: _Rows, model: nn.Module) -> tuple[float, float]:
    """Score and negative loss of the validation clips."""
    places = rows.problem.parts.valid
    scores, loss = _apply(rows, model, places)
    each = np.ones((1, len(places)))
    return float(resampled(rows.problem.score, scores, rows.problem.targets[places], each)[0]), -loss


def _best(problem: Problem, fits: Iterator[tuple[dict[str, Any], _Descended | None]]) -> Fitted:
    """The fit with the best validation score; between equals the lower validation loss, then the earlier."""
    known = [(settings, fitted) for settings, fitted in fits if fitted is not None]
    if not known:
        raise DataError(
            f"{problem.score} of the {len(problem.parts.valid)} validation clips is never a number, so nothing can be "
            "chosen by it; give more validation clips, with and without each label"
        )
    settings, fitted = max(known, key=lambda fit: (fit[1].valid, -fit[1].valid_loss))
    return Fitted(fitted.scores, settings | {"epoch": fitted.epoch, "valid": fitted.valid})


def _predictor(num_inputs: int, num_classes: int, point: HearPoint, rng: torch.Generator) -> nn.Module:
    init = nn.init.xavier_uniform_ if point.init == "uniform" else nn.init.xavier_normal_
    modules: list[nn.Module] = []
    width, gain = num_inputs, 1.0
    for _ in range(point.layers):
        hidden = nn.Linear(width, HEAR_WIDTH)
        init(hidden.weight, gain=gain, generator=rng)
        modules += [hidden, nn.BatchNorm1d(HEAR_WIDTH), nn.Dropout(HEAR_DROPOUT), nn.ReLU()]
        width, gain = HEAR_WIDTH, nn.init.calculate_gain("relu")
    output = nn.Linear(width, num_classes)
    init(output.weight, gain=gain, generator=rng)
    return nn.Sequential(*modules, output)
