"""Random damage to everything that may come from strangers: only named errors come out, no code runs, nothing is
written outside the target folder, and memory stays bounded.

The examples are the same at every run. More of them, drawn anew: HYPOTHESIS_PROFILE=fuzz pytest tests/test_hostile_*
"""

import hashlib
import io
import json
import os
import resource
import shutil
import struct
import sys
import tarfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib.font_manager  # noqa: F401 - makes its own folders before writes are watched
import numpy as np
import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from msm_dist.compare import read_record
from msm_dist.config import Features, load_config
from msm_dist.data import audioset, media
from msm_dist.data.audio import Packed, decode_crop, probe
from msm_dist.data.claim import claimed
from msm_dist.data.contents import stored_clips
from msm_dist.data.crops import CropReader, Source
from msm_dist.data.index import load_index, members, write_members
from msm_dist.data.inspect import list_clips, summarize
from msm_dist.data.logmel import encode_clip, stored_codes
from msm_dist.data.plan import make_plan
from msm_dist.data.tar_members import tar_members
from msm_dist.data.verify import verify_shards
from msm_dist.engine.stored import COMPLETE, newest_complete, open_checkpoint, read_masters
from msm_dist.errors import MsmError
from msm_dist.evaluate.tasks import read_task
from msm_dist.features import LogMel
from msm_dist.model import weights
from msm_dist.model.published import convert, read_file, write_file
from tests.audio_files import encode, noise
from tests.hear_tasks import write_tones
from tests.hostile import MIB, index_tar, inspect_first, open_run
from tests.labelled import new_model, write_sounds, write_weights
from tests.shards import noise_clips, write_corpus

MANY = os.environ.get("HYPOTHESIS_PROFILE") == "fuzz"
MEMORY = 1024 * MIB
"""What the whole process may take beside what it has."""


def fuzzing(examples: int) -> settings:
    return settings(
        max_examples=examples * (50 if MANY else 1),
        derandomize=not MANY,
        database=None,
        deadline=None,
        print_blob=True,
        suppress_health_check=list(HealthCheck),
    )


# ---- what is watched

RUNS_CODE = {"os.system", "os.exec", "os.posix_spawn", "os.spawn", "subprocess.Popen", "pty.spawn", "pickle.find_class"}
WRITES = {"os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "os.chmod", "os.truncate"}
CONNECTS = {"socket.connect", "socket.bind", "urllib.Request"}
watched: dict[str, Any] = {"folder": None, "seen": []}


def hook(event: str, args: tuple) -> None:
    """Note what an input must not make us do; Python tells its audit hooks of each."""
    folder = watched["folder"]
    if folder is None:
        return
    if event in RUNS_CODE | CONNECTS:
        watched["seen"].append((event, args[:2]))
        return
    is_write = event in WRITES or (event == "open" and isinstance(args[1], str) and set(args[1]) & set("wax+"))
    if is_write and isinstance(args[0], str | bytes | os.PathLike) and not is_below(os.fsdecode(args[0]), folder):
        watched["seen"].append((event, args[:2]))


def is_below(path: str, folder: str) -> bool:
    return os.path.realpath(path).startswith((folder + os.sep, "/dev/", "/proc/")) or os.path.realpath(path) == folder


sys.addaudithook(hook)


@contextmanager
def watching(folder: Path) -> Iterator[None]:
    limit = resource.getrlimit(resource.RLIMIT_AS)
    with open("/proc/self/statm") as file:
        size = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, limit[1]))
    watched.update(folder=os.path.realpath(folder), seen=[])
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        watched["folder"] = None
        resource.setrlimit(resource.RLIMIT_AS, limit)
    assert not watched["seen"]


def survives(folder: Path, *actions: Callable[[], Any]) -> bool:
    """Whether all actions go through; a named error that a terminal can show is as good, anything else is not."""
    whole = True
    with watching(folder):
        for action in actions:
            try:
                action()
            except MsmError as error:
                whole = False
                text = str(error)
                assert text and "\x1b" not in text and "\0" not in text, text
                assert len(text) < 100_000
    return whole


