"""Scores against scikit-learn and by hand; intervals that hold what they say."""

import subprocess
import sys
import tracemalloc

import numpy as np
import pytest
from sklearn.metrics import average_precision_score, roc_auc_score

from msm_dist.errors import DataError
from msm_dist.evaluate import scores as module
from msm_dist.evaluate.scores import (
    SCORES,
    WEIGHTED,
    Interval,
    check_scores,
    interval,
    resample_weights,
    resampled,
)


def predictions(num_clips: int, num_classes: int, seed: int = 0, multilabel: bool = True, ties: bool = False):
    """Scores that know a little, and their targets."""
    rng = np.random.default_rng(seed)
    if multilabel:
        targets = (rng.random((num_clips, num_classes)) < 0.3).astype(np.float32)
    else:
        targets = np.eye(num_classes, dtype=np.float32)[rng.integers(0, num_classes, num_clips)]
    scores = targets + rng.standard_normal(targets.shape)
    return (scores.round(0) if ties else scores), targets


def repeated(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    return np.repeat(values, weights.astype(int), axis=0)


def test_accuracy_counts_the_best_class():
    targets = np.eye(3)[[0, 1, 2, 2]]
    scores = np.array([[0.9, 0, 0], [0.2, 0.3, 0.4], [0, 0, 1], [-3, -2, -1]])
    assert SCORES["top1_acc"](scores, targets) == 0.75
    assert SCORES["pitch_acc"](scores, targets) == 0.75


def test_chroma_forgives_an_octave():
    targets = np.eye(25)[[0, 1, 5]]
    scores = np.eye(25)[[12, 1, 6]]
    assert SCORES["chroma_acc"](scores, targets) == pytest.approx(2 / 3)
    assert SCORES["pitch_acc"](scores, targets) == pytest.approx(1 / 3)


def test_average_precision_is_the_mean_over_classes_with_positives():
    scores, targets = predictions(50, 4)
    targets[:, 2] = 0
    expected = np.mean([average_precision_score(targets[:, c], scores[:, c]) for c in (0, 1, 3)])
    assert SCORES["mAP"](scores, targets) == pytest.approx(expected, abs=1e-12)


def test_d_prime_of_a_known_area():
    # One pair of four in the wrong order: an area of 0.75.
    scores, targets = np.array([[4.0], [2.0], [3.0], [1.0]]), np.array([[1.0], [1.0], [0.0], [0.0]])
    assert SCORES["aucroc"](scores, targets) == 0.75
    assert SCORES["d_prime"](scores, targets) == pytest.approx(0.9538725524, abs=1e-9)


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("name", sorted(WEIGHTED))
def test_a_resample_scores_what_the_repeated_clips_score(name, ties):
    scores, targets = predictions(60, 14, multilabel=name in ("mAP", "aucroc"), ties=ties)
    weights = resample_weights(60, 14, seed=1)[:5]
    values = resampled(name, scores, targets, weights)
    for value, one in zip(values, weights, strict=True):
        assert value == pytest.approx(SCORES[name](repeated(scores, one), repeated(targets, one)), abs=1e-9)


def test_weights_are_those_of_scikit_learn():
    scores, targets = predictions(80, 1, ties=True)
    weights = np.random.default_rng(3).uniform(0, 2, (1, 80))
    precision = average_precision_score(targets[:, 0], scores[:, 0], sample_weight=weights[0])
    area = roc_auc_score(targets[:, 0], scores[:, 0], sample_weight=weights[0])
    assert resampled("mAP", scores, targets, weights)[0] == pytest.approx(precision)
    assert resampled("aucroc", scores, targets, weights)[0] == pytest.approx(area)


def test_a_class_that_a_resample_lost_is_left_out_of_it():
    scores, targets = np.array([[2.0, 0.0], [1.0, 1.0], [0.0, 2.0]]), np.array([[1.0, 0], [0, 0], [0, 1]])
    weights = np.array([[1.0, 1, 1], [2.0, 1, 0], [0.0, 3, 0]])
    values = resampled("mAP", scores, targets, weights)
    assert values[:2].tolist() == [1.0, 1.0]
    assert np.isnan(values[2])
    assert interval(values) == Interval(1.0, 1.0)


def test_many_clips_are_resampled_in_parts(monkeypatch):
    scores, targets = predictions(40, 3)
    weights = resample_weights(40, 3, seed=0)[:50]
    whole = resampled("mAP", scores, targets, weights)
    monkeypatch.setattr(module, "VALUES_AT_ONCE", 280)
    np.testing.assert_array_equal(resampled("mAP", scores, targets, weights), whole)


def test_every_resample_has_as_many_clips():
    weights = resample_weights(30, 5, seed=0)
    assert weights.shape == (1000, 30)
    assert (weights.sum(1) == 30).all()
    assert np.array_equal(weights, resample_weights(30, 5, seed=0))
    assert not np.array_equal(weights, resample_weights(30, 5, seed=1))


def test_many_resamples_are_drawn_without_holding_every_draw():
    tracemalloc.start()
    try:
        weights = resample_weights(4000, 1, seed=0)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 1.2 * weights.nbytes
    rng = np.random.default_rng([0, 0xB007])
    expected = [np.bincount(draw, minlength=4000) for draw in rng.integers(0, 4000, (1000, 4000))]
    assert np.array_equal(weights, expected)


def test_large_evaluations_take_fewer_resamples():
    assert len(resample_weights(2000, 2000, seed=0)) == 536
    assert len(resample_weights(3000, 200_000, seed=0)) == 200


def test_interval_is_the_middle_95_percent():
    assert interval(np.arange(1001)) == pytest.approx((25, 975))


def test_interval_holds_the_truth_as_often_as_it_says():
    inside = 0
    for seed in range(200):
        right = np.random.default_rng(seed).random(100) < 0.7
        scores = np.stack([right, ~right], 1).astype(float)
        targets = np.tile([1.0, 0.0], (100, 1))
        low, high = interval(resampled("top1_acc", scores, targets, resample_weights(100, 2, seed)))
        inside += low <= 0.7 <= high
    # 0.95 of 200, give or take four standard deviations.
    assert 177 <= inside <= 200


def test_scores_that_do_not_exist_or_decide_are_named():
    check_scores(["mAP", "d_prime"], "a task")
    with pytest.raises(DataError, match="segment_1s_er, must be one of top1_acc"):
        check_scores(["segment_1s_er"], "a task")
    with pytest.raises(DataError, match="d_prime can't decide"):
        check_scores(["d_prime", "mAP"], "a task")


def test_targets_without_labels_are_named():
    with pytest.raises(DataError, match="no clip"):
        SCORES["mAP"](np.zeros((3, 2)), np.zeros((3, 2)))
    with pytest.raises(DataError, match="every label"):
        SCORES["aucroc"](np.zeros((3, 2)), np.ones((3, 2)))


def test_missing_scikit_learn_names_the_extra():
    source = (
        "import sys, numpy as np\n"
        "sys.modules['sklearn'] = None\n"
        "from msm_dist.errors import ConfigError\n"
        "from msm_dist.evaluate.scores import SCORES\n"
        "print(SCORES['top1_acc'](np.eye(2), np.eye(2)))\n"
        "try:\n"
        "    SCORES['mAP'](np.eye(2), np.eye(2))\n"
        "except ConfigError as error:\n"
        "    print(error)\n"
    )
    child = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, check=True)
    assert child.stdout.splitlines()[0] == "1.0"
    assert "pip install 'msm-dist[eval]'" in child.stdout
