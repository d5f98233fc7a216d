"""Reading crops from real shards: the right samples, stand-ins for damaged clips, an end to lost shards."""

import logging

import numpy as np
import pytest

from benchmarks.data_corpora import encode_sound, make_sound
from msm_dist.config import Features
from msm_dist.data import crops as crops_module
from msm_dist.data import storage
from msm_dist.data.audio import decode, decode_crop, decode_crops, to_int16
from msm_dist.data.crops import CropReader, Source
from msm_dist.data.index import load_index, members, tables
from msm_dist.data.plan import crop_offset, fill_block, make_plan
from msm_dist.errors import DataError
from tests.shards import damage_clip, noise_clips, write_corpus

FRAMES = 16
CLIPS = noise_clips(70)
FEATURES = Features()


@pytest.fixture
def index(tmp_path):
    return write_corpus(tmp_path / "corpus", CLIPS, clips_per_shard=24)


def source_of(index, crops_per_clip=1, missing=()):
    plan = make_plan([shard.clips for shard in index.shards], 7, None, 4, 16, crops_per_clip)
    return Source(plan, index, FEATURES, FRAMES, frozenset(missing))


def expected_crop(clip, offset):
    """The crop by RECIPE: frames [offset, offset + T) of the padded clip, reflected at its true ends."""
    padded = np.pad(clip, (0, max(0, 160 * (FRAMES - 1) - len(clip))))
    return np.pad(padded, 200, mode="reflect")[160 * offset :][: 160 * (FRAMES - 1) + 400]