@pytest.fixture(scope="module")
def room(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("room")


def fresh(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


# ---- how it is damaged

NUMBERS = [0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 2**63 - 1, 2**63, 2**64 - 1]
CHANGES = st.one_of(
    st.tuples(st.just("bit"), st.floats(0, 1), st.integers(0, 7)),
    st.tuples(st.just("byte"), st.floats(0, 1), st.sampled_from(NUMBERS)),
    st.tuples(st.just("word"), st.floats(0, 1), st.sampled_from(NUMBERS)),
    st.tuples(st.just("big word"), st.floats(0, 1), st.sampled_from(NUMBERS)),
    st.tuples(st.just("cut"), st.floats(0, 1), st.integers(1, 64)),
    st.tuples(st.just("insert"), st.floats(0, 1), st.binary(min_size=1, max_size=40)),
    st.tuples(st.just("repeat"), st.floats(0, 1), st.integers(1, 600)),
    st.tuples(st.just("end"), st.floats(0, 1), st.just(0)),
)


def changed(content: bytes, changes: list[tuple[str, float, Any]], reach: int | None = None) -> bytes:
    """Content with damage, at places in its first `reach` bytes."""
    content = bytearray(content)
    for kind, where, value in changes:
        place = int(where * min(len(content), reach or len(content)))
        if kind == "bit" and place < len(content):
            content[place] ^= 1 << value
        elif kind == "byte":
            content[place : place + 1] = bytes([value & 0xFF])
        elif kind in ("word", "big word"):
            width = 8 if value > 2**32 else 4
            content[place : place + width] = value.to_bytes(8, "little" if kind == "word" else "big")[:width]
        elif kind == "cut":
            del content[place : place + value]
        elif kind == "insert":
            content[place:place] = value
        elif kind == "repeat":
            content[place:place] = content[place : place + value]
        elif kind == "end":
            del content[place:]
    return bytes(content)


DAMAGE = st.lists(CHANGES, min_size=1, max_size=4)
LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.sampled_from([0, -1, 2**31, 2**40, 2**53, 2**63, 10**30, 10**400, float("nan"), float("inf"), -0.0, 1e308]),
    st.floats(),
    st.text(max_size=12),
    st.sampled_from(
        ["", "..", "../x", "/etc/passwd", "a\0b", "\x1b[2J", "x" * 5000, "1e999", "0x" + "f" * 5000, "\ud800"]
    ),
)
VALUES = st.recursive(
    LEAVES, lambda part: st.lists(part, max_size=3) | st.dictionaries(st.text(max_size=6), part, max_size=3)
)


def places(value: Any, path: tuple = ()) -> list[tuple]:
    """Where in nested values something stands."""
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, child in children for place in places(child, (*path, key)))]


@st.composite
def altered(draw, value: Any) -> Any:
    """Nested values with one to three of them replaced, left out or added."""
    value = json.loads(json.dumps(value))
    for _ in range(draw(st.integers(1, 3))):
        path = draw(st.sampled_from(places(value)))
        new = draw(VALUES)
        if not path:
            if draw(st.integers(0, 19)) == 0:
                return new
            continue
        part = value
        for key in path[:-1]:
            part = part[key]
        action = draw(st.sampled_from(["replace", "replace", "replace", "drop", "rename"]))
        if action == "replace" or isinstance(part, list):
            part[path[-1]] = new
        elif action == "drop":
            del part[path[-1]]
        else:
            part[draw(st.text(max_size=8))] = part.pop(path[-1])
    return value


def as_json(value: Any) -> bytes:
    return json.dumps(value).encode()


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


# ---- settings

CONFIG = {
    "run": {"name": "x", "dir": "runs"},
    "seed": 1,
    "data": {"shards": ["a.tar"], "mix": None, "lanes": 8, "block": 8, "crop_frames": 208},
    "features": {"n_fft": 400, "mean": -7.0, "std": 4.0},
    "model": {"size": "tiny", "patch_size": "16x16", "mask_ratio": 0.75},
    "optim": {"betas": [0.9, 0.95], "lr": 1e-3, "warmup_epochs": 1.0},
    "train": {"epochs": 2.5, "global_batch": 512, "micro_batch": 64, "profile": "20:25", "init_from": None},
    "engine": {"zero_stage": 1},
    "probe": {"every": 5, "data": ["a.csv"]},
}
YAML = yaml.safe_dump(CONFIG)


@given(data=st.data())
@fuzzing(200)
def test_altered_settings(room, data):
    path = room / "x.yaml"
    path.write_text(json.dumps(data.draw(altered(CONFIG))))
    survives(room, lambda: load_config(path))


