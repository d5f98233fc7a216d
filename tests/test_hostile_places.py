"""What is no file in the place of a small one: devices and pipes, which may have no end, and sparse giants.

Every call runs in a child whose address space is limited and which is ended after a while.
"""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from msm_dist import settings
from msm_dist.config import Features, load_config
from msm_dist.data.audio import BadClip
from msm_dist.data.clips import quiet
from msm_dist.data.index import Index, load_index, members
from msm_dist.data.inspect import inspect_clip
from msm_dist.data.verify import verify_shards
from msm_dist.doctor.files import read_plain
from msm_dist.doctor.run import examine_run
from msm_dist.doctor.shards import examine_shards
from msm_dist.errors import ConfigError, DataError
from msm_dist.evaluate.classifier import Tagger
from msm_dist.evaluate.hear_folder import read_hear_folder
from msm_dist.evaluate.inputs import entries, find_inputs
from msm_dist.evaluate.recordings import read_audio
from msm_dist.files import open_regular, read_small
from msm_dist.model import weights
from msm_dist.traces import traces
from tests.hear_tasks import write_tones
from tests.hostile import FEW, inspect_first, open_run
from tests.labelled import write_weights
from tests.shards import noise_clips, write_corpus


def giant(path: Path) -> None:
    path.touch()
    os.truncate(path, 2**40)


PLACES: dict[str, tuple[Callable[[Path], None], str]] = {
    "device": (lambda path: path.symlink_to("/dev/zero"), "is a device, not a file"),
    "pipe": (os.mkfifo, "is a pipe, not a file"),
    "folder": (Path.mkdir, "is a folder, not a file"),
    "giant": (giant, "1099511627776 bytes, at most"),
}
places = pytest.mark.parametrize("place", PLACES)


def put(place: str, path: Path) -> str:
    """What the message is to say."""
    path.unlink()
    PLACES[place][0](path)
    return PLACES[place][1]


@pytest.fixture
def corpus(tmp_path) -> Index:
    return write_corpus(tmp_path / "corpus", noise_clips(4), 4)


def doctor(where: str, quick: bool) -> list[str]:
    return [f"{found.status} {found.detail}" for found in examine_shards(where, quick, 1, quiet)]


def doctor_of_run(folder: Path) -> list[str]:
    return [f"{found.status} {found.detail}" for found in examine_run(folder, True, quiet)]


@places
@pytest.mark.parametrize("call", [load_index, open_run])
def test_index_that_is_no_file_is_refused(bounded, corpus, place, call):
    said = put(place, corpus.root / "index.json")
    told = bounded.refused(call, corpus.location, extra=FEW)
    assert f"{corpus.root}/index.json: can't be read ({said}" in told


@places
def test_table_of_clips_that_is_no_file_is_refused(bounded, corpus, place):
    path = corpus.shards[0].members_path
    said = put(place, path)
    told = bounded.refused(inspect_first, corpus.location, extra=FEW)
    assert str(path) in told and said in told and "msm-dist data index" in told
    assert said in bounded.done(verify_shards, corpus, False, extra=FEW)


@places
@pytest.mark.parametrize("name", ["index.json", "noise-000000.members.npy"])
def test_doctor_says_of_a_corpus_what_is_no_file(bounded, corpus, place, name):
    said = put(place, corpus.root / name)
    for quick in (False, True):
        told = bounded.done(doctor, corpus.location, quick, extra=2 * FEW)
        assert "fail " in told and said in told


@places
def test_doctor_says_of_a_run_that_its_index_is_no_file(bounded, corpus, tmp_path, place):
    said = put(place, corpus.root / "index.json")
    folder = tmp_path / "run"
    folder.mkdir()
    cfg = {"data": {"shards": corpus.location}, "train": {"steps": 4}, "features": {"mean": -7.0, "std": 4.0}}
    (folder / "config.yaml").write_text(yaml.safe_dump(cfg))
    assert said in bounded.done(doctor_of_run, folder, extra=4 * FEW)


def inspect_in_vain(index: Index, out: Path) -> None:
    row = members(index.shards[0])[0]
    put("pipe", index.shards[0].path)
    inspect_clip(index, (index.shards[0], row), out)


def test_shard_that_is_a_pipe_is_refused(bounded, corpus, tmp_path):
    assert "is a pipe, not a file" in bounded.refused(inspect_in_vain, corpus, tmp_path / "out", extra=FEW)


