"""The order of several corpora: exact shares, every clip of a source once per its epoch, one cursor for all."""

from collections import Counter
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from msm_dist.data import mix as mix_module
from msm_dist.data.mix import CYCLE, count_places, draw_turns, make_mix, source_seed
from msm_dist.data.plan import check_lanes, fill_block, micro_batch_blocks
from msm_dist.errors import ConfigError, DataError

examples = settings(max_examples=30, deadline=None)
weights = st.floats(0.2, 5)


@st.composite
def arguments(draw):
    """What make_mix takes, of sources with at least `lanes` clips."""
    lanes = draw(st.sampled_from([1, 2, 3, 4, 6]))
    sources = {}
    for number in range(draw(st.integers(1, 4))):
        shards = draw(st.lists(st.integers(0, 40), min_size=1, max_size=5))
        shards.append(max(1, (64 if number == 0 else 1) * lanes + draw(st.integers(0, 30)) - sum(shards)))
        sources[f"source-{number}"] = shards
    shares = draw(st.lists(weights, min_size=len(sources), max_size=len(sources)))
    crops = draw(st.sampled_from([1, 2]))
    block, window = crops * draw(st.integers(1, 6)), draw(st.sampled_from([1, 5, 64, 1000]))
    return sources, shares, draw(st.integers(0, 2**63 - 1)), lanes, block, window, crops


def source_of(plan, clip):
    return int(np.searchsorted(plan.first_clips, clip, side="right")) - 1


