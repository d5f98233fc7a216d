"""What claims to be huge: each claim ends in a named error, or is passed over, within a stated amount of memory.

Every call runs in a child whose address space is limited and whose peak is compared with the bound.
"""

import gzip
import hashlib
import io
import json
import lzma
import pickle
import struct
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from msm_dist.config import Features, Model, load_config
from msm_dist.data import ogg
from msm_dist.data.index import Index, Shard, file_sha256, load_index, member_table, members, write_index, write_members
from msm_dist.data.logmel import encode_clip
from msm_dist.data.verify import verify_shards
from msm_dist.errors import DataError
from msm_dist.evaluate.recordings import read_audio
from msm_dist.features import LogMel
from msm_dist.model import weights
from msm_dist.model.mae import MaskedSpectrogramModel
from msm_dist.model.published import read_file
from tests.audio_files import encode, flac_claiming, noise, wav_claiming
from tests.hostile import (
    MIB,
    Bounded,
    decode_file,
    index_tar,
    inspect_first,
    load_encoder,
    one_thread,
    open_run,
    probe_file,
    walk_tar,
)
from tests.shards import noise_clips, write_corpus

TB = 10**12
FEW = 64 * MIB
"""What reading a small file may take, with the libraries that it loads on the way."""


@pytest.fixture(scope="module")
def bounded():
    with one_thread():
        yield Bounded()


# ---- tars


def header(name: str, size: int | bytes, kind: bytes = tarfile.REGTYPE) -> bytes:
    """A tar header with a true checksum, whatever it claims."""
    content = bytearray(tarfile.TarInfo(name).tobuf(tarfile.GNU_FORMAT)[:512])
    content[124:136] = size if isinstance(size, bytes) else tarfile.itn(size, 12, tarfile.GNU_FORMAT)
    content[156:157] = kind
    content[148:156] = b" " * 8
    content[148:156] = b"%06o\0 " % sum(content)
    return bytes(content)


