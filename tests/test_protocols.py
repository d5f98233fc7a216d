"""Classifiers on fixed vectors: what they learn, what they choose by, and that nothing else has a say."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from msm_dist.errors import DataError
from msm_dist.evaluate import protocols
from msm_dist.evaluate.protocols import HEAR_GRID, HearPoint, Problem, fit, hear, knn, linear
from msm_dist.evaluate.tasks import Parts

SIZES = (120, 45, 90)
PARTS = Parts(np.arange(120), np.arange(120, 165), np.arange(165, 255))
POINT = HearPoint(1, "normal", 1e-3)


def problem(signal: float = 1.0, size: int = 24, seed: int = 0, multilabel: bool = False) -> Problem:
    """Three classes about centres `signal` apart, columns of very different scales."""
    rng = np.random.default_rng(seed)
    if multilabel:
        targets = (rng.random((255, 3)) < 0.4).astype(np.float32)
    else:
        targets = np.eye(3, dtype=np.float32)[rng.integers(0, 3, 255)]
    vectors = signal * targets @ rng.standard_normal((3, size)) + rng.standard_normal((255, size))
    vectors = vectors * 10.0 ** rng.uniform(-2, 2, size) + 100 * rng.standard_normal(size)
    score = "mAP" if multilabel else "top1_acc"
    return Problem(torch.from_numpy(vectors.astype(np.float32)), targets, PARTS, multilabel, score)


def accuracy(scores: np.ndarray, given: Problem) -> float:
    return float((scores.argmax(1) == given.targets[PARTS.test].argmax(1)).mean())


@pytest.mark.parametrize("protocol", ["linear", "hear", "knn"])
def test_separable_classes_are_told_apart(protocol):
    given = problem(signal=2.0)
    fitted = fit(protocol, given, seed=0, point=POINT)
    assert fitted.scores.shape == (90, 3)
    # The protocol hear takes vectors as they are: columns a thousand times larger than others drown them.
    assert accuracy(fitted.scores, given) > (0.6 if protocol == "hear" else 0.95)


@pytest.mark.parametrize("protocol", ["linear", "knn"])
def test_several_labels_are_told_apart(protocol):
    given = problem(signal=2.0, multilabel=True)
    scores = fit(protocol, given, seed=0).scores
    for c in range(3):
        positive = given.targets[PARTS.test, c] > 0
        assert scores[positive, c].mean() > scores[~positive, c].mean() + 0.3


def test_few_clips_are_learnt_to_the_end_by_the_protocol_linear():
    """One step an epoch gives 0.92 to 0.98 here."""
    found = []
    for seed in range(4):
        parts = Parts(np.arange(30), np.arange(120, 135), PARTS.test)
        given = replace(problem(signal=0.3, size=600, seed=seed), parts=parts)
        found.append(accuracy(linear(given, seed).scores, given))
    assert min(found) > 0.96


@pytest.mark.parametrize("protocol", ["linear", "hear", "knn"])
def test_vectors_without_labels_in_them_give_chance(protocol):
    given = problem(signal=0.0, seed=4)
    # Four standard deviations about a third.
    assert abs(accuracy(fit(protocol, given, seed=0, point=POINT).scores, given) - 1 / 3) < 4 * np.sqrt(2 / 9 / 90)


@pytest.mark.parametrize("protocol", ["linear", "hear"])
def test_a_seed_gives_the_same_bits_and_leaves_torch_as_it_was(protocol):
    given = problem()
    torch.manual_seed(11)
    expected = torch.rand(3)
    torch.manual_seed(11)
    first = fit(protocol, given, seed=1, point=POINT)
    assert torch.equal(torch.rand(3), expected)
    again = fit(protocol, given, seed=1, point=POINT)
    assert np.array_equal(first.scores, again.scores)
    assert first.chosen == again.chosen
    assert not np.array_equal(first.scores, fit(protocol, given, seed=2, point=POINT).scores)


@pytest.mark.parametrize("protocol", ["linear", "hear", "knn"])
def test_test_clips_have_no_say(protocol):
    given = problem()
    scores = fit(protocol, given, seed=0, point=POINT).scores
    given.targets[PARTS.test] = given.targets[PARTS.test][::-1].copy()
    changed = given.vectors.clone()
    changed[PARTS.test[45:]] *= 3
    other = Problem(changed, given.targets, PARTS, False, "top1_acc")
    np.testing.assert_allclose(fit(protocol, other, seed=0, point=POINT).scores[:45], scores[:45], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("protocol", ["linear", "knn"])
def test_scale_and_offset_of_vectors_do_not_matter(protocol):
    given = problem()
    scale = torch.logspace(-3, 3, 24)
    scaled = Problem(given.vectors * scale + 5, given.targets, PARTS, False, "top1_acc")
    expected, found = fit(protocol, given, seed=0).scores, fit(protocol, scaled, seed=0).scores
    assert np.mean(expected.argmax(1) == found.argmax(1)) > 0.96


@pytest.mark.parametrize("protocol", ["linear", "knn"])
def test_a_number_that_never_changes_is_harmless(protocol):
    given = problem()
    constant = torch.full((255, 1), 7.3)
    wider = Problem(torch.cat([given.vectors, constant], 1), given.targets, PARTS, False, "top1_acc")
    scores = fit(protocol, wider, seed=0).scores
    assert np.isfinite(scores).all()
    assert accuracy(scores, given) > 0.6


def test_clips_in_the_order_of_their_classes_are_learnt_by_the_protocol_hear(monkeypatch):
    """In batches of one class each, batch norm would never see two of them at once."""
    monkeypatch.setattr(protocols, "HEAR_BATCH", 30)
    monkeypatch.setattr(protocols, "HEAR_WIDTH", 64)
    rng = np.random.default_rng(0)
    labels = np.concatenate([np.repeat(np.arange(4), 60), rng.integers(0, 4, 160)])
    vectors = 2 * rng.standard_normal((4, 16))[labels] + rng.standard_normal((400, 16))
    parts = Parts(np.arange(240), np.arange(240, 300), np.arange(300, 400))
    given = Problem(
        torch.from_numpy(vectors.astype(np.float32)), np.eye(4, dtype=np.float32)[labels], parts, False, "top1_acc"
    )
    assert (hear(given, 0, (POINT,)).scores.argmax(1) == labels[300:]).mean() > 0.9


@pytest.mark.parametrize("multilabel", [False, True])
def test_one_number_added_to_all_logits_of_a_clip_changes_nothing(multilabel):
    """Unless each class is a question of its own."""
    given = problem(multilabel=multilabel)
    rows = protocols._Rows(given, protocols._standard(given))
    plain = torch.nn.Linear(24, 3)
    shifted = torch.nn.Linear(24, 3)
    shifted.load_state_dict({"weight": plain.weight + 5 * torch.randn(1, 24), "bias": plain.bias})
    expected, found = (protocols._apply(rows, model, PARTS.test)[0] for model in (plain, shifted))
    if multilabel:
        assert not np.allclose(found, expected, atol=1)
    else:
        np.testing.assert_allclose(found, expected, atol=1e-4)


def test_learning_rate_is_chosen_on_validation_clips():
    given = problem()
    assert linear(given, 0, rates=(1e-7, 3e-3)).chosen["lr"] == 3e-3
    assert linear(given, 0, rates=(3e-3, 1e-7)).chosen["lr"] == 3e-3


def test_epoch_kept_is_the_best_on_validation_clips():
    # Labels of validation clips contradict those of training clips: the earliest weights do best on them.
    given = problem(signal=2.0)
    given.targets[PARTS.valid] = np.roll(given.targets[PARTS.valid], 1, axis=1)
    chosen = linear(given, 0, rates=(3e-3,)).chosen
    assert chosen["epoch"] <= 3
    assert chosen["valid"] < 0.6


def test_scores_are_those_of_the_epoch_kept(monkeypatch):
    given = problem(signal=2.0)
    given.targets[PARTS.valid] = np.roll(given.targets[PARTS.valid], 1, axis=1)
    kept = linear(given, 0, rates=(3e-3,))
    monkeypatch.setattr(protocols, "LINEAR_EPOCHS", kept.chosen["epoch"])
    assert np.array_equal(linear(given, 0, rates=(3e-3,)).scores, kept.scores)


@pytest.mark.parametrize("protocol", ["linear", "hear", "knn"])
def test_vectors_beyond_memory_give_the_same(protocol, monkeypatch):
    given = problem()
    expected = fit(protocol, given, seed=0, point=POINT).scores
    monkeypatch.setattr(protocols, "WHOLE_VALUES", 0)
    np.testing.assert_allclose(fit(protocol, given, seed=0, point=POINT).scores, expected, atol=1e-6)


def test_training_ends_after_the_patience(monkeypatch):
    calls = []
    monkeypatch.setattr(protocols, "_judge", lambda *given: (calls.append(1), (0.5 - len(calls), 0.0))[1])
    linear(problem(), 0, rates=(3e-4,))
    assert len(calls) == 1 + 20
    calls.clear()
    hear(problem(), 0, (POINT,))
    assert len(calls) == 1 + 20


def test_a_lower_loss_settles_equal_scores_of_the_linear_layer_alone(monkeypatch):
    calls = []
    monkeypatch.setattr(protocols, "_judge", lambda *given: (calls.append(1), (0.5, float(len(calls))))[1])
    assert linear(problem(), 0, rates=(3e-4,)).chosen["epoch"] == 200
    assert hear(problem(), 0, (POINT,)).chosen["epoch"] == 3


def test_grid_of_the_kit_is_searched_unless_a_point_is_given(monkeypatch):
    tried = []
    descend = protocols._descend

    def remembered(rows, start, lr, recipe, seed):
        model = start(torch.Generator().manual_seed(0))
        tried.append((sum(isinstance(module, torch.nn.BatchNorm1d) for module in model), lr))
        return descend(rows, lambda rng: torch.nn.Linear(24, 3), lr, recipe, seed)

    monkeypatch.setattr(protocols, "_descend", remembered)
    fit("hear", problem(), 0)
    assert tried == [(point.layers, point.lr) for point in HEAR_GRID]
    tried.clear()
    fit("hear", problem(), 0, point=POINT)
    assert tried == [(1, 1e-3)]


def test_predictor_is_that_of_the_kit():
    model = protocols._predictor(24, 3, HearPoint(2, "uniform", 1e-3), torch.Generator().manual_seed(0))
    names = [type(module).__name__ for module in model]
    assert names == ["Linear", "BatchNorm1d", "Dropout", "ReLU"] * 2 + ["Linear"]
    assert [module.weight.shape for module in model if isinstance(module, torch.nn.Linear)] == [
        (1024, 24),
        (1024, 1024),
        (3, 1024),
    ]
    bound = np.sqrt(6 / (24 + 1024))
    assert model[0].weight.abs().max().item() == pytest.approx(bound, rel=1e-2)
    assert model[4].weight.abs().max().item() == pytest.approx(np.sqrt(2) * np.sqrt(6 / 2048), rel=1e-2)


def test_batch_norm_survives_a_last_batch_of_one(monkeypatch):
    monkeypatch.setattr(protocols, "HEAR_BATCH", 119)
    assert np.isfinite(hear(problem(), 0, (POINT,)).scores).all()


def test_neighbours_are_the_nearest_by_cosine():
    directions = torch.tensor([[1.0, 0], [0.9, 0.1], [0, 1], [0.1, 0.9], [-1, -1], [-0.9, -1.1], [0, 0.5], [0.7, 0.1]])
    targets = np.eye(3, dtype=np.float32)[[0, 0, 1, 1, 2, 2, 1, 0]]
    given = Problem(directions, targets, Parts(np.arange(6), np.arange(6), np.array([6, 7])), False, "top1_acc")
    fitted = knn(given, neighbours=2)
    assert fitted.chosen == {"neighbours": 2}
    np.testing.assert_allclose(fitted.scores, [[0, 1, 0], [1, 0, 0]], atol=1e-5)


@pytest.mark.parametrize("nearer", [0, 1])
def test_the_nearer_of_two_classes_decides_at_any_distance(nearer, monkeypatch):
    """Whichever number the class has: without the tie-break the first would win."""
    monkeypatch.setattr(protocols, "_standard", lambda given: (torch.zeros(2), torch.ones(2)))
    cosines = torch.tensor([0.80, 0.84] if nearer else [0.84, 0.80])
    known = torch.stack([cosines, torch.tensor([1.0, -1.0]) * (1 - cosines.square()).sqrt()], 1)
    vectors = torch.cat([known, torch.tensor([[1.0, 0.0]])])
    targets = np.eye(2, dtype=np.float32)[[0, 1, 0]]
    given = Problem(vectors, targets, Parts(np.arange(2), np.arange(2), np.array([2])), False, "top1_acc")
    assert knn(given, neighbours=2).scores[0].argmax() == nearer


def test_fewer_clips_than_neighbours_are_all_neighbours():
    given = problem()
    few = Problem(given.vectors, given.targets, Parts(np.arange(4), np.arange(4), PARTS.test), False, "top1_acc")
    fitted = knn(few)
    assert fitted.chosen["neighbours"] == 4
    np.testing.assert_allclose(fitted.scores.sum(1), 1, atol=1e-5)


def test_nearer_neighbours_decide_between_equals():
    vectors = torch.tensor([[1.0, 0.2], [-1, 0.2], [0, -2], [0.3, 0.5]])
    targets = np.eye(3, dtype=np.float32)[[0, 1, 2, 0]]
    given = Problem(vectors, targets, Parts(np.arange(3), np.arange(3), np.array([3])), False, "top1_acc")
    scores = knn(given, neighbours=2).scores[0]
    assert scores.argmax() == 0
    assert scores[0] - scores[1] < 1e-3


def test_validation_clips_without_labels_are_named():
    given = problem(multilabel=True)
    given.targets[PARTS.valid] = 0
    with pytest.raises(DataError, match="no clip"):
        linear(given, 0)


@pytest.mark.parametrize("fitting", [linear, hear])
def test_validation_clips_without_any_score_are_named(fitting, monkeypatch):
    """The area under the ROC curve needs clips with and without a label."""
    monkeypatch.setattr(protocols, "LINEAR_EPOCHS", 2)
    monkeypatch.setattr(protocols, "HEAR_EPOCHS", 3)
    given = replace(problem(multilabel=True), parts=replace(PARTS, valid=np.array([120])), score="aucroc")
    given.targets[120] = 1
    with pytest.raises(DataError, match="aucroc of the 1 validation clips is never a number"):
        fitting(given, 0)


def test_a_fit_without_a_score_is_passed_over(monkeypatch):
    """As one that diverged."""
    found = iter([(np.nan, np.nan), (0.5, -1.0)])
    monkeypatch.setattr(protocols, "LINEAR_EPOCHS", 1)
    monkeypatch.setattr(protocols, "_judge", lambda *given: next(found))
    assert linear(problem(), 0, rates=(3e-3, 3e-4)).chosen["lr"] == 3e-4


def test_vectors_far_from_zero_are_standardised_exactly():
    given = problem()
    far = Problem((given.vectors.double() * 1e-3 + 1e3).float(), given.targets, PARTS, False, "top1_acc")
    mean, inverse = protocols._standard(far)
    x = far.vectors[PARTS.train].double().numpy()
    moving = x.std(0) > 0
    np.testing.assert_allclose(mean.numpy(), x.mean(0), rtol=1e-6)
    np.testing.assert_allclose(inverse.numpy()[moving], 1 / x.std(0)[moving], rtol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("protocol", ["linear", "hear", "knn"])
def test_gpu_decides_as_the_cpu(protocol):
    given = problem(signal=2.0)
    expected = fit(protocol, given, seed=0, point=POINT).scores
    found = fit(protocol, replace(given, device="cuda"), seed=0, point=POINT).scores
    # Dropout draws other numbers on a GPU.
    assert np.mean(found.argmax(1) == expected.argmax(1)) > (0.6 if protocol == "hear" else 0.95)
