"""The order of a run: exact, the same for every way of sharing it out, and as random as it should be."""

import tracemalloc
from collections import Counter, defaultdict
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from msm_dist.data import plan as plan_module
from msm_dist.data.plan import (
    check_lanes,
    crop_offset,
    default_lanes,
    fill_block,
    make_plan,
    micro_batch_blocks,
    permutation,
    philox4x32,
    valid_worlds,
)
from msm_dist.errors import ConfigError, DataError

examples = settings(max_examples=30, deadline=None)


@st.composite
def plans(draw):
    lanes = draw(st.sampled_from([1, 2, 3, 4, 6, 8, 12]))
    shards = draw(st.lists(st.integers(0, 90), min_size=1, max_size=12))
    shards.append(max(1, 64 * lanes + draw(st.integers(0, 50)) - sum(shards)))
    crops = draw(st.sampled_from([1, 2, 3]))
    block = crops * draw(st.integers(1, 12))
    window = draw(st.sampled_from([1, 5, 16, 64, 1000]))
    return make_plan(shards, draw(st.integers(0, 2**63 - 1)), lanes, block, window, crops)


def lane_clips(plan, lane, epochs):
    """The (epoch, clip) rows of a lane in the order served, one per clip, for the first epochs."""
    num_clips = plan.block // plan.crops_per_clip
    places = -(-epochs * plan.lane_clips // num_clips)
    rows = np.concatenate([plan.block_samples(place * plan.lanes + lane) for place in range(places)])
    return rows[:: plan.crops_per_clip, :2][: epochs * plan.lane_clips]


def sat_out(plan, epoch):
    served = [lane_clips(plan, lane, epoch + 1)[-plan.lane_clips :, 1] for lane in range(plan.lanes)]
    return set(range(plan.num_clips)) - set(np.concatenate(served).tolist())


@examples
@given(plans())
def test_every_clip_is_served_once_per_epoch_but_the_remainder(plan):
    blocks = 2 * plan.lanes * -(-plan.lane_clips // (plan.block // plan.crops_per_clip))
    counts = Counter(tuple(row) for n in range(blocks) for row in plan.block_samples(n).tolist())
    assert set(counts.values()) == {1}
    for epoch in range(2):
        clips = {clip for e, clip, _ in counts if e == epoch}
        assert len(clips) == plan.clips_per_epoch > plan.num_clips - plan.lanes
        expected = {(epoch, clip, crop) for clip in clips for crop in range(plan.crops_per_clip)}
        assert {sample for sample in counts if sample[0] == epoch} == expected
        assert clips <= set(range(plan.num_clips))


def layouts(lanes, blocks_per_step):
    """Every valid (world size, workers, blocks per micro-batch) up to 6 workers."""
    for world, workers, blocks in product(range(1, lanes + 1), range(1, 7), range(1, blocks_per_step + 1)):
        if lanes % (world * workers) == 0 and blocks_per_step % (world * blocks) == 0:
            yield world, workers, blocks


@pytest.mark.parametrize(("lanes", "blocks_per_step"), [(12, 12), (8, 16), (6, 18), (24, 24)])
def test_every_layout_serves_the_same_steps_and_no_lane_has_two_owners(lanes, blocks_per_step):
    tried = 0
    for world, workers, blocks in layouts(lanes, blocks_per_step):
        per_step = blocks_per_step // (world * blocks)
        owners = defaultdict(set)
        for step in range(2, 5):
            served = []
            for rank, i in product(range(world), range(step * per_step, (step + 1) * per_step)):
                for n in micro_batch_blocks(i, rank, world, blocks).tolist():
                    served.append(n)
                    owners[n % lanes].add((rank, i % workers))
            assert sorted(served) == list(range(step * blocks_per_step, (step + 1) * blocks_per_step))
        assert all(len({rank for rank, _ in owner}) == 1 for owner in owners.values())
        if lanes % (world * workers * blocks) == 0:
            assert all(len(owner) == 1 for owner in owners.values())
        tried += 1
    assert tried > 20


@examples
@given(plans(), st.integers(0, 400), st.data())
def test_a_plan_entered_anywhere_equals_the_tail_of_an_unbroken_one(plan, cursor, data):
    for n in range(cursor):
        plan.block_samples(n)
    fresh = make_plan(
        np.diff(plan.shard_ends, prepend=0),
        plan.seed,
        plan.lanes,
        plan.block,
        plan.shuffle_window,
        plan.crops_per_clip,
    )
    later = range(cursor, cursor + 40)
    expected = {n: fresh.block_samples(n).tolist() for n in data.draw(st.permutations(later))}
    assert {n: plan.block_samples(n).tolist() for n in later} == expected


def test_what_is_remembered_of_a_plan_is_bounded_and_changes_nothing(monkeypatch):
    arguments = [100] * 40, 3, 8, 8, 64, 1
    expected = [make_plan(*arguments).block_samples(n).tolist() for n in range(4000)]
    monkeypatch.setattr(plan_module, "CACHED_POSITIONS", 4 * 64)
    plan = make_plan(*arguments)
    assert [plan.block_samples(n).tolist() for n in range(4000)] == expected
    assert len(plan._windows) == 4 and len(plan._epochs) == plan_module._CACHED_EPOCHS


def test_small_windows_are_not_kept_for_ever():
    plan = make_plan([50] * 4, 3, 2, 4, 16, 1)
    for n in range(1000):
        plan.block_samples(n)
    tracemalloc.start()
    try:
        for n in range(1000, 5000):
            plan.block_samples(n)
        grown, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert grown < 64 * 2**10


@examples
@given(plans())
def test_a_clip_moves_less_than_a_window_inside_its_lane(plan):
    straight = make_plan(np.diff(plan.shard_ends, prepend=0), plan.seed, plan.lanes, plan.block, 1, plan.crops_per_clip)
    for lane in {0, plan.lanes - 1}:
        served = lane_clips(plan, lane, 2).reshape(2, -1, 2)[:, :, 1]
        packed = lane_clips(straight, lane, 2).reshape(2, -1, 2)[:, :, 1]
        for epoch in range(2):
            at = {clip: position for position, clip in enumerate(packed[epoch].tolist())}
            moves = [abs(at[clip] - position) for position, clip in enumerate(served[epoch].tolist())]
            assert max(moves) < plan.shuffle_window
            if plan.shuffle_window >= 64:
                assert max(moves) > 8


def window_order(plan, epoch, lane, window=0):
    """A window's permutation, seen from outside: served clips as places in the same plan without windows."""
    size, first = plan.shuffle_window, epoch * plan.lane_clips + window * plan.shuffle_window
    straight = make_plan(np.diff(plan.shard_ends, prepend=0), plan.seed, plan.lanes, plan.block, 1, 1)
    packed = lane_clips(straight, lane, epoch + 1)[first : first + size, 1].tolist()
    return [packed.index(clip) for clip in lane_clips(plan, lane, epoch + 1)[first : first + size, 1].tolist()]


@pytest.mark.parametrize("seed", range(3))
def test_every_window_lane_and_epoch_has_its_own_order(seed):
    plan = make_plan([700], seed, 4, 8, 32, 1)
    orders = [window_order(plan, *key) for key in product(range(2), range(4), range(2))]
    assert all(sorted(order) == list(range(32)) for order in orders)
    assert len({tuple(order) for order in orders}) == len(orders)


@pytest.mark.parametrize("seed", range(3))
def test_every_epoch_shuffles_the_shards_and_cuts_the_lanes_anew(seed):
    plan = make_plan([16] * 40, seed, 4, 8, 1, 1)
    shards = [
        list(dict.fromkeys(plan.locate(lane_clips(plan, 0, epoch + 1)[-plan.lane_clips :, 1])[0].tolist()))
        for epoch in range(3)
    ]
    assert len({frozenset(epoch) for epoch in shards}) == 3
    assert any(shards[0] != sorted(epoch) for epoch in shards)


@pytest.mark.parametrize("shards", [[523], [261, 262]])
def test_another_set_sits_out_in_the_next_epoch_even_with_one_shard(shards):
    plan = make_plan(shards, 5, 8, 8, 16, 1)
    assert [len(sat_out(plan, epoch)) for epoch in range(4)] == [3] * 4
    assert len({frozenset(sat_out(plan, epoch)) for epoch in range(4)}) == 4


def test_another_seed_is_another_order():
    plans = [make_plan([200, 300], seed, 4, 8, 64, 1) for seed in (0, 1, 2**32, 2**62)]
    assert len({str([plan.block_samples(n) for n in range(8)]) for plan in plans}) == 4


def test_a_small_plan_is_what_it_was():
    plan = make_plan([70, 3, 64, 55], 20240229, 3, 4, 16, 2)
    assert [plan.block_samples(n)[::2, :2].tolist() for n in (0, 1, 2, 95, 96, 2**20)] == GOLDEN_BLOCKS
    assert plan.block_samples(0)[:, 2].tolist() == [0, 1, 0, 1]
    assert permutation(7, 9, 12, epoch=1, lane=2, window=3).tolist() == GOLDEN_PERMUTATION
    ids = np.array([[0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1], [3, 2_000_000, 17]])
    assert crop_offset(2**40 + 5, ids, np.full(5, 793)).tolist() == GOLDEN_OFFSETS


GOLDEN_BLOCKS = [
    [[0, 97], [0, 101]],
    [[0, 31], [0, 27]],
    [[0, 154], [0, 148]],
    [[0, 87], [0, 91]],
    [[1, 157], [1, 164]],
    [[10922, 11], [10922, 7]],
]
GOLDEN_PERMUTATION = [2, 9, 1, 10, 8, 11, 6, 4, 3, 0, 7, 5]
GOLDEN_OFFSETS = [137, 255, 675, 251, 559]


def label_entropy(labels):
    """Mean entropy of the labels inside the rows of an integer array, in bits."""
    shares = [np.unique(row, return_counts=True)[1] / len(row) for row in labels]
    return np.mean([-(share * np.log2(share)).sum() for share in shares])


def test_blocks_of_a_class_per_folder_corpus_are_as_mixed_as_a_random_draw():
    num_clips, block = 20_000, 16
    folders = np.arange(num_clips) // 500
    draws = np.random.default_rng(0).permutation(folders)[: num_clips // block * block].reshape(-1, block)
    plan = make_plan([500] * 40, 1, None, block, 1024, 1)
    clips = np.array([plan.block_samples(n)[:, 1] for n in range(plan.clips_per_epoch // block)])
    packed = folders[permutation(1, 99, num_clips)]
    assert label_entropy(packed[clips]) == pytest.approx(label_entropy(draws), rel=0.05)
    assert label_entropy(folders[clips]) < 0.8 * label_entropy(draws)


def test_a_plan_of_two_million_clips_holds_almost_nothing():
    tracemalloc.start()
    plan = make_plan([1000] * 2000, 1, None, 8, 1024, 1)
    blocks = np.stack([plan.block_samples(n) for n in (*range(0, 30720, 60), 10**9)])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert plan.lanes == 30720 and plan.clips_per_epoch == 30720 * 65
    assert len(np.unique(blocks[:-1, :, 1])) == 512 * 8 and blocks[:, :, 1].max() > 1_900_000
    assert peak < 200e6


def test_philox_gives_the_published_words():
    known = [
        (0, [0] * 4, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        (2**64 - 1, [2**32 - 1] * 4, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            0x299F31D0A4093822,
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ]
    for seed, counter, words in known:
        assert [int(word[0]) for word in philox4x32(seed, [np.array([c], np.uint64) for c in counter])] == words


def test_crop_offsets_cover_the_clip_evenly_and_belong_to_their_sample():
    ids = np.array(list(product(range(10), range(100), range(8))))
    offsets = crop_offset(11, ids, np.full(len(ids), 9))
    counts = np.bincount(offsets, minlength=10)
    assert len(counts) == 10 and counts.min() > 0.85 * len(ids) / 10
    order = np.random.default_rng(0).permutation(len(ids))
    assert (crop_offset(11, ids[order], np.full(len(ids), 9)) == offsets[order]).all()
    assert (crop_offset(11, ids, np.zeros(len(ids), np.int64)) == 0).all()
    assert (crop_offset(11, ids, np.arange(len(ids))) <= np.arange(len(ids))).all()
    others = [crop_offset(11, ids + step, np.full(len(ids), 9)) for step in np.eye(3, dtype=int)]
    for other in (*others, crop_offset(12, ids, np.full(len(ids), 9))):
        assert (other == offsets).mean() == pytest.approx(0.1, abs=0.02)


def test_clips_are_located_in_their_shard():
    plan = make_plan([60, 0, 5, 70], 0, None, 8, 16, 1)
    shards, members = plan.locate(np.array([0, 59, 60, 64, 65, 134]))
    assert shards.tolist() == [0, 0, 2, 2, 3, 3] and members.tolist() == [0, 59, 0, 4, 0, 69]


def expected_fills(plan, n, bad_clips):
    """The rule of stand-ins written out again, for clips that are bad as a whole."""
    samples, crops = plan.block_samples(n), plan.crops_per_clip
    good = [clip not in bad_clips for clip in samples[:, 1].tolist()]
    filled = samples.tolist()
    for k, slot in enumerate([slot for slot, fine in enumerate(good) if not fine]):
        if any(good):
            before = [i for i in range(slot) if good[i]]
            donor, z = (before or [i for i in range(len(good)) if good[i]][:1])[-1], 0
            source = samples[donor]
        else:
            source, z = nearest_outside(plan, n, bad_clips)
        filled[slot] = [int(source[0]), int(source[1]), crops + z * plan.block + k]
    return filled, [not fine for fine in good]


def nearest_outside(plan, n, bad_clips):
    for distance in range(1, n // plan.lanes + 1):
        rows = plan.block_samples(n - distance * plan.lanes)
        if fine := [row for row in rows if row[1] not in bad_clips]:
            return fine[-1], 2 * distance
    for distance in range(1, 1000):
        rows = plan.block_samples(n + distance * plan.lanes)
        if fine := [row for row in rows if row[1] not in bad_clips]:
            return fine[0], 2 * distance - 1
    raise AssertionError("the test's corpus has no good clip")


@examples
@given(plans(), st.sampled_from([0.05, 0.5, 0.95]), st.integers(0, 2**32 - 1))
def test_bad_clips_are_filled_by_the_rule_and_the_order_stays(plan, share, seed):
    random = np.random.default_rng(seed)
    bad_clips = set(np.flatnonzero(random.random(plan.num_clips) < share).tolist())
    seen = Counter()
    for n in range(3 * plan.lanes):
        samples, filled = fill_block(plan, n, lambda ids: np.array([clip not in bad_clips for clip in ids[:, 1]]))
        assert (samples.tolist(), filled.tolist()) == expected_fills(plan, n, bad_clips)
        assert (samples[~filled] == plan.block_samples(n)[~filled]).all()
        assert not bad_clips & set(samples[:, 1].tolist())
        seen.update(map(tuple, samples.tolist()))
    assert set(seen.values()) == {1}


def test_no_two_fills_of_an_epoch_are_the_same_sample_when_a_lane_is_mostly_gone():
    plan = make_plan([64] * 8, 1, 4, 4, 16, 1)
    blocks = plan.lanes * plan.lane_clips // plan.block
    fills = [fill_block(plan, n, lambda ids: ids[:, 1] % 50 == 0)[0] for n in range(2 * blocks)]
    samples = np.concatenate(fills)
    assert len(np.unique(samples, axis=0)) == len(samples)
    assert samples[:, 2].max() < 2**24


def test_one_unreadable_crop_makes_all_crops_of_its_clip_bad():
    plan = make_plan([64], 0, 1, 6, 16, 3)
    first, second = plan.block_samples(0)[[0, 3]]

    def reads(ids):
        return ~((ids[:, 1] == first[1]) & (ids[:, 2] == 1))

    samples, filled = fill_block(plan, 0, reads)
    assert filled.tolist() == [True] * 3 + [False] * 3
    assert samples[:3].tolist() == [[0, second[1], 3 + k] for k in range(3)]


def test_a_stand_in_whose_crop_cannot_be_read_is_passed_over():
    plan = make_plan([64], 0, 1, 4, 16, 1)
    clips = plan.block_samples(0)[:, 1]

    def reads(ids):
        return (ids[:, 1] != clips[3]) & ~((ids[:, 1] == clips[2]) & (ids[:, 2] > 0))

    assert fill_block(plan, 0, reads)[0][3].tolist() == [0, clips[1], 1]


def test_nothing_readable_far_and_wide_is_an_error(monkeypatch):
    monkeypatch.setattr(plan_module, "FILL_REACH", 5)
    plan = make_plan([64], 0, 1, 4, 16, 1)
    with pytest.raises(DataError, match="no readable clip within 5 places of block 3"):
        fill_block(plan, 3, lambda ids: np.zeros(len(ids), bool))


def test_default_lanes_suit_the_corpus():
    sizes = [1, 2, 15, 16, 40, 64, 512, 1024, 8191, 8192, 15_359, 15_360, 30_719, 30_720, 2_000_000]
    expected = [1, 2, 2, 2, 4, 8, 8, 16, 64, 128, 128, 240, 240, 480, 30_720]
    assert [default_lanes(size) for size in sizes] == expected


@pytest.mark.parametrize("num_clips", [1, 2, 3, 7, 10, 17])
def test_corpus_smaller_than_a_block_is_served_over_and_over(num_clips):
    plan = make_plan([num_clips], 0, None, 8, 16, 1)
    rows = np.concatenate([plan.block_samples(n) for n in range(plan.lanes * plan.lane_clips)])
    counts = Counter(tuple(row[:2]) for row in rows.tolist())
    assert set(counts.values()) == {1}
    assert set(Counter(epoch for epoch, _ in counts).values()) == {plan.clips_per_epoch}


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([], 0, None, 8, 16, 1), DataError, "0 clips"),
        (([0, 0], 0, None, 8, 16, 1), DataError, "msm-dist data pack"),
        (([200], 0, 4, 8, 16, 1), ConfigError, "data.lanes = 4: .* 200 clips .* at most 3, .* to get 8"),
        (([10**5], 0, 1, 8400, 16, 1), ConfigError, "data.block = 8400: must not exceed 8380"),
    ],
)
def test_sizes_that_do_not_fit_the_corpus_are_refused_with_the_remedy(arguments, error, message):
    with pytest.raises(error, match=message):
        make_plan(*arguments)


def test_lanes_that_do_not_spread_evenly_are_refused_with_the_valid_choices():
    plan = make_plan([1024], 0, None, 8, 16, 1)
    for world, workers in [(1, 0), (2, 4), (4, 4), (16, 1), (16, 0)]:
        check_lanes(plan, world, workers)
    with pytest.raises(ConfigError) as error:
        check_lanes(plan, 2, 3)
    text = str(error.value)
    assert "data.lanes = 16: must be a multiple of 2 processes x 3 loader workers = 6" in text
    assert "data.num_workers from 1, 2, 4, 8," in text
    assert "data.lanes from the multiples of 6 up to 12" in text
    with pytest.raises(ConfigError, match="a number of processes from 1, 2, 4, 8, 16,"):
        check_lanes(plan, 3, 1)
    with pytest.raises(ConfigError, match="choose fewer processes and loader workers"):
        check_lanes(plan, 17, 17)


@pytest.mark.parametrize("lanes", [1, 2, 96, 128, 240, 480, 30_720 // 16])
@pytest.mark.parametrize("workers", [0, 1, 2, 3, 8])
def test_valid_worlds_are_all_that_spread_evenly(lanes, workers):
    expected = [world for world in range(1, lanes + 1) if lanes % (world * max(1, workers)) == 0]
    assert valid_worlds(lanes, workers) == expected


def test_a_large_world_is_told_the_choices_around_it():
    plan = make_plan([1000] * 2000, 0, None, 8, 1024, 1)
    with pytest.raises(ConfigError) as error:
        check_lanes(plan, 1024, 8)
    text = str(error.value)
    assert "data.lanes from the multiples of 8192 up to 24576" in text
    assert "a number of processes from 128, 160, 192, 240, 256, 320, 384, 480, 640, 768, 960, 1280," in text
    for lanes in (8192, 16_384, 24_576):
        check_lanes(make_plan([1000] * 2000, 0, lanes, 8, 1024, 1), 1024, 8)
