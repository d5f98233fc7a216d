"""Random damage to settings, weights, tasks, tables and records of runs, judged as shards are."""

import io
import json
import struct
from pathlib import Path

import matplotlib.font_manager  # noqa: F401 - makes its own folders before writes are watched
import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st

from msm_dist.compare import read_record
from msm_dist.config import load_config
from msm_dist.data import audioset
from msm_dist.data.claim import claimed
from msm_dist.evaluate.tasks import read_task
from msm_dist.model import weights
from msm_dist.model.published import convert, read_file, write_file
from tests.fuzzing import (
    DAMAGE,
    LEAVES,
    VALUES,
    altered,
    as_json,
    changed,
    fresh,
    fuzzing,
    survives,
)
from tests.hear_tasks import write_tones
from tests.labelled import new_model, write_sounds, write_weights


@pytest.fixture(scope="module")
def room(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("room")


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


# ---- weights


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