@places
def test_configuration_of_weights_that_is_no_file_is_refused(bounded, tmp_path, place):
    folder = write_weights(tmp_path / "weights")
    said = put(place, folder / "config.json")
    assert f"{folder}/config.json: can't be read ({said}" in bounded.refused(weights.load, folder, extra=2 * FEW)


@pytest.mark.parametrize("place", ["device", "pipe", "folder"])
def test_tensors_that_are_no_file_are_refused(bounded, tmp_path, place):
    folder = write_weights(tmp_path / "weights")
    said = put(place, folder / "model.safetensors")
    told = bounded.refused(weights.load, folder, extra=2 * FEW)
    assert f"{folder}/model.safetensors: not readable weights ({said})" in told


@places
def test_description_of_a_classifier_that_is_no_file_is_refused(bounded, tmp_path, place):
    path = tmp_path / "head.json"
    path.touch()
    said = put(place, path)
    # It is looked for among files.
    wanted = f"{path}: can't be read ({said}" if place == "giant" else f"{tmp_path}: no fine-tuned classifier"
    assert wanted in bounded.refused(Tagger.load, tmp_path, extra=2 * FEW)


@places
@pytest.mark.parametrize("name", ["task_metadata.json", "train.json"])
def test_task_that_is_no_file_is_refused(bounded, tmp_path, place, name):
    folder = write_tones(tmp_path / "task", 2, 2, 2)
    said = put(place, folder / name)
    told = bounded.refused(read_hear_folder, folder, 16000, extra=2 * FEW)
    assert f"{folder / name}: can't be read ({said}" in told


@pytest.mark.parametrize("place", ["device", "pipe"])
def test_audio_that_is_no_file_is_refused(bounded, tmp_path, place):
    path = tmp_path / "clip.wav"
    path.touch()
    said = put(place, path)
    assert f"{path}: can't be read as audio: {said}; replace it" in bounded.refused(read_audio, path, extra=2 * FEW)
    told = bounded.done(embedded, tmp_path, extra=2 * FEW)
    assert f"{path}: unreadable ({said})" in told


def embedded(folder: Path) -> list[str]:
    told = []
    for entry in entries(find_inputs([str(folder)], Features()), Features(), 16):
        try:
            entry.load()
        except BadClip as error:
            told.append(f"{entry.key}: {error}")
    return told


@places
def test_record_of_a_run_that_is_no_file_counts_as_missing(bounded, tmp_path, place):
    (tmp_path / "lock.json").touch()
    put(place, tmp_path / "lock.json")
    assert "owner_number=None" in bounded.done(traces, tmp_path, 0.0, extra=FEW)
    bounded.refused(read_plain, tmp_path / "lock.json", extra=FEW)


def test_what_a_link_leads_to_is_read_unless_it_is_not_to_be_followed(tmp_path):
    path = tmp_path / "link"
    path.symlink_to(tmp_path / "file")
    (tmp_path / "file").write_bytes(b"abc")
    assert read_small(path, 3) == b"abc"
    with pytest.raises(OSError, match="3 bytes, at most 2 are read"):
        read_small(path, 2)
    with pytest.raises(OSError, match="is a link, not a file"):
        open_regular(path, follow=False)
    with pytest.raises(DataError, match="is a link to"):
        read_plain(path)


def test_file_that_claims_no_size_is_read_to_its_end():
    path = Path("/proc/self/environ")
    assert path.stat().st_size == 0
    content = path.read_bytes()
    assert read_small(path, len(content)) == content
    with pytest.raises(OSError, match=f"at most {len(content) - 1} are read"):
        read_small(path, len(content) - 1)


# ---- a configuration may come through a pipe, as long as somebody writes


def test_configuration_is_read_from_a_pipe():
    reading, writing = os.pipe()
    os.write(writing, b"run: {name: piped}\n")
    os.close(writing)
    try:
        assert load_config(Path(f"/dev/fd/{reading}"), ["data.shards=x", "train.steps=1"]).run.name == "piped"
    finally:
        os.close(reading)


def test_configuration_from_a_pipe_that_nobody_writes_to_is_refused(bounded, tmp_path):
    path = tmp_path / "run.yaml"
    os.mkfifo(path)
    # Waits without a bound would be ended with the child.
    assert "a pipe to which nobody has written" in bounded.refused(wait_for, path, extra=FEW)


def wait_for(path: Path) -> None:
    settings.PATIENCE_SECONDS = 0.1
    load_config(path)


def test_configuration_that_has_no_end_is_refused():
    with pytest.raises(ConfigError, match="at most 1048576 are read"):
        load_config(Path("/dev/zero"))