def pax(records: dict[str, str], claimed: int | None = None) -> bytes:
    """An extension header with these records."""
    lines = b""
    for key, value in records.items():
        rest = f" {key}={value}\n".encode()
        length = len(rest) + len(str(len(rest) + 3))
        lines += str(length).encode().ljust(length - len(rest), b" ")[: length - len(rest)] + rest
    size = len(lines) if claimed is None else claimed
    return header("x", size, tarfile.XHDTYPE) + lines.ljust(-(-len(lines) // 512) * 512, b"\0")


END = bytes(1024)
CLIP = encode(noise(4000))


def member(name: str, content: bytes) -> bytes:
    return header(name, len(content)) + content.ljust(-(-len(content) // 512) * 512, b"\0")


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


# ---- index.json, sidecars, stored log-mels


@pytest.fixture
def corpus(tmp_path) -> Index:
    return write_corpus(tmp_path / "corpus", noise_clips(4), 4)


def write_entry(index: Index, **values) -> None:
    """Claim something else of the first shard, or with a key of index.json of the corpus."""
    path = index.root / "index.json"
    content = json.loads(path.read_text())
    for name, value in values.items():
        where = content["shards"][0] if name in content["shards"][0] else content
        where[name] = value
    content["clips"] = sum(shard["clips"] for shard in content["shards"])
    path.write_text(json.dumps(content))


def claim_rows(index: Index, change) -> None:
    """Give the first shard the sidecar that `change` makes of its own, with a true digest."""
    table = members(index.shards[0]).copy()
    change(table)
    write_entry(index, members_sha256=write_members(index.shards[0].members_path, table))


CLAIMS = {
    "10_to_the_12_clips_in_a_shard": {"clips": 10**12},
    "2_to_the_39_clips_in_a_shard": {"clips": 2**39},
    "a_shard_of_2_to_the_59_bytes": {"bytes": 2**59},
    "10_to_the_5000_clips": {"clips": 10**4000},
}


@pytest.mark.parametrize("case", CLAIMS)
def test_index_that_claims_too_much_is_refused(bounded, corpus, case):
    write_entry(corpus, **CLAIMS[case])
    bounded.refused(open_run, corpus.location, extra=FEW)


def test_index_of_a_gigabyte_is_not_read(bounded, corpus):
    with open(corpus.root / "index.json", "wb") as file:
        file.truncate(2**30)
    assert "1073741824 bytes" in bounded.refused(load_index, corpus.location, extra=FEW)


def test_index_of_many_faults_takes_the_memory_of_its_text(bounded, corpus):
    entry = json.dumps({"name": "x" * 20})
    (corpus.root / "index.json").write_text('{"version": 1, "shards": [' + ", ".join([entry] * 20_000) + "]}")
    assert "shards.0" in bounded.refused(load_index, corpus.location, extra=FEW)  # all faults together took 200 MiB


def test_shards_that_are_listed_twice_are_found_in_one_pass(bounded, corpus):
    """Counted one by one, 20,000 of them took seconds, and ten times as many a hundred times as long."""
    content = json.loads((corpus.root / "index.json").read_text())
    entry = content["shards"][0]
    content["shards"] = [entry | {"name": f"{number}.tar"} for number in range(19_999)] + [entry | {"name": "0.tar"}]
    content["clips"] = 20_000 * entry["clips"]
    (corpus.root / "index.json").write_text(json.dumps(content))
    assert "0.tar is listed twice" in bounded.refused(load_index, corpus.location, extra=2 * FEW)


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 100_000, "[" * 900 + "]" * 900, "9" * 100_000, "", "nul"])
def test_index_that_is_no_index_is_refused(bounded, corpus, text):
    (corpus.root / "index.json").write_text(text)
    bounded.refused(load_index, corpus.location, extra=FEW)


@pytest.mark.parametrize("name", ["n_fft", "n_mels", "hop", "win", "sample_rate"])
def test_front_end_of_an_index_is_bounded(bounded, corpus, name):
    """`inspect` makes a log-mel with the front end that index.json names."""
    features = Features().front_end() | {name: 10**12}
    bands = 1 if name == "n_mels" else 80
    write_entry(corpus, mean=-7.0, std=4.0, mel_mean=[0.0] * bands, features=features)
    bounded.refused(inspect_first, corpus.location, extra=FEW)


@pytest.mark.parametrize(
    ("field", "value"), [("samples", 2**62), ("samples", 2**40), ("rate", 0), ("size", 2**62), ("offset", -(2**62))]
)
def test_sidecar_that_claims_too_much_is_refused(bounded, corpus, field, value):
    def change(table):
        table[field][0] = value

    claim_rows(corpus, change)
    assert "members.npy" in bounded.refused(inspect_first, corpus.location, extra=FEW)


@pytest.mark.parametrize("codec", [b"/../../x", b"\x80", b"", b"a.b"])
def test_codec_of_a_sidecar_is_a_plain_word(corpus, codec):
    """It ends the name of the file that `inspect --original` writes, which was once outside of its folder."""
    claim_rows(corpus, lambda table: table.__setitem__("format", codec))
    with pytest.raises(DataError, match="codecs"):
        members(load_index(corpus.location).shards[0])


def sidecar(header: str, content: bytes = b"") -> bytes:
    text = header.encode().ljust(117) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + content


class Payload:
    """What an unpickler would call."""

    def __reduce__(self):
        return (exec, ("import builtins; builtins.planted = True; raise SystemError('code ran')",))


def zip_of_zeros(name: str, size: int) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive, archive.open(name, "w") as part:
        for _ in range(size // MIB):
            part.write(bytes(MIB))
    return file.getvalue()


ARRAYS = {
    "of_2_to_the_50_values": lambda: sidecar(
        "{'descr': '|u1', 'fortran_order': False, 'shape': (1125899906842624, 80), }"
    ),
    "of_objects": lambda: sidecar(
        "{'descr': '|O', 'fortran_order': False, 'shape': (1, 80), }", pickle.dumps([Payload()])
    ),
    "that_is_a_pickle": lambda: pickle.dumps(Payload()),
    "of_large_values": lambda: sidecar("{'descr': '|V2147483647', 'fortran_order': False, 'shape': (1, 80), }"),
    "that_is_a_zip_bomb": lambda: zip_of_zeros("arr_0.npy", 64 * MIB),
    "with_code_in_its_header": lambda: sidecar("__import__('os').abort()"),
    "of_a_deep_header": lambda: sidecar("(" * 20_000),
    "of_negative_rows": lambda: sidecar("{'descr': '|u1', 'fortran_order': False, 'shape': (-1, 80), }"),
    "empty": lambda: b"",
}


@pytest.mark.parametrize("case", ARRAYS)
def test_sidecar_that_is_another_array_is_refused(bounded, corpus, case):
    corpus.shards[0].members_path.write_bytes(ARRAYS[case]())
    write_entry(corpus, members_sha256=hashlib.sha256(ARRAYS[case]()).hexdigest())
    assert "members.npy" in bounded.refused(inspect_first, corpus.location, extra=FEW)


@pytest.mark.parametrize("case", ARRAYS)
def test_stored_log_mel_that_is_another_array_is_refused(bounded, tmp_path, case):
    index = logmel_corpus(tmp_path / "corpus", ARRAYS[case]() or b"x")
    bounded.refused(inspect_first, index.location, extra=FEW)
    assert "2000: " in bounded.done(verify_shards, index, False, extra=FEW)


def test_stored_log_mel_that_is_whole_is_read(bounded, tmp_path):
    content = encode_clip(noise(4000), LogMel(Features()))
    bounded.done(inspect_first, logmel_corpus(tmp_path / "corpus", content).location, extra=4 * FEW)


def logmel_corpus(root: Path, content: bytes) -> Index:
    """One clip of a stored log-mel with these bytes."""
    root.mkdir()
    path = root / "a.tar"
    path.write_bytes(member("2000.logmel.npy", content) + END)
    table = member_table([(512, len(content), 4000, 16000, "logmel", b"2000")])
    digest = write_members(path.with_suffix(".members.npy"), table)
    shard = Shard(path.name, 1, path.stat().st_size, file_sha256(path), digest, str(path))
    statistics = {"mean": -7.0, "std": 4.0, "mel_mean": (0.0,) * 80, "features": Features().front_end()}
    index = Index(str(root), "logmel", 16000, (shard,), 0.25, **statistics)
    write_index(index)
    return index


# ---- settings


def laughs(levels: int) -> str:
    """The billion laughs: each level names the one before nine times."""
    lines = ["a0: &a0 [" + "lol, " * 9 + "]"]
    lines += [f"a{n}: &a{n} [" + f"*a{n - 1}, " * 9 + "]" for n in range(1, levels)]
    return "\n".join(lines) + f"\ntrain: {{steps: *a{levels - 1}}}\n"


def merges(levels: int) -> str:
    """The same by merged mappings, which are written out as they are read."""
    return "\n".join(
        ["a0: &a0 {x: 1}"] + [f"a{n}: &a{n} {{<<: [" + f"*a{n - 1}, " * 9 + "]}" for n in range(1, levels)]
    )


YAMLS = {
    "billion_laughs": lambda: laughs(12),
    "million_laughs": lambda: laughs(7),
    "laughs_by_merging": lambda: merges(12),
    "long_text_named_often": lambda: "a: &a " + "x" * 10_000 + "\ntrain: {steps: [" + "*a, " * 1000 + "]}",
    "alias_of_itself": lambda: "train: &a {steps: *a}",
    "list_in_itself": lambda: "train: &a [*a]",
    "deep_lists": lambda: "train: " + "[" * 2000,
    "deep_sections": lambda: "".join(" " * n + f"a{n}:\n" for n in range(500)),
    "100_mb": lambda: "# " + "x" * 100 * MIB,
    "hexadecimal_of_10000_digits": lambda: "train: {steps: 0x" + "f" * 10_000 + "}",
    "decimal_of_10000_digits": lambda: "train: {steps: " + "9" * 10_000 + "}",
    "embed_dim_of_10_to_the_15": lambda: (
        "model: {embed_dim: 1000000000000000, depth: 1, num_heads: 7}\ntrain: {steps: 1}"
    ),
    "crop_of_10_to_the_15_frames": lambda: "data: {crop_frames: 1000000000000000}\ntrain: {steps: 1}",
    "filters_of_10_to_the_12": lambda: "features: {n_fft: 1000000000000, n_mels: 1000000000000}\ntrain: {steps: 1}",
    "steps_beyond_count": lambda: "train: {steps: 1" + "0" * 4000 + "}",
    "patch_of_5000_digits": lambda: "model: {patch_size: " + "9" * 5000 + "x" + "9" * 5000 + "}\ntrain: {steps: 1}",
    "python_object": lambda: "train: !!python/object/apply:os.system ['true']",
    "python_name": lambda: "train: !!python/name:os.system",
    "bad_date": lambda: "train: 2001-99-99",
    "bad_offset": lambda: "train: 2001-01-01T00:00:00+99:99",
    "unhashable_key": lambda: "? [a]\n: b",
    "two_documents": lambda: "a: 1\n---\nb: 2",
    "control_characters": lambda: "train: \x00",
}


@pytest.mark.parametrize("case", YAMLS)
def test_configuration_that_is_a_bomb_is_refused(bounded, tmp_path, case):
    path = tmp_path / "x.yaml"
    path.write_text(YAMLS[case]())
    text = bounded.refused(load_config, path, extra=FEW)
    assert str(path) in text and len(text) < 20_000


def test_settings_shared_by_an_alias_are_read(tmp_path):
    (tmp_path / "x.yaml").write_text("data: {block: &n 8}\ntrain: {steps: 1, micro_batch: *n}")
    assert load_config(tmp_path / "x.yaml").train.micro_batch == 8


@pytest.mark.parametrize("value", ["[" * 2000, "&a [*a]", "0x" + "f" * 10_000, "!!python/name:os.system", "{", "\x00"])
def test_override_that_is_a_bomb_is_refused(bounded, tmp_path, value):
    (tmp_path / "x.yaml").write_text("train: {steps: 1}")
    bounded.refused(load_config, tmp_path / "x.yaml", [f"train.log_every={value}"], extra=FEW)


@pytest.mark.parametrize("place", ["/dev/zero", "/dev/urandom", "\\0", "x" * 5000, "."])
def test_file_to_extend_that_is_none_is_refused(bounded, tmp_path, place):
    (tmp_path / "x.yaml").write_text(f'extends: "{place}"')
    bounded.refused(load_config, tmp_path / "x.yaml", extra=FEW)


def test_long_chain_of_files_is_refused(bounded, tmp_path):
    for number in range(100):
        (tmp_path / f"{number}.yaml").write_text(f"extends: {number + 1}.yaml")
    assert "extend one another" in bounded.refused(load_config, tmp_path / "0.yaml", extra=FEW)


# ---- weights


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> Path:
    model = Model(embed_dim=32, depth=2, num_heads=2, decoder_embed_dim=16, decoder_depth=1, decoder_num_heads=2)
    info = weights.WeightsInfo(model, Features(mean=-7.0, std=4.0), 208, {"run": "r", "step": 1})
    return weights.save(tmp_path_factory.mktemp("weights"), MaskedSpectrogramModel(model, 80, 208).state_dict(), info)


def claiming(exported: Path, folder: Path, **values) -> Path:
    """The same weights beside another config.json."""
    config = json.loads((exported / "config.json").read_text())
    for name, value in values.items():
        section, _, key = name.rpartition("__")
        (config[section] if section else config)[key] = value
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").write_bytes((exported / "model.safetensors").read_bytes())
    return folder


def nested(depth: int) -> dict:
    value: dict = {}
    for _ in range(depth):
        value = {"init_from": value}
    return value


CONFIGS = {
    "embed_dim": {"model__embed_dim": 10**9},
    "large_embed_dim": {"model__embed_dim": 2**16, "model__num_heads": 1},
    "depth": {"model__depth": 10**9},
    "large_depth": {"model__depth": 256},
    "heads": {"model__num_heads": 31},
    "patch": {"model__patch_size": "1x1"},
    "n_fft": {"features__n_fft": 10**12},
    "n_mels": {"features__n_mels": 10**12},
    "crop": {"crop_frames": 10**15},
    "long_crop": {"crop_frames": 2**20, "features__n_mels": 2**12},
    "no_crop": {"crop_frames": 0},
    "endless_crop": {"crop_frames": float("inf")},
    "digits": {"crop_frames": 10**4000},
    "deep_origin": {"origin": nested(500)},
    "no_section": {"model": []},
}


@pytest.mark.parametrize("case", CONFIGS)
def test_weights_that_ask_for_a_giant_are_refused(bounded, exported, tmp_path, case):
    folder = claiming(exported, tmp_path, **CONFIGS[case])
    assert str(folder) in bounded.refused(weights.load, folder, extra=2 * FEW)


def test_weights_that_are_whole_are_read(bounded, exported):
    bounded.done(load_encoder, exported, extra=4 * FEW)


def tensors_claiming(**entry) -> bytes:
    header = json.dumps({"x": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]} | entry}).encode()
    return struct.pack("<Q", len(header)) + header + bytes(4)


SAFETENSORS = {
    "header_of_2_to_the_60_bytes": struct.pack("<Q", 2**60) + b"{}",
    "header_of_2_to_the_64_bytes": struct.pack("<Q", 2**64 - 1) + b"{}",
    "header_of_90_mb": struct.pack("<Q", 90 * 10**6) + b"{}",
    "deep_header": struct.pack("<Q", 50_000) + b'{"a":' * 10_000,
    "shape_of_2_to_the_62": tensors_claiming(shape=[2**62]),
    "shape_that_overflows": tensors_claiming(shape=[2**33, 2**33]),
    "offsets_of_a_tb": tensors_claiming(data_offsets=[0, TB]),
    "offsets_backwards": tensors_claiming(data_offsets=[4, 0]),
    "unknown_dtype": tensors_claiming(dtype="O"),
    "dtype_that_torch_has_not": tensors_claiming(dtype="F4", shape=[8]),
    "e8m0": tensors_claiming(dtype="F8_E8M0", shape=[4]),
    "complex": tensors_claiming(dtype="C64", shape=[1], data_offsets=[0, 8]),
    "pickle": pickle.dumps(Payload()),
    "empty": b"",
}


@pytest.mark.parametrize("case", SAFETENSORS)
def test_tensors_that_claim_too_much_are_refused(bounded, exported, tmp_path, case):
    (tmp_path / "config.json").write_bytes((exported / "config.json").read_bytes())
    (tmp_path / "model.safetensors").write_bytes(SAFETENSORS[case])
    assert "model.safetensors" in bounded.refused(weights.load, tmp_path, extra=2 * FEW)


def saved(content: object, **options) -> bytes:
    file = io.BytesIO()
    torch.save(content, file, **options)
    return file.getvalue()


def deflated(content: bytes) -> bytes:
    """The same archive with its parts compressed."""
    file = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as source, zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as target:
        for name in source.namelist():
            target.writestr(name, source.read(name))
    return file.getvalue()


PUBLISHED = {
    "repeated_value": lambda: saved({"model": {"pos_embed": torch.zeros(1).expand(1, 2**40, 768)}}),
    "tensor_without_values": lambda: saved({"model": {"pos_embed": torch.empty(2**40, device="meta")}}),
    "sparse_tensor": lambda: saved({"model": {"pos_embed": torch.zeros(3, 3).to_sparse()}}),
    "zip_bomb": lambda: deflated(saved({"model": {"pos_embed": torch.zeros(2**24)}})),
    "code": lambda: saved({"model": {"x": Payload()}}),
    "code_of_old": lambda: saved({"model": {"x": Payload()}}, _use_new_zipfile_serialization=False),
    "bare_pickle": lambda: pickle.dumps(Payload()),
    "deep_pickle": lambda: b"\x80\x02" + b"(" * 100_000 + b".",
    "deep_list": lambda: b"\x80\x02" + b"]" * 50_000 + b"a" * 49_999 + b".",
    "text_of_4_gb": lambda: b"\x80\x02" + b"X" + struct.pack("<I", 2**32 - 1) + b"abc.",
    "memo_of_4_billion": lambda: b"\x80\x02]r\xff\xff\xff\xff.",
    "tar_of_old": lambda: member("pickle", pickle.dumps(Payload())) + member("storages", b"") + END,
    "empty": lambda: b"",
}


@pytest.mark.parametrize("case", PUBLISHED)
def test_published_checkpoint_that_claims_too_much_is_refused(bounded, tmp_path, case):
    path = tmp_path / "x.pth"
    path.write_bytes(PUBLISHED[case]())
    assert str(path) in bounded.refused(read_file, path, extra=2 * FEW, limit=2**31)


def test_published_checkpoint_that_repeats_statistics_is_refused(bounded, tmp_path):
    path = tmp_path / "x.pth"
    path.write_bytes(saved({"model": {"x": torch.zeros(3)}, "norm_stats": torch.zeros(1).expand(2**40)}))
    assert str(path) in bounded.refused(read_file, path, extra=2 * FEW)
