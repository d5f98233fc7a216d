"""Bad data at scale: what is left out at packing, and whole runs over a corpus that broke after it."""

import json
import re
import shutil
import signal
import tarfile
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from msm_dist.config import Features
from msm_dist.data.audio import BadClip, Packed, decode_crop, probe
from msm_dist.data.crops import CropReader, Source
from msm_dist.data.index import (
    Index,
    Official,
    Shard,
    check_shards,
    file_sha256,
    load_index,
    member_table,
    members,
    write_index,
    write_members,
)
from msm_dist.data.logmel import HEADER_BYTES, SUFFIX, encode_clip
from msm_dist.data.pack import PackSettings, pack
from msm_dist.data.plan import fill_block, make_plan
from msm_dist.data.shards import measure_shards
from msm_dist.data.verify import verify_shards
from msm_dist.errors import DataError
from msm_dist.features import LogMel
from tests.audio_files import encode, noise, write_audio
from tests.bad_clips import AT_PACKING, KINDS, break_clip, break_clips, broken, write_files
from tests.corpus import sounds
from tests.test_pretrain import Runs
from tests.test_shards import write_tar

CLIPS, SHARD_CLIPS = 600, 60
MISSING, CUT_OFF = 3, 7  # shards
LONGEST = 25600  # every crop of 96 frames meets the middle of a clip that is no longer
BLOCK, STEPS, BATCH = 4, 76, 16  # more than two epochs
SETTINGS = [
    f"train.steps={STEPS}",
    "train.log_every=38",
    "train.valid_every=1000",
    "checkpoint.every=1000",
    "data.max_bad_fraction=0.06",
    "data.allow_missing_shards=true",
]


