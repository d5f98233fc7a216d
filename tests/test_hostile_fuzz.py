"""Random damage to shards and what lies beside them: only named errors come out, no code runs, nothing is written
elsewhere, and memory stays bounded (tests/fuzzing.py).
"""

import io
import json
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib.font_manager  # noqa: F401 - makes its own folders before writes are watched
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from msm_dist.config import Features
from msm_dist.data import media
from msm_dist.data.audio import Packed, decode_crop, probe
from msm_dist.data.contents import stored_clips
from msm_dist.data.crops import CropReader, Source
from msm_dist.data.index import load_index, members, write_members
from msm_dist.data.inspect import list_clips, summarize
from msm_dist.data.logmel import encode_clip, stored_codes
from msm_dist.data.plan import make_plan
from msm_dist.data.tar_members import tar_members
from msm_dist.data.verify import verify_shards
from msm_dist.features import LogMel
from tests.audio_files import encode, noise
from tests.fuzzing import DAMAGE, altered, as_json, changed, fresh, fuzzing, survives
from tests.hostile import index_tar, inspect_first, open_run
from tests.shards import noise_clips, write_corpus


@pytest.fixture(scope="module")
def room(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("room")


# ---- sound

SOUND = noise(4000)
SOUNDS = {codec: encode(SOUND, codec) for codec in ("flac", "wav", "float.wav", "ogg", "opus", "mp3", "flac24")}


@given(st.sampled_from(sorted(SOUNDS)), DAMAGE, st.sampled_from([60, 400, None]), st.integers(-50, 4000))
@fuzzing(250)
def test_damaged_sound(room, codec, damage, reach, start):
    content = changed(SOUNDS[codec], damage, reach)
    info = probe(SOUNDS[codec])
    packed = Packed(info.samples, info.sample_rate, info.format)
    survives(
        room,
        lambda: media.probe(content),
        lambda: media.decode_span(content, 0, media.probe(content).samples, 16000),
        lambda: sum(map(len, media.decode_blocks(io.BytesIO(content)))),
        lambda: decode_crop(content, start, start + 500, info.samples, 16000, packed),
        lambda: decode_crop(content, start, start + 500, info.samples, 22050),
    )


@given(
    st.binary(max_size=200),
    st.sampled_from([b"RIFF", b"fLaC", b"OggS", b"ID3", b"\xff\xfb", b"FORM", b".snd", b"caff", b""]),
)
@fuzzing(60)
def test_noise_for_sound(room, content, magic):
    survives(room, lambda: media.probe(magic + content), lambda: media.decode_span(magic + content, 0, 9, 16000))


# ---- tars


def tar_of(form: int) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=form) as tar:
        for name, content in (
            ("first.flac", SOUNDS["flac"]),
            ("first.json", b'{"labels": ["a"], "origin": {"start_seconds": 1}}'),
            ("long/" * 40 + "second.wav", SOUNDS["wav"]),
            ("\u00e9third.txt", b"text"),
        ):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            member.pax_headers = {"comment": "x"} if form == tarfile.PAX_FORMAT else {}
            tar.addfile(member, io.BytesIO(content))
    return file.getvalue()


TARS = [tar_of(form) for form in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)]
NAMES = [
    "../x.flac",
    "/etc/x.flac",
    "a/../../x.flac",
    "x.flac/",
    "",
    ".",
    "\udcff.flac",
    "\x1b[2J.flac",
    "first.flac",
    "C:x.flac",
]
TYPES = [tarfile.REGTYPE, tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE, tarfile.CONTTYPE]
TYPES += [tarfile.GNUTYPE_SPARSE, tarfile.XGLTYPE, tarfile.DIRTYPE, b"Z"]


@given(st.sampled_from(TARS), DAMAGE, st.sampled_from([512, 2048, None]))
@fuzzing(200)
def test_damaged_tar_is_walked(room, content, damage, reach):
    path = fresh(room / "tar") / "x.tar"
    path.write_bytes(changed(content, damage, reach))
    survives(room, lambda: sum(1 for _ in tar_members(path)))


@given(
    st.sampled_from(TARS), st.lists(st.tuples(st.integers(0, 8), st.integers(0, 511), st.integers(0, 255)), min_size=1)
)
@fuzzing(100)
def test_damaged_header_with_a_true_checksum_is_walked(room, content, edits):
    content = bytearray(content)
    for block, place, value in edits:
        start = 512 * block
        content[start + place] = value
        content[start + 148 : start + 156] = b" " * 8
        content[start + 148 : start + 156] = b"%06o\0 " % sum(content[start : start + 512])
    path = fresh(room / "tar") / "x.tar"
    path.write_bytes(content)
    survives(room, lambda: sum(1 for _ in tar_members(path)))