TOKENS = [
    "&a ",
    "*a",
    "<<: ",
    "!!python/name:os.system ",
    "!!int ",
    "!!timestamp ",
    "!!binary ",
    "? ",
    "- ",
    "{",
    "[",
    "|\n",
    "#",
    "%",
]
TOKENS += [
    "extends: x.yaml\n",
    "extends: /dev/null\n",
    "---\n",
    "\t",
    "1:2:3",
    "0x_",
    "2001-02-30",
    "~",
    "'",
    '"',
    ": ",
    "\x85",
    "\ufeff",
]


@given(st.lists(st.tuples(st.floats(0, 1), st.sampled_from(TOKENS)), max_size=4), DAMAGE | st.just([]))
@fuzzing(200)
def test_damaged_yaml(room, tokens, damage):
    path = room / "x.yaml"
    text = YAML
    for where, token in tokens:
        place = int(where * len(text))
        text = text[:place] + token + text[place:]
    path.write_bytes(changed(text.encode(), damage))
    survives(room, lambda: load_config(path))


@given(
    st.lists(
        st.text(max_size=30)
        | st.builds("{}={}".format, st.sampled_from(["train.steps", "seed", "data.mix", "a.b.c", "run"]), LEAVES)
    )
)
@fuzzing(150)
def test_overrides(room, overrides):
    path = room / "y.yaml"
    path.write_text(YAML)
    survives(room, lambda: load_config(path, overrides))


# ---- weights and checkpoints


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> Path:
    return write_weights(tmp_path_factory.mktemp("weights"))


@given(data=st.data())
@fuzzing(60)
def test_altered_weights(room, exported, data):
    folder = fresh(room / "weights")
    (folder / "model.safetensors").symlink_to(exported / "model.safetensors")
    config = json.loads((exported / "config.json").read_text())
    (folder / "config.json").write_bytes(as_json(data.draw(altered(config))))
    survives(room, lambda: weights.load(folder))


@given(data=st.data())
@fuzzing(60)
def test_altered_header_of_tensors(room, exported, data):
    folder = fresh(room / "weights")
    (folder / "config.json").symlink_to(exported / "config.json")
    content = (exported / "model.safetensors").read_bytes()
    (size,) = struct.unpack("<Q", content[:8])
    header = as_json(data.draw(altered(json.loads(content[8 : 8 + size]))))
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + content[8 + size :])
    survives(room, lambda: weights.load(folder))