class BrokenRuns(Runs):
    """Runs on a corpus that is whole, and on its copy that is not."""

    def __init__(self, folder):
        super().__init__(folder)
        for number, sound in enumerate(sounds(CLIPS, seed=5)):
            samples = (sound[:LONGEST] * 32767).astype(np.int16)
            write_audio(folder / "audio" / f"clip{number:04d}.flac", samples)
        index = pack(folder / "audio", folder / "whole", PackSettings(shard_clips=SHARD_CLIPS, name="clips"))
        index = replace(index, official=Official(("own_segments.csv",), 2 * CLIPS, CLIPS, "5" * 64))
        write_index(index)
        self.whole = index
        self.broken = load_index(str(shutil.copytree(folder / "whole", folder / "broken")))
        of_shard = np.arange(CLIPS) // SHARD_CLIPS
        present = np.flatnonzero((of_shard != MISSING) & (of_shard != CUT_OFF))
        chosen = np.random.default_rng(1).permutation(present)[: CLIPS // 20]
        self.bad_clips = set(chosen.tolist())
        self.bad = break_clips(self.broken, chosen.tolist())
        self.missing_clips = set(np.flatnonzero((of_shard == MISSING) | (of_shard == CUT_OFF)).tolist())
        lost = [index.shards[number] for number in (MISSING, CUT_OFF)]
        self.missing = {row["key"].decode() for shard in lost for row in members(shard)}
        self.broken.shards[MISSING].path.unlink()
        with open(self.broken.shards[CUT_OFF].path, "r+b") as tar:
            tar.truncate(self.broken.shards[CUT_OFF].bytes // 2)

    def train_on(self, name, index, *settings, ranks=1):
        codes, output = self.run(name, f"data.shards={index.root}", *SETTINGS, *settings, ranks=ranks)
        assert codes == [0] * ranks, output
        return output

    def counts(self, name):
        last = [line for line in self.metrics(name) if "loss" in line][-1]
        assert last["step"] == STEPS
        return last["bad_clips"], last["missing_clips"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    runs = BrokenRuns(tmp_path_factory.mktemp("runs"))
    runs.train_on("whole", runs.whole)
    runs.output = runs.train_on("broken", runs.broken)
    return runs


@pytest.mark.distributed
def test_a_corpus_of_broken_clips_and_shards_trains_to_the_end_in_its_order(runs):
    assert len(runs.bad) == CLIPS // 20 == 3 * len(KINDS)
    assert "missing    2 of 10 shards" in runs.output
    assert "official   600 of 1,200 clips of own_segments.csv (manifest 555555555555)" in runs.output
    served, whole = runs.trace("broken"), runs.trace("whole")
    assert len(served) == len(whole) == STEPS * BATCH
    lost = runs.bad | runs.missing

    # Every good clip is in the slot that it has in the unbroken corpus, with the same crop and the same mask.
    kept = [(mine, theirs) for mine, theirs in zip(served, whole, strict=True) if theirs["key"] not in lost]
    assert all(mine == theirs for mine, theirs in kept)
    good = {row["key"].decode() for shard in runs.whole.shards for row in members(shard)} - lost
    for epoch in (0, 1):
        once = [record["key"] for record in served if record["epoch"] == epoch and record["crop"] == 0]
        assert len(once) == len(set(once))
        assert set(once) == good

    # What stands in for the others is what the plan says, and nothing of them is trained on.
    assert not lost & {record["key"] for record in served}
    plan = make_plan([shard.clips for shard in runs.whole.shards], 0, None, BLOCK, 16, 1)
    unreadable = np.array(sorted(runs.bad_clips | runs.missing_clips))
    for number in range(STEPS * BATCH // BLOCK):
        samples, _ = fill_block(plan, number, lambda ids: ~np.isin(ids[:, 1], unreadable))
        found = served[number * BLOCK : (number + 1) * BLOCK]
        assert [record["block"] for record in found] == [number] * BLOCK
        assert [[record["epoch"], record["clip"], record["crop"]] for record in found] == samples.tolist()

    bad = sum(record["key"] in runs.bad for record in whole)
    missing = sum(record["key"] in runs.missing for record in whole)
    assert bad >= 2 * len(runs.bad) and missing >= 2 * len(runs.missing) == 4 * SHARD_CLIPS
    assert runs.counts("broken") == (bad, missing)


@pytest.mark.distributed
def test_ranks_and_workers_do_not_change_what_a_broken_corpus_gives(runs):
    for name, ranks, workers in (("here", 1, 0), ("workers", 1, 2), ("ranks", 2, 1)):
        output = runs.train_on(name, runs.broken, f"data.num_workers={workers}", ranks=ranks)
        named = re.findall(r"clip (\S+): .* stands in for it", output)
        assert set(named) == runs.bad
        assert workers or len(named) == len(runs.bad), "a process names a clip once"
        assert runs.trace(name) == runs.trace("broken")
        assert runs.counts(name) == runs.counts("broken")


@pytest.mark.distributed
def test_a_killed_run_counts_bad_clips_on_from_its_checkpoint(runs):
    settings = [f"data.shards={runs.broken.root}", *SETTINGS, "checkpoint.every=20"]
    codes, output = runs.run("killed", *settings, ranks=1, KILL="step:50")
    assert codes == [-signal.SIGKILL], output
    output = runs.train_on("killed", runs.broken, "checkpoint.every=20")
    assert "continued from" in output
    assert runs.trace("killed") == runs.trace("broken")
    assert runs.counts("killed") == runs.counts("broken")


@pytest.mark.distributed
def test_checkpoint_and_export_say_what_was_trained_on(runs):
    meta = json.loads(runs.last_checkpoint("broken")["meta.json"])
    exported = json.loads((runs.folder / "broken" / "export" / "config.json").read_text())
    (source,) = meta["corpus"]
    assert exported["origin"]["corpus"] == meta["corpus"]
    assert (source["name"], source["kind"], source["missing_shards"], source["shards"]) == ("broken", "audio", 2, 10)
    assert (source["clips"], source["digest"], source["share"]) == (CLIPS, runs.whole.digest, 1.0)
    tables = {"tables": ["own_segments.csv"], "clips": 2 * CLIPS, "found": CLIPS, "manifest": "5" * 64}
    assert source["official"] == tables
    assert str(runs.folder) not in json.dumps(meta["corpus"]), "weights are given away, folders are not"


@pytest.mark.distributed
def test_more_bad_clips_than_allowed_stop_the_run_with_their_number(runs):
    settings = [*SETTINGS, "data.max_bad_fraction=0.04", "train.log_every=4"]
    codes, output = runs.run("too-bad", f"data.shards={runs.broken.root}", *settings, ranks=1)
    assert codes == [2], output
    assert "data.max_bad_fraction = 0.04" in output and "Traceback" not in output
    assert runs.checkpoints("too-bad"), "the run can go on with a higher limit"


def test_packing_leaves_the_ten_kinds_out_and_says_why(tmp_path):
    sound = (sounds(1, seed=2)[0] * 32767).astype(np.int16)
    good = write_audio(tmp_path / "good.flac", sound).read_bytes()
    write_files(tmp_path / "audio", good)
    index = pack(tmp_path / "audio", tmp_path / "out", PackSettings())
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    reasons = {entry["file"].rpartition(".")[0]: entry["reason"] for entry in report["left_out"]}
    assert reasons == {kind: reason for kind, reason in AT_PACKING.items() if reason}
    rows = {row["key"].decode().removesuffix("_0"): row for row in members(index.shards[0])}
    packable = {kind.replace(".", "_") for kind, reason in AT_PACKING.items() if reason is None} | {"good"}
    assert set(rows) == packable
    assert {int(row["rate"]) for row in rows.values()} == {Features().sample_rate}
    assert all(row["samples"] > 400 for row in rows.values())


SECONDS = 6
SOUND = noise(16000 * SECONDS, seed=3)
ENCODED = {codec: encode(SOUND, codec) for codec in ("flac", "ogg", "opus", "mp3", "wav")}


def crop(content: bytes, codec: str, start: int, num_samples: int = 16000) -> np.ndarray:
    info = probe(ENCODED[codec])
    packed = Packed(info.samples, info.sample_rate, info.format)
    return decode_crop(memoryview(content), start, start + num_samples, info.samples, 16000, packed)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_no_longer_the_clip_is_no_crop_of_it(kind):
    sound = (sounds(1, seed=2)[0] * 32767).astype(np.int16)
    flac = encode(sound)
    packed = Packed(len(sound), 16000, "flac")
    content = broken(kind, flac).ljust(len(flac), b"\0")
    assert len(content) == len(flac)
    with pytest.raises(BadClip) as fault:
        decode_crop(content, len(sound) // 2 - 1000, len(sound) // 2 + 1000, len(sound), 16000, packed)
    changed = {"wrong_extension", "nan", "one_sample", "8_khz_5.1", "24_bit"}
    expected = {"changed"} if kind in changed else {"empty"} if kind == "no_samples" else {"undecodable"}
    assert {fault.value.reason} == expected


@given(
    st.sampled_from(sorted(ENCODED)),
    st.floats(0, 1, exclude_max=True),
    st.sampled_from([1, 16, 500]),
    st.sampled_from(["zeros", "flipped"]),
    st.integers(0, 16000 * (SECONDS - 1)),
)
def test_damage_is_a_bad_clip_or_not_in_the_crop_where_the_codec_has_checksums(codec, place, length, how, start):
    content = bytearray(ENCODED[codec])
    at = int(place * len(content))
    part = content[at : at + length]
    content[at : at + length] = bytes(len(part)) if how == "zeros" else bytes(255 - byte for byte in part)
    try:
        found = crop(bytes(content), codec, start)
    except BadClip:
        return
    # Nothing else may come out. Whether it is the right sound, mp3 and wav can't tell: the digest of the shard can.
    if codec in ("flac", "ogg", "opus"):
        np.testing.assert_array_equal(found, crop(ENCODED[codec], codec, start))


def test_a_broken_flac_frame_is_bad_for_the_crops_that_touch_it_alone():
    flac = bytearray(ENCODED["flac"])
    middle = len(flac) // 2
    flac[middle : middle + 40] = bytes(40)
    good, touching = 0, 0
    for start in range(0, 16000 * (SECONDS - 1), 1600):
        touches = start < 16000 * SECONDS // 2 < start + 16000
        try:
            np.testing.assert_array_equal(crop(bytes(flac), "flac", start), SOUND[start : start + 16000])
        except BadClip:
            touching += touches
        else:
            assert not touches
            good += 1
    assert good > 20 and touching > 5


def test_a_nan_in_a_float_wav_is_bad_for_the_crops_that_touch_it_alone():
    waveform = SOUND / 32768
    waveform[40000] = np.nan
    wav = encode(waveform, "float.wav")
    assert np.array_equal(decode_crop(wav, 0, 40000, len(SOUND), 16000), SOUND[:40000])
    with pytest.raises(BadClip, match="non_finite"):
        decode_crop(wav, 0, 40001, len(SOUND), 16000)


def logmel_corpus(folder, sounds_of) -> Index:
    """A shard of stored log-mels."""
    folder.mkdir()
    front_end, path = LogMel(Features()), folder / "mels-000000.tar"
    members_of = {f"clip{i}": encode_clip(sound, front_end) for i, sound in enumerate(sounds_of)}
    write_tar(path, {key + SUFFIX: content for key, content in members_of.items()})
    with tarfile.open(path) as tar:
        found = list(zip(tar, sounds_of, strict=True))
    rows = [(m.offset_data, m.size, len(s), 16000, "logmel", m.name.removesuffix(SUFFIX).encode()) for m, s in found]
    table = write_members(path.with_suffix(".members.npy"), member_table(rows))
    shard = Shard(path.name, len(rows), path.stat().st_size, file_sha256(path), table, str(path))
    index = Index(str(folder), "logmel", 16000, (shard,), sum(map(len, sounds_of)) / 16000)
    write_index(index)
    return index


def test_damage_in_a_stored_log_mel_is_what_the_digest_of_its_shard_is_for(tmp_path):
    index = logmel_corpus(tmp_path / "mels", [noise(16000 + 1600 * i, seed=i) for i in range(70)])
    assert verify_shards(index, decode_clips=True) == []
    plan = make_plan([70], 0, None, 4, 16, 1)
    ids = np.array([(0, 5, crop) for crop in range(20)])
    whole = CropReader(Source(plan, index, Features(), 64)).read(ids)
    row = members(index.shards[0])[5]
    with open(index.shards[0].path, "r+b") as tar:
        tar.seek(int(row["offset"]))
        tar.write(bytes(HEADER_BYTES))
    # A crop is found by arithmetic: training does not look at the header.
    after = CropReader(Source(plan, index, Features(), 64)).read(ids)
    assert all(np.array_equal(mine.values, theirs.values) for mine, theirs in zip(after, whole, strict=True))
    with pytest.raises(DataError, match="sha256"):
        check_shards(index, "digest")
    renewed = replace(index, shards=(replace(index.shards[0], sha256=file_sha256(index.shards[0].path)),))
    (fault,) = verify_shards(renewed, decode_clips=True)
    assert "clip5" in fault and "header" in fault
    with pytest.raises(DataError, match="statistics were taken as they were made"):
        measure_shards(index, Features())


def test_stored_log_mels_of_another_front_end_are_refused(tmp_path):
    index = logmel_corpus(tmp_path / "mels", [noise(16000, seed=i) for i in range(70)])
    plan = make_plan([70], 0, None, 4, 16, 1)
    with pytest.raises(DataError, match="64 bands"):
        CropReader(Source(plan, index, Features(n_mels=64), 64)).read(np.array([(0, 1, 0)]))


@pytest.mark.parametrize("crops_per_clip", [1, 2])
def test_clips_that_are_bad_in_places_give_the_same_blocks_however_they_are_read(tmp_path, crops_per_clip):
    files = [write_audio(tmp_path / "audio" / f"{i:02d}.flac", noise(48000, seed=i)) for i in range(70)]
    index = pack(tmp_path / "audio", tmp_path / "out", PackSettings(shard_clips=35))
    plan = make_plan([35, 35], 0, None, 4, 16, crops_per_clip)
    source = Source(plan, index, Features(), 64)
    assert len(files) == plan.num_clips
    whole = CropReader(source).blocks(range(60))
    broken_ones = range(0, 70, 2)
    for clip in broken_ones:
        break_clip(index, clip, "flipped")
    together = CropReader(source).blocks(range(60))
    one_by_one = [CropReader(source).blocks([number]) for number in range(60)]
    assert np.array_equal(together.sample_ids, np.concatenate([block.sample_ids for block in one_by_one]))
    assert np.array_equal(together.values, np.concatenate([block.values for block in one_by_one]))
    assert together.num_bad == sum(block.num_bad for block in one_by_one)
    kept = (together.sample_ids == whole.sample_ids).all(axis=1)
    assert np.array_equal(together.values[kept], whole.values[kept]), "no damaged sound is served"
    assert together.num_bad == (~kept).sum()
    of_broken = np.isin(whole.sample_ids[:, 1], broken_ones)
    assert kept[~of_broken].all()
    # A crop of 0.64 s misses the broken frame of a clip of 3 s more often than not; a clip with two crops less often.
    assert 0 < together.num_bad < of_broken.sum()