@examples
@given(arguments())
def test_every_clip_of_a_source_is_served_once_per_its_epoch_but_those_that_sit_out(given_arguments):
    plan = make_mix(*given_arguments)
    clips_per_block = plan.block // plan.crops_per_clip
    # As many places as the slowest source needs for two epochs.
    slowest = max(
        2 * source.lane_clips / clips_per_block / share for source, share in zip(plan.plans, plan.shares, strict=True)
    )
    places = min(int(slowest) + 2 * CYCLE // min(plan.places) + 2, 1500)
    counts = Counter()
    reached = [set() for _ in plan.plans]
    for n in range(places * plan.lanes):
        rows = plan.block_samples(n)
        assert (
            rows.shape == (plan.block, 3) and rows[:, 2].tolist() == list(range(plan.crops_per_clip)) * clips_per_block
        )
        counts.update(map(tuple, rows.tolist()))
        reached[source_of(plan, rows[0, 1])].add(n)
    assert set(counts.values()) == {1}
    for number, source in enumerate(plan.plans):
        first = plan.first_clips[number]
        served = {(epoch, clip) for epoch, clip, _ in counts if first <= clip < first + source.num_clips}
        # Epochs that all lanes have finished.
        own = np.array([plan.source_block(n)[1] // plan.lanes for n in sorted(reached[number])])
        lanes = np.array([n % plan.lanes for n in sorted(reached[number])])
        done = min((own[lanes == lane].max(initial=-1) + 1) * clips_per_block for lane in range(plan.lanes))
        for epoch in range(min(2, done // source.lane_clips)):
            clips = {clip for e, clip in served if e == epoch}
            assert len(clips) == source.clips_per_epoch > source.num_clips - plan.lanes


@examples
@given(arguments(), st.integers(0, 10**6), st.data())
def test_a_mix_entered_anywhere_equals_the_tail_of_an_unbroken_one(given_arguments, cursor, data):
    plan, fresh = make_mix(*given_arguments), make_mix(*given_arguments)
    later = range(cursor, cursor + 30)
    expected = {n: plan.block_samples(n).tolist() for n in later}
    assert {n: fresh.block_samples(n).tolist() for n in data.draw(st.permutations(later))} == expected


@examples
@given(arguments())
def test_a_source_keeps_the_order_of_its_own_plan_in_every_lane(given_arguments):
    plan = make_mix(*given_arguments)
    taken = {}
    for n in range(300 * plan.lanes):
        source, number = plan.source_block(n)
        place, lane = divmod(number, plan.lanes)
        assert lane == n % plan.lanes
        assert place == taken.get((source, lane), -1) + 1
        taken[source, lane] = place
        samples = plan.plans[source].block_samples(number)
        samples[:, 1] += plan.first_clips[source]
        assert (plan.block_samples(n) == samples).all()


@examples
@given(st.lists(weights, min_size=1, max_size=5), st.integers(0, 2**63 - 1), st.integers(0, 10**6), st.integers(0, 99))
def test_shares_are_exact_in_a_cycle_and_near_in_any_part_of_it(shares, seed, lane, cycle):
    names = [str(number) for number in range(len(shares))]
    if min(shares) < sum(shares) / CYCLE:
        return
    places = count_places(names, shares)
    exact = np.array(shares) / sum(shares) * CYCLE
    assert sum(places) == CYCLE and (np.abs(places - exact) < 1).all()
    sources, earlier = draw_turns(seed, places, lane, cycle)
    ones = sources[:, None] == np.arange(len(places))
    counts = np.cumsum(ones, axis=0)
    assert counts[-1].tolist() == list(places)
    assert (earlier == counts[np.arange(CYCLE), sources] - 1).all()
    served = np.arange(1, CYCLE + 1)[:, None]
    assert (np.abs(counts - served * np.array(places) / CYCLE) < 1 + len(places)).all()


def test_weights_of_three_decimals_are_met_exactly_and_ties_go_to_the_first():
    assert count_places(["a", "b", "c"], [0.7, 0.275, 0.025]) == (700, 275, 25)
    assert count_places(["a", "b", "c"], [1, 1, 1]) == (334, 333, 333)
    assert count_places(["a", "b"], [1e300, 1e300]) == (500, 500)


def test_lanes_and_cycles_have_their_own_order_and_sources_their_own_shuffle():
    orders = {tuple(draw_turns(seed, (600, 400), lane, c).sources) for seed, lane, c in product((0, 1), (0, 1), (0, 1))}
    assert len(orders) == 8
    assert len({source_seed(seed, number) for seed, number in product(range(3), range(3))}) == 9
    plan = make_mix({"a": [50] * 20, "b": [50] * 20}, [1, 1], 0, 4, 8, 64, 1)
    blocks = {}
    for n in range(200):
        source, number = plan.source_block(n)
        blocks[source, number] = plan.block_samples(n)[:, 1] - plan.first_clips[source]
    both = [number for source, number in blocks if source == 0 and (1, number) in blocks]
    assert len(both) > 80
    assert sum((blocks[0, number] == blocks[1, number]).all() for number in both) < 2


def test_a_small_mix_is_what_it_was():
    plan = make_mix({"a": [70, 3, 64, 55], "b": [20, 21]}, [3, 1], 20240229, 3, 4, 16, 2)
    assert [plan.block_samples(n)[::2, :2].tolist() for n in (0, 1, 2, 95, 96, 2**20)] == GOLDEN_BLOCKS
    assert [plan.source_block(n) for n in range(8)] == GOLDEN_SOURCES


GOLDEN_BLOCKS = [
    [[0, 90], [0, 82]],
    [[0, 224], [0, 223]],
    [[0, 201], [0, 204]],
    [[0, 164], [0, 174]],
    [[0, 130], [0, 72]],
    [[8191, 70], [8191, 136]],
]
GOLDEN_SOURCES = [(0, 0), (1, 1), (1, 2), (0, 3), (0, 1), (0, 2), (0, 6), (0, 4)]


def test_every_layout_serves_the_same_steps_of_a_mix():
    blocks_per_step = 12
    plan = make_mix({"a": [400, 500], "b": [30, 40]}, [2, 1], 3, 12, 4, 16, 1)
    expected = None
    for world, workers, blocks in product((1, 2, 3, 4, 6, 12), (1, 2, 3), (1, 2, 3)):
        if plan.lanes % (world * workers) or blocks_per_step % (world * blocks):
            continue
        check_lanes(plan, world, workers)
        per_step = blocks_per_step // (world * blocks)
        steps = []
        for step in range(3, 6):
            numbers = [
                n
                for rank, i in product(range(world), range(step * per_step, (step + 1) * per_step))
                for n in micro_batch_blocks(i, rank, world, blocks).tolist()
            ]
            steps.append(sorted(plan.block_samples(n).tolist() for n in numbers))
        assert expected in (None, steps)
        expected = steps


def test_clips_are_located_in_the_shards_of_all_sources():
    plan = make_mix({"a": [60, 0, 5], "b": [70, 3]}, [1, 1], 0, 1, 8, 16, 1)
    shards, places = plan.locate(np.array([0, 59, 60, 64, 65, 134, 135, 137]))
    assert shards.tolist() == [0, 0, 2, 2, 3, 3, 4, 4] and places.tolist() == [0, 59, 0, 4, 0, 69, 0, 2]
    assert (plan.num_clips, plan.clips_per_epoch) == (138, 138)


def test_bad_clips_of_a_mix_are_filled_and_no_two_fills_are_the_same_sample():
    plan = make_mix({"a": [64] * 4, "b": [40]}, [1, 1], 1, 4, 4, 16, 1)
    bad = set(range(0, plan.num_clips, 3)) | set(range(256, 290))
    served = Counter()
    for n in range(400):
        samples, filled = fill_block(plan, n, lambda ids: np.array([clip not in bad for clip in ids[:, 1]]))
        assert (samples[~filled] == plan.block_samples(n)[~filled]).all()
        assert not bad & set(samples[:, 1].tolist())
        served.update(map(tuple, samples.tolist()))
    assert set(served.values()) == {1}


def test_default_lanes_leave_the_smallest_source_its_clips():
    def lanes(*sizes):
        return make_mix({str(size): [size] for size in sizes}, [1] * len(sizes), 0, None, 8, 16, 1).lanes

    assert lanes(2_000_000, 2_000_001) == 61_440
    assert lanes(2_000_000, 20_000) == 1920
    assert (lanes(2_000_000, 100), lanes(2_000_000, 3), lanes(2_000_000, 1)) == (8, 2, 1)


@pytest.mark.parametrize(
    ("sources", "shares", "lanes", "error", "message"),
    [
        ({"a": [99], "b": []}, [1, 1], None, DataError, "index of b lists 0 clips"),
        ({"a": [99], "b": [9]}, [1, 0], None, ConfigError, "b has the weight 0; it must be a number above 0"),
        ({"a": [99], "b": [9]}, [1, float("inf")], None, ConfigError, "b has the weight inf"),
        ({"a": [99], "b": [9]}, [1, float("nan")], None, ConfigError, "b has the weight nan"),
        (
            {"a": [9999], "b": [9]},
            [2000, 1],
            None,
            ConfigError,
            "weight 1 of 2001, which rounds to no block in 1000; give it a larger one",
        ),
        (
            {"a": [9999], "b": [9]},
            [1, 1],
            16,
            ConfigError,
            r"data.lanes = 16: .*\(b has 9\); choose at most 9,.* get 2",
        ),
        ({"a": [99], "b": [99]}, [1, 1], 8, ConfigError, "64 of the 198 clips of all sources.* at most 3,"),
    ],
)
def test_what_does_not_fit_the_sources_is_refused_with_the_remedy(sources, shares, lanes, error, message):
    with pytest.raises(error, match=message):
        make_mix(sources, shares, 0, lanes, 8, 16, 1)


def test_what_is_remembered_of_a_mix_is_bounded_and_changes_nothing(monkeypatch):
    given_arguments = {"a": [100] * 40, "b": [64]}, [3, 1], 3, 8, 8, 64, 1
    expected = [make_mix(*given_arguments).block_samples(n).tolist() for n in range(400)]
    monkeypatch.setattr(mix_module, "CACHED_CYCLES", 4)
    plan = make_mix(*given_arguments)
    assert [plan.block_samples(n).tolist() for n in range(400)] == expected
    assert len(plan._cycles) == 4