def test_a_crop_is_the_slice_of_its_clip_reflected_at_the_ends(index):
    ids = np.array([(epoch, clip, 0) for epoch in range(4) for clip in range(70)])
    crops = CropReader(source_of(index)).read(ids)
    num_frames = [max(FRAMES, 1 + len(clip) // 160) for clip in CLIPS]
    at_an_end = 0
    for (_, clip, _), crop in zip(ids.tolist(), crops, strict=True):
        assert crop.key == f"clip-{clip:04d}"
        assert 0 <= crop.offset <= num_frames[clip] - FRAMES
        assert crop.values.dtype == np.int16
        np.testing.assert_array_equal(crop.values, expected_crop(CLIPS[clip], crop.offset))
        at_an_end += crop.offset in (0, num_frames[clip] - FRAMES)
    assert at_an_end > 20 and min(len(clip) for clip in CLIPS) < 160 * (FRAMES - 1)
    offsets = [crop.offset for crop in crops]
    maxima = np.array([num_frames[clip] - FRAMES for clip in ids[:, 1]])
    assert offsets == crop_offset(7, ids, maxima).tolist()


def test_offsets_count_frames_at_the_target_rate(tmp_path):
    clips = noise_clips(4, rate=8000, shortest=7000)
    index = write_corpus(tmp_path, clips, clips_per_shard=4, rate=8000)
    ids = np.array([(0, clip, crop) for clip in range(4) for crop in range(8)])
    crops = CropReader(source_of(index)).read(ids)
    num_frames = np.array([1 + 2 * len(clips[clip]) // 160 for clip in ids[:, 1]])
    assert [crop.offset for crop in crops] == crop_offset(7, ids, num_frames - FRAMES).tolist()
    row, content = members(index.shards[0])[0], index.shards[0].path.read_bytes()
    start = 160 * crops[0].offset - 200
    encoded = content[row["offset"] : row["offset"] + row["size"]]
    expected = decode_crop(encoded, start, start + 2800, 2 * len(clips[0]), 16000)
    np.testing.assert_array_equal(crops[0].values, expected)


def test_a_damaged_clip_is_replaced_by_the_rule_and_nothing_else_changes(index, caplog):
    whole = CropReader(source_of(index))
    source = source_of(index)
    block = 5
    damaged = int(source.plan.block_samples(block)[1, 1])
    before = [whole.blocks([n]) for n in range(block - 2, block + 3)]
    damage_clip(index, damaged)
    reader = CropReader(source)
    after = [reader.blocks([n]) for n in range(block - 2, block + 3)]
    donor = source.plan.block_samples(block)[0]
    for old, new in zip(before, after, strict=True):
        slots = [i for i in range(4) if not (old.numbers[0] == block and i == 1)]
        np.testing.assert_array_equal(new.sample_ids[slots], old.sample_ids[slots])
        for i in slots:
            np.testing.assert_array_equal(new.values[i], old.values[i])
        assert new.num_bad == (new.numbers[0] == block) and new.num_missing == 0
    filled = after[2]
    assert filled.sample_ids[1].tolist() == [donor[0], donor[1], 1]
    assert filled.keys[1] == f"clip-{donor[1]:04d}"
    np.testing.assert_array_equal(filled.values[1], expected_crop(CLIPS[donor[1]], filled.offsets[1]))
    for n in range(100):
        reader.blocks([n])
    warnings = [record.message for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == 1 and f"clip clip-{damaged:04d}: undecodable" in warnings[0]


def test_a_block_without_a_good_clip_is_filled_from_its_lane(index):
    source = source_of(index)
    lanes = source.plan.lanes
    for clip in source.plan.block_samples(lanes)[:, 1].tolist():
        damage_clip(index, clip)
    last = source.plan.block_samples(0)[-1]
    block = CropReader(source).blocks([lanes])
    assert block.sample_ids.tolist() == [[last[0], last[1], 1 + 2 * 4 + k] for k in range(4)]
    assert block.num_bad == 4
    for values, offset in zip(block.values, block.offsets, strict=True):
        np.testing.assert_array_equal(values, expected_crop(CLIPS[last[1]], offset))


def test_a_damaged_clip_is_bad_with_all_its_crops(index):
    source = source_of(index, crops_per_clip=2)
    bad, good = source.plan.block_samples(0)[[0, 2], 1].tolist()
    damage_clip(index, bad)
    block = CropReader(source).blocks([0])
    assert block.sample_ids.tolist() == [[0, good, 2], [0, good, 3], [0, good, 0], [0, good, 1]]
    assert block.num_bad == 2


def test_clips_of_a_missing_shard_are_replaced_without_being_read(index, caplog):
    source = source_of(index, missing={1})
    index.shards[1].path.unlink()
    index.shards[1].members_path.unlink()
    reader = CropReader(source)
    num_missing = 0
    for n in range(2 * source.plan.lanes):
        block = reader.blocks([n])
        expected, filled = fill_block(source.plan, n, lambda ids: (ids[:, 1] < 24) | (ids[:, 1] >= 48))
        assert block.sample_ids.tolist() == expected.tolist()
        assert (block.num_bad, block.num_missing) == (0, filled.sum())
        num_missing += block.num_missing
    assert num_missing > 10 and not caplog.records


def test_a_shard_that_vanishes_ends_the_run_after_some_tries(index, monkeypatch):
    pauses = []
    monkeypatch.setattr(storage.time, "sleep", pauses.append)
    index.shards[1].path.unlink()
    with pytest.raises(DataError, match=r"noise-000001.tar: can't be read \(No such file.* tried 4 times; restore"):
        CropReader(source_of(index)).read(np.array([[0, 30, 0]]))
    assert pauses == [0.1, 0.2, 0.4]


def test_a_shard_that_comes_back_in_time_is_read(index, monkeypatch):
    path = index.shards[1].path
    hidden = path.rename(path.with_suffix(".hidden"))
    monkeypatch.setattr(storage.time, "sleep", lambda seconds: seconds > 0.1 and hidden.rename(path))
    [crop] = CropReader(source_of(index)).read(np.array([[0, 30, 0]]))
    assert crop.key == "clip-0030"


@pytest.mark.parametrize(("opened_before", "size"), [(False, 0), (False, 5000), (True, 5000)])
def test_a_shard_that_changed_its_size_ends_the_run(index, opened_before, size):
    reader = CropReader(source_of(index))
    if opened_before:
        reader.read(np.array([[0, 30, 0]]))
    with open(index.shards[1].path, "r+b") as file:
        file.truncate(size)
    with pytest.raises(DataError, match=f"{size} bytes, its index says {index.shards[1].bytes}"):
        reader.read(np.array([[0, 47, 0]]))


def test_a_changed_table_of_clips_ends_the_run(index):
    table = members(index.shards[1]).copy()
    table["offset"] += 512
    np.save(index.shards[1].members_path, table)
    with pytest.raises(DataError, match="members.npy: sha256"):
        CropReader(source_of(index)).read(np.array([[0, 30, 0]]))


def test_few_shards_are_open_at_a_time_without_a_difference(index, monkeypatch):
    expected = [CropReader(source_of(index)).blocks([n]) for n in range(20)]
    monkeypatch.setattr(storage, "MAX_OPEN_FILES", 1)
    reader = CropReader(source_of(load_index(str(index.root))))
    for n in range(20):
        block = reader.blocks([n])
        np.testing.assert_array_equal(block.values, expected[n].values)
        (store,) = reader._store._stores.values()
        assert store._mapped.cache_info().currsize == 1


@pytest.mark.parametrize("codec", ["flac", "wav", "vorbis", "opus", "mp3"])
def test_a_crop_of_any_codec_is_the_slice_of_the_decoded_clip(codec):
    """Also of tones in Opus, whose decoder was off by more than the sound for seconds after a seek."""
    for number in (19, 199):
        encoded = encode_sound(make_sound(number), codec)
        whole = to_int16(decode(encoded, 16000)).astype(float)
        for start in range(2997, 120000, 30000):
            crop = decode_crop(encoded, start, start + 33520, len(whole), 16000)
            noise = np.square(crop - whole[start : start + 33520]).mean()
            assert noise <= 1e-4 * np.square(whole[start : start + 33520]).mean()


def test_crops_of_a_clip_that_are_decoded_together_are_those_decoded_alone():
    samples = make_sound(3)
    encoded = encode_sound(samples, "flac")
    starts = [100000, -200, 3000, 101000, 60000, 160000 - 33320]
    together = decode_crops(encoded, starts, 33520, 160000, 16000)
    padded = np.pad(samples, 200, mode="reflect")
    for start, crop in zip(starts, together, strict=True):
        np.testing.assert_array_equal(crop, decode_crop(encoded, start, start + 33520, 160000, 16000))
        np.testing.assert_array_equal(crop, padded[start + 200 :][:33520])


def test_bytes_fetched_at_once_are_bounded(index, monkeypatch):
    reader = CropReader(source_of(index))
    ids = np.array([(0, clip, 0) for clip in range(70)])
    expected = reader.read(ids)
    fetched = []
    fetch = reader._store.fetch

    def recorded(spans):
        fetched.append([span.stop - span.start for span in spans])
        return fetch(spans)

    monkeypatch.setattr(reader._store, "fetch", recorded)
    monkeypatch.setattr(crops_module, "FETCH_BYTES", 50_000)
    again = reader.read(ids)
    assert max(sum(sizes) for sizes in fetched) <= 50_000 and len(fetched) > 3
    for crop, first in zip(again, expected, strict=True):
        np.testing.assert_array_equal(crop.values, first.values)


def test_tables_beyond_the_bound_are_dropped_without_a_difference(index, monkeypatch):
    expected = CropReader(source_of(index)).blocks(range(20))
    monkeypatch.setattr(crops_module, "MAX_TABLE_BYTES", 0)
    reads = []
    monkeypatch.setattr(crops_module, "tables", lambda shards, store: reads.extend(shards) or tables(shards, store))
    reader = CropReader(source_of(index))
    for number in range(20):
        block = reader.blocks([number])
        at = slice(number * len(block.numbers), (number + 1) * len(block.numbers))
        np.testing.assert_array_equal(block.values, expected.values[at])
    assert len(reads) > len(index.shards), "none was kept"