@given(DAMAGE, st.sampled_from([9, 500, None]))
@fuzzing(60)
def test_damaged_tensors(room, exported, damage, reach):
    folder = fresh(room / "weights")
    (folder / "config.json").symlink_to(exported / "config.json")
    content = (exported / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(changed(content, damage, reach))
    survives(room, lambda: weights.load(folder))


@pytest.fixture(scope="module")
def published(tmp_path_factory) -> list[bytes]:
    """A small published checkpoint in torch's archive, and in the older format, which is one pickle."""
    path = tmp_path_factory.mktemp("published") / "x.pth"
    write_file(new_model(), -7.0, 4.0, path)
    file = io.BytesIO()
    content = {"model": {"pos_embed": torch.zeros(1, 5, 8), "norm_stats": torch.tensor([-7.0, 4.0])}, "epoch": 3}
    torch.save(content, file, _use_new_zipfile_serialization=False)
    return [path.read_bytes(), file.getvalue()]


@given(st.integers(0, 1), DAMAGE, st.sampled_from([1500, None]))
@fuzzing(150)
def test_damaged_published_checkpoint(room, published, which, damage, reach):
    path = fresh(room / "published") / "x.pth"
    path.write_bytes(changed(published[which], damage, reach))
    survives(room, lambda: convert(read_file(path).state, strict=False))


@given(data=st.data())
@fuzzing(80)
def test_altered_checkpoint_with_true_digests(room, exported, data):
    folder = fresh(room / "run") / "step-00000007"
    folder.mkdir()
    name = "state-00000-of-00001.safetensors"
    content = (exported / "model.safetensors").read_bytes()
    (folder / name).write_bytes(content)
    meta = {"format": 1, "step": 7, "cursor": 56, "loss_scale": None, "world_size": 1, "corpus": [{"name": "x"}]}
    meta["files"] = {name: {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}}
    text = as_json(data.draw(altered(meta)))
    (folder / "meta.json").write_bytes(text)
    (folder / COMPLETE).write_text(hashlib.sha256(text).hexdigest())
    survives(room, lambda: newest_complete(room / "run"), lambda: read_masters(open_checkpoint(folder)))


# ---- tasks, tables, records


@pytest.fixture(scope="module")
def hear(tmp_path_factory) -> Path:
    return write_tones(tmp_path_factory.mktemp("hear") / "task", 4, 2, 2)


@given(st.sampled_from(["task_metadata.json", "train.json", "test.json"]), st.data())
@fuzzing(80)
def test_altered_hear_folder(room, hear, name, data):
    folder = fresh(room / "hear")
    for path in hear.iterdir():
        (folder / path.name).symlink_to(path)
    (folder / name).unlink()
    (folder / name).write_bytes(as_json(data.draw(altered(json.loads((hear / name).read_text())))))
    survives(room, lambda: read_task(folder))


@pytest.fixture(scope="module")
def table(tmp_path_factory) -> Path:
    return write_sounds(tmp_path_factory.mktemp("sounds"), 4, 2, 2)


CELLS = [
    "\0",
    '"',
    ",",
    "\n",
    "\r",
    "../../etc/passwd",
    "\u0663",
    "9" * 5000,
    "x" * 200_000,
    ";",
    "|",
    "\x1b[2J",
    "\ufeff",
    "train0.wav",
]


@given(st.lists(st.tuples(st.floats(0, 1), st.sampled_from(CELLS)), max_size=3), DAMAGE | st.just([]), st.booleans())
@fuzzing(120)
def test_damaged_table_of_clips(room, table, cells, damage, folds):
    text = table.read_text()
    text = text.replace("split", "fold") if folds else text
    for where, cell in cells:
        place = int(where * len(text))
        text = text[:place] + cell + text[place:]
    path = fresh(room / "table") / "x.csv"
    path.write_bytes(changed(text.encode(), damage))
    survives(room, lambda: read_task(path, table.parent))


SEGMENTS = b"# YTID, start_seconds, end_seconds, positive_labels\n"
SEGMENTS += b'--PJHxphWEs, 30.000, 40.000, "/m/09x0r,/t/dd00088"\n'
CLASSES = b'index,mid,display_name\n0,/m/09x0r,"Speech"\n1,/t/dd00088,"Gush"\n'


@given(st.lists(st.tuples(st.floats(0, 1), st.sampled_from(CELLS)), max_size=3), DAMAGE | st.just([]))
@fuzzing(80)
def test_damaged_tables_of_audioset(room, cells, damage):
    folder = fresh(room / "audioset")
    for name, content in (("x_segments.csv", SEGMENTS), ("classes.csv", CLASSES)):
        for where, cell in cells:
            place = int(where * len(content))
            content = content[:place] + cell.encode() + content[place:]
        (folder / name).write_bytes(changed(content, damage))
    survives(
        room,
        lambda: audioset.read_tables([folder / "x_segments.csv"], None, False),
        lambda: audioset.read_class_names(folder / "classes.csv"),
    )


RECORD = {
    "metrics.jsonl": [
        {"step": 1, "loss": 1.5, "clips_per_second": 3.0},
        {"step": 2, "loss": 1.25},
        {"step": 2, "valid_loss": 1.0},
    ],
    "environment.json": {"versions": {"torch": "2"}, "device": "CPU", "world_size": 1},
}


@given(st.sampled_from(sorted(RECORD)), st.data(), DAMAGE | st.just([]))
@fuzzing(80)
def test_altered_record_of_a_run(room, name, data, damage):
    folder = fresh(room / "record")
    (folder / "config.yaml").write_text(yaml.safe_dump({"train": {"steps": 2}}))
    content = RECORD | {name: data.draw(altered(RECORD[name]))}
    lines = content["metrics.jsonl"] if isinstance(content["metrics.jsonl"], list) else [content["metrics.jsonl"]]
    (folder / "metrics.jsonl").write_bytes(changed(b"".join(as_json(line) + b"\n" for line in lines), damage))
    (folder / "environment.json").write_bytes(as_json(content["environment.json"]))
    survives(room, lambda: read_record(folder))


def claim(folder: Path) -> None:
    with claimed(folder, {"a": 1}):
        pass


@given(VALUES, DAMAGE | st.just([]), st.booleans())
@fuzzing(60)
def test_altered_claim(room, value, damage, deep):
    folder = fresh(room / "claim")
    text = b"[" * 100_000 if deep else changed(as_json(value), damage)
    (folder / "pack.json").write_bytes(text)
    survives(room, lambda: claim(folder))
