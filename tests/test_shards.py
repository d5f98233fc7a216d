"""Foreign tars: what is indexed, what is refused; verifying and measuring a corpus."""

import io
import json
import os
import shutil
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from msm_dist.config import Features
from msm_dist.data.audio import decode, to_int16
from msm_dist.data.index import file_sha256, load_index, members, write_members
from msm_dist.data.shards import index_shards, measure_shards
from msm_dist.data.stats import LogMelMeter, combine
from msm_dist.data.verify import verify_shards
from msm_dist.errors import DataError
from tests.audio_files import bad_files, encode, noise
from tests.shards import damage_clip

CLIPS = {
    "00/first.flac": encode(noise(8000, 1)),
    "00/second.wav": encode(noise(22050, 2, channels=2), "wav", 44100),
    "b/third.OGG": encode(noise(24000, 3), "ogg", 48000),
    "fourth.take2.mp3": encode(noise(16000, 4), "mp3"),
    "fifth.opus": encode(noise(8000, 5), "opus"),
}
KEYS = [b"00/first", b"00/second", b"b/third", b"fourth.take2", b"fifth"]


def write_tar(path: Path, files: dict[str, bytes], **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", **options) as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


@pytest.fixture
def tars(tmp_path) -> list[Path]:
    text = {"00/first.json": b"{}", "00/first.txt": b"a caption", "README": b"hello"}
    return [
        write_tar(tmp_path / "tars" / "a.tar", text | CLIPS),
        write_tar(tmp_path / "tars" / "b.tar", {"sixth.flac": encode(noise(4000, 6))}, format=tarfile.PAX_FORMAT),
    ]


def test_mixed_codecs_rates_and_folders_are_indexed_in_place(tars):
    index = index_shards(tars, Features())
    assert load_index(str(tars[0].parent)) == index
    assert (index.num_clips, index.sample_rate) == (6, None)
    table = members(index.shards[0])
    assert table["key"].tolist() == KEYS
    assert table["format"].tolist() == [b"flac", b"wav", b"ogg", b"mp3", b"ogg"]
    assert table["rate"].tolist() == [16000, 44100, 48000, 16000, 16000]
    assert table["samples"].tolist() == [8000, 22050, 24000, 16000, 8000]
    assert index.seconds == pytest.approx(0.5 + 0.5 + 0.5 + 1 + 0.5 + 0.25)
    content = tars[0].read_bytes()
    found = [content[row["offset"] : row["offset"] + row["size"]] for row in table]
    assert found == list(CLIPS.values())
    assert verify_shards(index, decode_clips=True) == []


def test_tars_of_one_rate_have_a_sample_rate(tars):
    assert index_shards(tars[1:], Features()).sample_rate == 16000


def test_index_does_not_depend_on_order_or_workers(tars):
    first = index_shards(tars, Features())
    text = (tars[0].parent / "index.json").read_bytes()
    assert index_shards([*tars[::-1], tars[0]], Features(), workers=2) == first
    assert (tars[0].parent / "index.json").read_bytes() == text


def test_statistics_are_those_of_the_samples_that_are_trained_on(tars):
    index = index_shards(tars, Features())
    meter = LogMelMeter(Features())
    for encoded in [*CLIPS.values(), encode(noise(4000, 6))]:
        meter.add(to_int16(decode(encoded, 16000)))
    expected = combine([meter.sums])
    assert (index.mean, index.std) == (pytest.approx(expected.mean), pytest.approx(expected.std))
    assert index.mel_mean == pytest.approx(expected.mel_mean)


def test_keys_that_two_tars_share_get_the_name_of_the_tar(tmp_path):
    tars = [
        write_tar(tmp_path / f"{name}.tar", {"0.flac": encode(noise(8000, seed))}) for seed, name in enumerate("ab")
    ]
    index = index_shards(tars, Features())
    assert [members(shard)["key"].tolist() for shard in index.shards] == [[b"a/0"], [b"b/0"]]


@pytest.mark.parametrize("copy", [shutil.copy, os.symlink, os.link])
def test_two_tars_of_the_same_bytes_are_refused(tars, copy):
    copy(tars[1], tars[0].parent / "copy.tar")
    with pytest.raises(DataError, match="b.tar and copy.tar are the same tar .* move one of them") as error:
        index_shards([*tars, tars[0].parent / "copy.tar"], Features())
    assert str(tars[1].parent) in str(error.value)
    assert {path.name for path in tars[0].parent.iterdir()} == {"a.tar", "b.tar", "copy.tar"}, "nothing is written"


def test_tars_of_one_size_and_other_bytes_are_indexed_with_their_digests(tmp_path):
    tars = [write_tar(tmp_path / f"{name}.tar", {f"{name}.wav": encode(noise(8000, 1), "wav")}) for name in "abc"]
    assert len({path.stat().st_size for path in tars}) == 1
    index = index_shards(tars, Features())
    assert [shard.sha256 for shard in index.shards] == [file_sha256(path) for path in tars]


def test_bad_clips_are_left_out_and_listed(tmp_path):
    bad = bad_files()
    path = write_tar(tmp_path / "a.tar", CLIPS | {name: content for name, (content, _) in bad.items()})
    only_bad = write_tar(tmp_path / "b.tar", {name: content for name, (content, _) in bad.items()})
    index = index_shards([path, only_bad], Features())
    assert [shard.name for shard in index.shards] == ["a.tar"]
    assert members(index.shards[0])["key"].tolist() == KEYS
    left_out = json.loads((tmp_path / "report.json").read_text())["left_out"]
    assert len(left_out) == 2 * len(bad)
    # A claimed year is met by the decoder here, by the scan of long recordings in packing.
    reasons = {f"a.tar/{Path(name).stem}": reason for name, (_, reason) in bad.items()} | {
        "a.tar/claims_a_year": "too_long"
    }
    assert {(e["file"], e["reason"]) for e in left_out if e["file"].startswith("a")} == set(reasons.items())
    (tmp_path / "index.json").unlink()
    with pytest.raises(DataError, match=f"none of the {len(bad)} clips"):
        index_shards([only_bad], Features())


def test_links_and_sparse_members_are_no_clips(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, kind in (
            ("link.flac", tarfile.SYMTYPE),
            ("hard.flac", tarfile.LNKTYPE),
            ("dir.flac", tarfile.DIRTYPE),
        ):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "/etc/passwd"
            tar.addfile(member)
        member = tarfile.TarInfo("real.flac")
        member.size = len(CLIPS["00/first.flac"])
        tar.addfile(member, io.BytesIO(CLIPS["00/first.flac"]))
    index = index_shards([tmp_path / "a.tar"], Features())
    assert members(index.shards[0])["key"].tolist() == [b"real"]
    assert json.loads((tmp_path / "report.json").read_text())["left_out"] == []


@pytest.mark.parametrize("keep", [0.3, 0.6, 0.9])
def test_truncated_tar_is_named(tars, keep):
    content = tars[0].read_bytes()
    tars[0].write_bytes(content[: int(len(content) * keep)])
    with pytest.raises(DataError, match=f"{tars[0]}: is "):
        index_shards(tars, Features())
    assert not (tars[0].parent / "index.json").exists()


def test_tar_that_ends_between_members_is_truncated_too(tars):
    with tarfile.open(tars[0]) as tar:
        end = tar.getmembers()[-1].offset
    tars[0].write_bytes(tars[0].read_bytes()[:end])
    with pytest.raises(DataError, match=f"cut off or damaged at byte {end}"):
        index_shards(tars, Features())


def test_damaged_header_in_the_middle_is_not_the_end(tars):
    with tarfile.open(tars[0]) as tar:
        offset = tar.getmembers()[4].offset
    content = bytearray(tars[0].read_bytes())
    content[offset + 150] ^= 0xFF
    tars[0].write_bytes(content)
    with pytest.raises(DataError, match=f"damaged at byte {offset}"):
        index_shards(tars, Features())


@pytest.mark.parametrize("size", [-1000, 2**60])
def test_hostile_sizes_are_refused(tmp_path, size):
    member = tarfile.TarInfo("a.flac")
    member.size = size
    header = member.tobuf(tarfile.GNU_FORMAT)
    (tmp_path / "a.tar").write_bytes(header + bytes(20480))
    with pytest.raises(DataError, match=r"a\.tar: is "):
        index_shards([tmp_path / "a.tar"], Features())


def test_what_is_no_shard_is_refused(tars, tmp_path):
    (tmp_path / "text.tar").write_text("no tar " * 1000)
    (tmp_path / "empty.tar").write_bytes(b"")
    with tarfile.open(tmp_path / "packed.tar", "w:gz") as tar:
        tar.add(tars[0], "a.flac")
    write_tar(tmp_path / "captions.tar", {"a.txt": b"x"})
    write_tar(tmp_path / "twice.tar", {"a.flac": CLIPS["00/first.flac"], "a.wav": CLIPS["00/second.wav"]})
    for paths, message in [
        ([], "no tar given"),
        ([tmp_path / "missing.tar"], "missing.tar: no such"),
        ([tmp_path], "no such .tar"),
        ([tars[0], tmp_path / "twice.tar"], "one folder|lie in"),
        ([tmp_path / "text.tar"], "not a complete, uncompressed tar"),
        ([tmp_path / "empty.tar"], "empty.tar: is "),
        ([tmp_path / "packed.tar"], "not a complete, uncompressed tar"),
        ([tmp_path / "captions.tar"], "holds no audio"),
        ([tmp_path / "twice.tar"], "holds a twice"),
    ]:
        with pytest.raises(DataError, match=message):
            index_shards(paths, Features())


def test_verify_names_each_damaged_shard(tars):
    index = index_shards([*tars, write_tar(tars[0].parent / "c.tar", {"z.flac": encode(noise(4000))})], Features())
    damage_clip(index, 2)
    index.shards[1].members_path.write_bytes(b"x")
    index.shards[2].path.unlink()
    faults = verify_shards(index, decode_clips=False)
    assert [fault.partition(":")[0] for fault in faults] == [
        str(index.shards[0].path),
        str(index.shards[1].members_path),
        str(index.shards[2].path),
    ]
    assert "sha256" in faults[0]
    assert "missing" in faults[2]


def test_verify_with_decoding_sees_what_digests_can_not(tars):
    index = index_shards(tars, Features())
    damage_clip(index, 1)
    shard = index.shards[0]
    consistent = replace(index, shards=(replace(shard, sha256=file_sha256(shard.path)), index.shards[1]))
    assert verify_shards(consistent, decode_clips=False) == []
    faults = verify_shards(consistent, decode_clips=True)
    assert len(faults) == 1
    assert "00/second: undecodable" in faults[0]
    with pytest.raises(DataError, match="00/second: undecodable.*msm-dist data verify"):
        measure_shards(consistent, Features())


def test_verify_with_decoding_compares_the_lengths(tars):
    index = index_shards(tars, Features())
    shard = index.shards[1]
    table = members(shard).copy()
    table["samples"] += 1
    digest = write_members(shard.members_path, table)
    faults = verify_shards(replace(index, shards=(replace(shard, members_sha256=digest),)), decode_clips=True)
    assert faults == [f"{shard.path}: sixth: 4000 samples, its sidecar says 4001"]


def test_measuring_again_gives_the_same_and_another_front_end_its_own(tars):
    index = index_shards(tars, Features())
    assert measure_shards(index, Features()) == index
    other = measure_shards(index, Features(n_mels=40))
    assert len(other.mel_mean) == 40
    assert other.features["n_mels"] == 40
    assert other.digest == index.digest
    assert load_index(str(index.root)) == other


def test_long_clip_is_measured_in_pieces_to_the_same_sums():
    clip = noise(16000 * 130)
    meter = LogMelMeter(Features())
    meter.add(clip)
    import torch

    log_mel = meter.log_mel(torch.from_numpy(clip)[None], centred=True)[0, 0].double().numpy()
    np.testing.assert_allclose(meter.sums[1:81], log_mel.sum(axis=1), rtol=1e-9)
    np.testing.assert_allclose(meter.sums[81:], (log_mel**2).sum(axis=1), rtol=1e-9)
    assert meter.sums[0] == log_mel.shape[1] == 13001