@given(
    st.lists(
        st.tuples(
            st.sampled_from(NAMES), st.sampled_from(TYPES), st.sampled_from(sorted(SOUNDS)), st.sampled_from(NAMES)
        ),
        min_size=1,
        max_size=4,
    ),
    DAMAGE | st.just([]),
)
@fuzzing(30)
def test_foreign_tar_is_indexed_or_refused(room, entries, damage):
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name, kind, codec, target in entries:
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, target
            member.size = len(SOUNDS[codec]) if kind in tarfile.REGULAR_TYPES else 0
            tar.addfile(member, io.BytesIO(SOUNDS[codec]))
    folder = fresh(room / "tar")
    (folder / "x.tar").write_bytes(changed(file.getvalue(), damage))

    def look() -> None:
        index = load_index(str(folder))
        list(summarize(index))
        list(list_clips(index.shards[0]))
        list(stored_clips(index.shards[0]))
        verify_shards(index, False)
        inspect_first(str(folder))

    survives(folder, lambda: index_tar(folder / "x.tar")) and survives(folder, look)


# ---- index.json, sidecars, stored log-mels, a clip's json


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("corpus")
    index = write_corpus(root, noise_clips(70, longest=2000), 35)
    content = json.loads((root / "index.json").read_text())
    content |= {"mean": -7.0, "std": 4.0, "mel_mean": [0.5] * 80, "features": Features().front_end()}
    content["official"] = {"tables": ["t"], "clips": 90, "found": 70, "manifest": "0" * 64}
    (root / "index.json").write_text(json.dumps(content))
    for use in uses(root):  # whole, it is fit for all of them; what they import is there from now on
        use()
    assert index.num_clips == 70
    return root


def uses(root: Path) -> list[Callable[[], Any]]:
    """What commands and runs do with a corpus."""

    def crops() -> None:
        index = load_index(str(root))
        plan = make_plan([shard.clips for shard in index.shards], 0, None, 4, 16, 1)
        reader = CropReader(Source(plan, index, Features(), 16, frozenset()))
        reader.blocks(range(2))

    return [
        lambda: [list(summarize(load_index(str(root))))],
        lambda: [list(list_clips(shard)) for shard in load_index(str(root)).shards],
        lambda: open_run(str(root)),
        lambda: inspect_first(str(root)),
        crops,
    ]


@given(data=st.data())
@fuzzing(80)
def test_altered_index(room, corpus, data):
    root = fresh(room / "index")
    for path in corpus.iterdir():
        if path.suffix in (".tar", ".npy"):
            (root / path.name).symlink_to(path)
    content = json.loads((corpus / "index.json").read_text())
    content["mel_mean"] = [0.5] * 80
    (root / "index.json").write_bytes(as_json(data.draw(altered(content))))
    survives(room, *uses(root))


@given(DAMAGE)
@fuzzing(60)
def test_damaged_index(room, corpus, damage):
    root = fresh(room / "index")
    (root / "index.json").write_bytes(changed((corpus / "index.json").read_bytes(), damage))
    survives(room, *uses(root))


FIELDS = st.sampled_from(["offset", "size", "samples", "rate"])
SIGNED = st.sampled_from([0, 1, -1, 16, 4000, 16000, 10**6, 2**31 - 1, -(2**31), 2**39, 2**40, 2**62, -(2**63)])


@given(
    st.lists(st.tuples(FIELDS, st.integers(0, 3), SIGNED | st.integers(0, 40_000)), max_size=4), st.binary(max_size=8)
)
@fuzzing(80)
def test_altered_sidecar_with_a_true_digest(room, corpus, edits, codec):
    root = fresh(room / "sidecar")
    shutil.copytree(corpus, root, dirs_exist_ok=True)
    shard = load_index(str(root)).shards[0]
    table = members(shard).copy()
    for field, row, value in edits:
        table[field][row] = np.int64(value).astype(table[field].dtype)
    table["format"][0] = codec or b"flac"
    table["key"][1] = codec or b"k"
    content = json.loads((root / "index.json").read_text())
    content["shards"][0]["members_sha256"] = write_members(shard.members_path, table)
    (root / "index.json").write_text(json.dumps(content))
    survives(room, *uses(root), lambda: verify_shards(load_index(str(root)), True))


LOGMEL = encode_clip(SOUND, LogMel(Features()))


@given(DAMAGE, st.sampled_from([130, None]))
@fuzzing(150)
def test_damaged_log_mel(damage, reach):
    try:
        codes = stored_codes(changed(LOGMEL, damage, reach))
    except ValueError:
        return
    assert codes.dtype == np.uint8 and codes.ndim == 2
