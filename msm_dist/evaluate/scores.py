"""Scores of classifiers, and how sure they are.

In: scores of classes float [N, C] (any increasing function of a probability), targets [N, C] of zeros and ones. Out:
numbers, the better the higher; intervals by resampling clips. Average precision and the area under the ROC curve are
scikit-learn's (extra `eval`); resampled they are computed here from weights of clips, which the tests compare with it.
Fails with ConfigError where scikit-learn is missing, with DataError where a score has no meaning on the targets.

Legend: N clips, C classes, R resamples.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from msm_dist.errors import ConfigError, DataError

RESAMPLES = 1000
FEWEST_RESAMPLES = 200
MOST_VALUES = 2**31
"""N x C x R that are worth the wait; beyond it there are fewer resamples, down to FEWEST_RESAMPLES."""
VALUES_AT_ONCE = 2**24
CONFIDENCE = 0.95
NOTES_OF_AN_OCTAVE = 12

Score = Callable[[np.ndarray, np.ndarray], float]


class Interval(NamedTuple):
    """The middle 95 % of resamples."""

    low: float
    high: float


def top1_accuracy(scores: np.ndarray, targets: np.ndarray) -> float:
    """The share of clips whose best class is the right one."""
    return float((scores.argmax(1) == targets.argmax(1)).mean())


def chroma_accuracy(scores: np.ndarray, targets: np.ndarray) -> float:
    """The share of clips whose best class is the right note of any octave: classes are semitones, in order."""
    return float((scores.argmax(1) % NOTES_OF_AN_OCTAVE == targets.argmax(1) % NOTES_OF_AN_OCTAVE).mean())


def mean_average_precision(scores: np.ndarray, targets: np.ndarray) -> float:
    """Average precision, the mean over classes that have positives. Raises ConfigError, DataError."""
    metrics = _sklearn()
    classes = classes_with_positives(targets)
    return float(np.mean([metrics.average_precision_score(targets[:, c], scores[:, c]) for c in classes]))


def mean_area(scores: np.ndarray, targets: np.ndarray) -> float:
    """Area under the ROC curve, the mean over classes with positives and negatives. Raises ConfigError, DataError."""
    return float(np.mean(_areas(scores, targets)))


def d_prime(scores: np.ndarray, targets: np.ndarray) -> float:
    """The mean over classes of sqrt(2) * the normal quantile of the area; infinite for a perfect one."""
    import torch

    return float(torch.special.ndtri(torch.tensor(_areas(scores, targets), dtype=torch.float64)).mean()) * math.sqrt(2)


SCORES: dict[str, Score] = {
    "top1_acc": top1_accuracy,
    "pitch_acc": top1_accuracy,
    "chroma_acc": chroma_accuracy,
    "mAP": mean_average_precision,
    "aucroc": mean_area,
    "d_prime": d_prime,
}
"""By the names of the HEAR kit."""
SKLEARN_SCORES = {"mAP", "aucroc", "d_prime"}


def check_scores(names: Sequence[str], source: str) -> None:
    """Raise DataError for a score that is not in SCORES, or can't be resampled and yet decides.

    Raises ConfigError where one needs scikit-learn and that is missing.
    """
    if unknown := [name for name in names if name not in SCORES]:
        raise DataError(f"{source}: has the score {unknown[0]}, must be one of {', '.join(SCORES)}")
    if names[0] not in WEIGHTED:
        raise DataError(f"{source}: {names[0]} can't decide; put one of {', '.join(WEIGHTED)} first")
    if SKLEARN_SCORES.intersection(names):
        _sklearn()


def classes_with_positives(targets: np.ndarray) -> np.ndarray:
    """The classes that some clip has: int64 [<= C]. Raises DataError where there are none."""
    classes = np.flatnonzero(targets.sum(0))
    if not len(classes):
        raise DataError("no clip that is to be judged has a label; mAP has no meaning")
    return classes


def resample_weights(num_clips: int, num_classes: int, seed: int) -> np.ndarray:
    """How often each clip is drawn, in R draws of N clips with replacement: float32 [R, N]."""
    count = min(RESAMPLES, max(FEWEST_RESAMPLES, MOST_VALUES // (num_clips * num_classes)))
    rng = np.random.default_rng([seed, 0xB007])
    weights = np.empty((count, num_clips), np.float32)
    for row in weights:
        row[:] = np.bincount(rng.integers(0, num_clips, num_clips), minlength=num_clips)
    return weights


def resampled(name: str, scores: np.ndarray, targets: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """The score `name` of each resample: float64 [R]. A class without positives in a resample is left out of it."""
    return WEIGHTED[name](scores, targets, weights)


def interval(values: np.ndarray) -> Interval:
    """The middle 95 % of values [R]."""
    low, high = np.nanquantile(values, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Interval(float(low), float(high))


def _weighted_accuracy(octave: int | None) -> Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]:
    def score(scores: np.ndarray, targets: np.ndarray, weights: np.ndarray) -> np.ndarray:
        found, wanted = scores.argmax(1), targets.argmax(1)
        right = found == wanted if octave is None else found % octave == wanted % octave
        return weights @ right.astype(np.float64) / weights.sum(1)

    return score


def _weighted_average_precision(scores: np.ndarray, targets: np.ndarray, weights: np.ndarray) -> np.ndarray:
    return _mean_over_classes(_class_precision, scores, targets, weights)


def _weighted_area(scores: np.ndarray, targets: np.ndarray, weights: np.ndarray) -> np.ndarray:
    return _mean_over_classes(_class_area, scores, targets, weights)


WEIGHTED = {
    "top1_acc": _weighted_accuracy(None),
    "pitch_acc": _weighted_accuracy(None),
    "chroma_acc": _weighted_accuracy(NOTES_OF_AN_OCTAVE),
    "mAP": _weighted_average_precision,
    "aucroc": _weighted_area,
}


def _mean_over_classes(
    class_score: Callable[..., np.ndarray], scores: np.ndarray, targets: np.ndarray, weights: np.ndarray
) -> np.ndarray:
    """The mean over classes, for some resamples at a time; NaN of a class counts as absent."""
    total, count = np.zeros(len(weights)), np.zeros(len(weights))
    rows = max(1, VALUES_AT_ONCE // len(scores))
    for c in classes_with_positives(targets):
        order = np.argsort(-scores[:, c], kind="stable")
        ranked, positive = scores[order, c], targets[order, c] > 0
        # The last clip that shares a score: no threshold lies between equal scores.
        last = np.searchsorted(-ranked, -ranked, side="right") - 1
        for first in range(0, len(weights), rows):
            part = slice(first, first + rows)
            with np.errstate(invalid="ignore", divide="ignore"):
                value = class_score(weights[part][:, order].astype(np.float64), positive, last)
            total[part] += np.nan_to_num(value, posinf=0, neginf=0)
            count[part] += np.isfinite(value)
    with np.errstate(invalid="ignore"):
        return total / count


def _class_precision(weights: np.ndarray, positive: np.ndarray, last: np.ndarray) -> np.ndarray:
    """Average precision of clips in descending order: the mean over positives of the precision down to them."""
    all_above = weights.cumsum(1)[:, last[positive]]
    found = (weights * positive).cumsum(1)
    precision = np.where(all_above > 0, found[:, last[positive]] / all_above, 0.0)
    return (precision * weights[:, positive]).sum(1) / found[:, -1]


def _class_area(weights: np.ndarray, positive: np.ndarray, last: np.ndarray) -> np.ndarray:
    """The share of pairs of a positive and a negative in the right order, equal scores counted half."""
    negatives = (weights * ~positive).cumsum(1)
    total = negatives[:, -1:]
    first = np.searchsorted(last, last[positive], side="left")
    below = total - negatives[:, last[positive]]
    above = np.where(first > 0, negatives[:, first - 1], 0.0)
    equal = total - below - above
    own = weights[:, positive]
    return (own * (below + equal / 2)).sum(1) / (own.sum(1) * total[:, 0])


def _areas(scores: np.ndarray, targets: np.ndarray) -> list[float]:
    metrics = _sklearn()
    classes = [c for c in classes_with_positives(targets) if targets[:, c].sum() < len(targets)]
    if not classes:
        raise DataError("every clip that is to be judged has every label; the area under the ROC curve has no meaning")
    return [float(metrics.roc_auc_score(targets[:, c], scores[:, c])) for c in classes]


def _sklearn():
    try:
        from sklearn import metrics
    except ImportError:
        raise ConfigError("this score needs scikit-learn; install it with  pip install 'msm-dist[eval]'") from None
    return metrics
