"""Tars and sounds that claim to be huge end in a named error, or are passed over, within a stated amount of memory.

Every call runs in a child whose address space is limited and whose peak is compared with the bound.
"""

import gzip
import lzma
import struct
import tarfile

import numpy as np
import pytest

from msm_dist.data import ogg
from msm_dist.data.index import load_index, members
from msm_dist.evaluate.recordings import read_audio
from tests.audio_files import encode, flac_claiming, noise, wav_claiming
from tests.hostile import FEW, MIB, decode_file, index_tar, probe_file, walk_tar
from tests.hostile_files import CLIP, END, header, member, pax

TB = 10**12


# ---- tars


GOOD = member("good.flac", CLIP)
NEGATIVE = b"\xff" * 10 + b"\xfe\x00"  # base 256: -512
TARS = {
    "member_of_1_tb": GOOD + header("a.flac", TB) + END,
    "member_of_2_to_the_80": GOOD + header("a.flac", b"\x80\0" + b"\xff" * 10) + END,
    "negative_size": GOOD + header("a.txt", NEGATIVE) + END,
    "negative_extension": GOOD + pax({"size": "-1024"}) + header("a.txt", 0) + END,
    "extension_of_1_tb": GOOD + pax({}, TB) + header("a.flac", 0) + END,
    "extension_claims_size": GOOD + pax({"size": str(TB)}) + header("a.flac", 10) + bytes(512) + END,
    "long_name_of_1_tb": GOOD + header("././@LongLink", TB, tarfile.GNUTYPE_LONGNAME) + END,
    "5000_extensions_before_a_member": GOOD + pax({"comment": "x"}) * 5000 + header("a.flac", 0) + END,
    "sparse_of_1_tb": GOOD + pax({"GNU.sparse.size": str(TB), "GNU.sparse.map": f"0,{TB}"}) + header("a.flac", 0) + END,
    "sparse_of_1_tb_by_its_map": GOOD
    + pax({"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": str(TB)})
    + header("a.flac", 512)
    + b"1\n0\n1000000000000\n".ljust(512, b"\0")
    + END,
    "gzip": gzip.compress(GOOD + END),
    "xz": lzma.compress(GOOD + END),
    "gzip_bomb": gzip.compress(bytes(100 * MIB), 1),
}
PASSED_OVER = {
    "digits": pax({"size": "9" * 5000}) + header("a.txt", 0),
    "link": header("a.flac", 0, tarfile.SYMTYPE),
    "hard_link": header("a.flac", 0, tarfile.LNKTYPE),
    "device": header("a.flac", 0, tarfile.CHRTYPE),
    "fifo": header("a.flac", 0, tarfile.FIFOTYPE),
}


@pytest.mark.parametrize("case", TARS)
def test_tar_that_claims_too_much_is_refused(bounded, tmp_path, case):
    path = tmp_path / "x.tar"
    path.write_bytes(TARS[case])
    assert str(path) in bounded.refused(index_tar, path, extra=FEW)
    assert not (tmp_path / "index.json").exists()


@pytest.mark.parametrize("case", ["negative_size", "negative_extension"])
def test_walk_of_a_tar_that_leads_back_ends(bounded, tmp_path, case):
    path = tmp_path / "x.tar"
    path.write_bytes(TARS[case])
    assert "less than nothing" in bounded.refused(walk_tar, path, extra=FEW)


@pytest.mark.parametrize("case", PASSED_OVER)
def test_member_that_is_no_plain_file_is_passed_over(bounded, tmp_path, case):
    path = tmp_path / "x.tar"
    path.write_bytes(GOOD + PASSED_OVER[case] + END)
    bounded.done(index_tar, path, extra=FEW)
    assert [row["key"] for row in members(load_index(str(tmp_path)).shards[0])] == [b"good"]


