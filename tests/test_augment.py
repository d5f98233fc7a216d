"""What is drawn for training clips: pure functions of seed and place, within their bounds, as often as they should."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from msm_dist.evaluate import augment
from msm_dist.evaluate.augment import Order, clip_weights, draw_kept, draw_masks, draw_mix, draw_start, generator
from msm_dist.evaluate.finetune_config import Augment

PLACES = 2000


def drawn(purpose, function, *arguments, count=PLACES):
    return [function(generator(3, purpose, 0, place), *arguments) for place in range(count)]


def test_an_epoch_serves_every_clip_once_in_an_order_of_its_own():
    order = Order(50, seed=3)
    first, second = (order.draws(np.arange(epoch * 50, epoch * 50 + 50)) for epoch in (0, 1))
    assert sorted(first[:, 2]) == sorted(second[:, 2]) == list(range(50))
    assert first[:, 2].tolist() != second[:, 2].tolist()
    assert (second[:, 0] == 1).all()
    assert second[:, 1].tolist() == list(range(50))


def test_the_order_is_a_function_of_the_position_alone():
    positions = np.array([7, 260, 3, 99, 100, 7])
    whole = Order(50, seed=3).draws(np.arange(300))
    assert (Order(50, seed=3).draws(positions) == whole[positions]).all()
    assert (Order(50, seed=4).draws(positions) != whole[positions]).any()


def test_classes_are_drawn_alike_however_unbalanced_they_are():
    labels = [(0,)] * 900 + [(1,)] * 90 + [(2,)] * 10
    order = Order(len(labels), seed=0, weights=clip_weights(labels, 3))
    clips = order.draws(np.arange(30 * len(labels)))[:, 2]
    shares = np.bincount([labels[clip][0] for clip in clips], minlength=3) / len(clips)
    assert shares == pytest.approx([1 / 3] * 3, abs=0.01)
    assert len(set(clips[clips >= 990])) == 10


def test_a_clip_weighs_the_sum_over_its_labels():
    weights = clip_weights([(0,), (0, 1), (), (0,), (1,)], 3)
    common, rare = 1000 / 3.01, 1000 / 2.01
    assert weights == pytest.approx([common, common + rare, 0, common, rare])


def test_a_clip_that_weighs_nothing_is_never_drawn():
    order = Order(4, seed=0, weights=np.array([0.0, 1.0, 0.0, 3.0]))
    clips = order.draws(np.arange(4000))[:, 2]
    assert set(clips.tolist()) == {1, 3}
    assert np.mean(clips == 3) == pytest.approx(0.75, abs=0.03)


def test_draws_differ_by_purpose_seed_epoch_and_place():
    keys = [(3, augment.CUT, 0, 0), (3, augment.MIX, 0, 0), (4, augment.CUT, 0, 0), (3, augment.CUT, 1, 0)]
    values = {tuple(generator(*key).integers(2**32, size=4)) for key in [*keys, (3, augment.CUT, 0, 1)]}
    assert len(values) == 5
    assert (generator(*keys[0]).integers(2**32, size=4) == generator(*keys[0]).integers(2**32, size=4)).all()


def test_crops_reach_both_ends_of_a_clip_and_short_clips_start_at_zero():
    starts = drawn(augment.CUT, draw_start, 110, 100)
    assert (min(starts), max(starts)) == (0, 10)
    assert set(drawn(augment.CUT, draw_start, 60, 100, count=20)) == {0}


def test_the_asked_share_is_mixed_by_weights_around_one_half():
    mixes = drawn(augment.MIX, draw_mix, Augment(mixup=0.5), 30)
    taken = [mix for mix in mixes if mix]
    assert len(taken) / PLACES == pytest.approx(0.5, abs=0.05)
    assert {mix.other for mix in taken} == set(range(30))
    weights = np.array([mix.weight for mix in taken])
    assert (weights.mean(), weights.std()) == pytest.approx((0.5, (1 / 84) ** 0.5), abs=0.02)  # of beta(10, 10)
    assert not any(drawn(augment.MIX, draw_mix, Augment(mixup=0), 30))
    assert all(drawn(augment.MIX, draw_mix, Augment(mixup=1), 30))


def test_masks_stay_inside_the_spectrogram_and_below_their_widths():
    masks = np.array(drawn(augment.MASK, draw_masks, Augment(frequency_mask=20, time_mask=30), 80, 64))
    low, high, start, stop = masks.T
    assert (low.min(), high.max(), start.min(), stop.max()) == (0, 80, 0, 64)
    assert sorted(set(high - low)) == list(range(21))
    assert sorted(set(stop - start)) == list(range(31))


def test_a_mask_wider_than_the_spectrogram_is_cut_to_it():
    masks = np.array(drawn(augment.MASK, draw_masks, Augment(time_mask=1000), 80, 64, count=300))
    assert (masks[:, 3] - masks[:, 2]).max() == 64
    assert (masks[:, 1] == masks[:, 0]).all()


def test_masked_bands_and_frames_hold_the_mean_and_nothing_else_changes():
    spectrogram = torch.randn(2, 1, 8, 10, generator=torch.Generator().manual_seed(0))
    masked = augment.mask_spectrogram(spectrogram, torch.tensor([[2, 4, 0, 0], [8, 8, 7, 10]]))
    expected = spectrogram.clone()
    expected[0, :, 2:4] = 0
    expected[1, :, :, 7:10] = 0
    assert torch.equal(masked, expected)


@given(st.integers(1, 8), st.integers(1, 70), st.floats(0, 0.99), st.floats(0, 0.99), st.integers(0, 1000))
def test_patch_drop_keeps_the_crossings_of_whole_rows_and_columns(rows, columns, of_rows, of_columns, place):
    settings = Augment(frequency_drop=of_rows, time_drop=of_columns)
    kept = draw_kept(generator(0, augment.DROP, 0, place), settings, (rows, columns))
    assert (np.diff(kept) > 0).all()
    is_kept = np.zeros((rows, columns), bool)
    is_kept.reshape(-1)[kept] = True
    full_rows, full_columns = is_kept.any(1), is_kept.any(0)
    assert (is_kept == np.outer(full_rows, full_columns)).all()
    assert full_rows.sum() == max(1, rows - int(rows * of_rows))
    assert full_columns.sum() == max(1, columns - int(columns * of_columns))


def test_every_row_and_column_has_its_turn_to_be_dropped():
    settings = Augment(frequency_drop=0.2, time_drop=0.5)
    kept = np.zeros((5, 8), np.int64)
    for ids in drawn(augment.DROP, draw_kept, settings, (5, 8)):
        kept.reshape(-1)[ids] += 1
    assert kept / PLACES == pytest.approx(np.full((5, 8), 0.8 * 0.5), abs=0.05)