@pytest.mark.parametrize("case", ["member", "extension", "long_name"])
def test_hole_of_1_tb_in_a_tar_is_not_read_into_memory(bounded, tmp_path, case):
    """A file with a hole has the bytes that its headers claim, and takes no room."""
    kinds = {"member": tarfile.REGTYPE, "extension": tarfile.XHDTYPE, "long_name": tarfile.GNUTYPE_LONGNAME}
    path = tmp_path / "x.tar"
    with open(path, "wb") as file:
        file.write(header("a.flac", TB, kinds[case]))
        file.truncate(512 + -(-TB // 512) * 512 + 1024)
    assert "x.tar" in bounded.refused(index_tar, path, extra=FEW) or case == "member"


def test_headers_of_a_long_tar_are_not_kept(bounded, tmp_path):
    path = tmp_path / "x.tar"
    path.write_bytes(GOOD + header("empty.txt", 0) * 30_000 + END)
    assert bounded.done(walk_tar, path, extra=12 * MIB) == "30001"  # kept, they take 40 and more


# ---- audio


def au_of_channels(count: int) -> bytes:
    """Sun's format, whose header has room for 2^32 channels; libsndfile opens it before we can refuse it."""
    return b".snd" + struct.pack(">IIIII", 24, 4000, 3, 16000, count) + bytes(4000)


def rf64(samples: int) -> bytes:
    """A WAV of 64-bit sizes."""
    form = struct.pack("<HHIIHH", 1, 1, 16000, 32000, 2, 16)
    sizes = struct.pack("<QQQI", samples * 2 + 36, samples * 2, samples, 0)
    chunks = b"WAVEds64" + struct.pack("<I", len(sizes)) + sizes + b"fmt " + struct.pack("<I", 16) + form
    return b"RF64\xff\xff\xff\xff" + chunks + b"data\xff\xff\xff\xff" + bytes(4000)


def flac_with_block(kind: int, content: bytes, claimed: int | None = None) -> bytes:
    """A FLAC with a metadata block after its STREAMINFO."""
    good = encode(noise(16000))
    size = len(content) if claimed is None else claimed
    block = bytes([kind]) + size.to_bytes(3, "big") + content
    return good[:4] + bytes([good[4] & 0x7F]) + good[5:42] + block + good[42:]


def ogg_of_granule(granule: int) -> bytes:
    """An Ogg whose last page claims to end at a sample, its checksum true."""
    content = bytearray(encode(noise(16000), "ogg"))
    page = content.rindex(b"OggS")
    content[page + 6 : page + 14] = struct.pack("<q", granule)
    content[page + 22 : page + 26] = bytes(4)
    content[page + 22 : page + 26] = struct.pack("<I", ogg.checksum(content[page:]))
    return bytes(content)


def ogg_of_comments(count: int) -> bytes:
    """An Ogg whose comment header claims so many comments."""
    content = bytearray(encode(noise(16000), "ogg"))
    place = content.index(b"\x03vorbis")
    (vendor,) = struct.unpack_from("<I", content, place + 7)
    struct.pack_into("<I", content, place + 11 + vendor, count)
    page = content.rindex(b"OggS", 0, place)
    end = content.index(b"OggS", place)
    content[page + 22 : page + 26] = bytes(4)
    content[page + 22 : page + 26] = struct.pack("<I", ogg.checksum(content[page:end]))
    return bytes(content)


def mp3_of_frames(count: int) -> bytes:
    """An MP3 whose first frame claims so many more."""
    content = bytearray(encode(noise(16000), "mp3"))
    place = max(content.find(b"Xing"), content.find(b"Info"))
    struct.pack_into(">I", content, place + 8, count)
    return bytes(content)


def silence(samples: int, rate: int = 16000) -> bytes:
    """A FLAC of a sample in ten thousand bytes."""
    return encode(np.zeros(samples, np.int16), rate=rate)


SOUNDS = {
    "wav_of_65535_channels": lambda: wav_claiming(bytes(4000), channels=65535),
    "au_of_2_to_the_31_channels": lambda: au_of_channels(2**31),
    "au_of_1024_channels": lambda: au_of_channels(1024),
    "wav_of_4_gb": lambda: wav_claiming(bytes(4000), num_bytes=2**32 - 1),
    "rf64_of_2_to_the_60_samples": lambda: rf64(2**60),
    "flac_of_2_to_the_36_samples": lambda: flac_claiming(noise(16000), 2**36 - 1),
    "flac_of_16_mb_of_padding": lambda: flac_with_block(0x81, b"", 2**24 - 1),
    "flac_of_2_to_the_32_comments": lambda: flac_with_block(0x84, struct.pack("<II", 0, 2**32 - 1)),
    "flac_of_a_vendor_of_4_gb": lambda: flac_with_block(0x84, struct.pack("<II", 2**32 - 1, 0)),
    "flac_of_a_huge_picture": lambda: flac_with_block(0x86, struct.pack(">II", 3, 2**32 - 1) + bytes(24)),
    "flac_of_a_huge_cue_sheet": lambda: flac_with_block(0x85, bytes(395) + b"\xff"),
    "ogg_of_2_to_the_62_samples": lambda: ogg_of_granule(2**62),
    "ogg_of_2_to_the_31_comments": lambda: ogg_of_comments(2**31 - 1),
    "mp3_of_2_to_the_32_frames": lambda: mp3_of_frames(2**32 - 1),
    "mp3_of_a_256_mb_tag": lambda: b"ID3\x04\0\0\x7f\x7f\x7f\x7f" + encode(noise(16000), "mp3"),
}


@pytest.mark.parametrize("case", SOUNDS)
def test_sound_that_claims_too_much_takes_no_memory(bounded, tmp_path, case):
    path = tmp_path / "a.flac"
    path.write_bytes(SOUNDS[case]())
    outcome = bounded(read_audio, path, 16000, extra=FEW)
    assert outcome.kind in ("done", "refused"), outcome.text
    outcome = bounded(probe_file, path, extra=FEW)
    assert outcome.kind in ("done", "refused"), outcome.text


def test_seconds_at_a_low_rate_are_not_resampled_into_gigabytes(bounded, tmp_path):
    """2^26 samples of silence would fill 60 kB; made 16 times as many they are 4 GiB."""
    content = bytearray(silence(2**16, rate=1000))
    content[22:26] = struct.pack(">I", 2**26)
    (tmp_path / "a.flac").write_bytes(content)
    text = bounded.refused(read_audio, tmp_path / "a.flac", 16000, extra=FEW)
    assert "too_long (1073741824 samples; at most 536870912" in text


def test_long_sound_is_held_once(bounded, tmp_path):
    """2^23 samples are 32 MiB as floats and 16 as integers; held twice, with a copy for each step, they were 160."""
    (tmp_path / "a.flac").write_bytes(silence(2**23))
    bounded.done(decode_file, tmp_path / "a.flac", extra=(32 + 16 + 24) * MIB, limit=1024 * MIB)
