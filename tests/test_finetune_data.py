"""Labelled batches: the same clips at any world size and worker count, cut, mixed and masked as drawn."""

import contextlib
from dataclasses import replace

import numpy as np
import pytest
import soundfile
import torch

from msm_dist.data.stream import start_loader
from msm_dist.errors import ConfigError, DataError
from msm_dist.evaluate.augment import Order
from msm_dist.evaluate.finetune_config import Augment, FinetuneData, FinetuneTrain, batch_layout
from msm_dist.evaluate.finetune_data import (
    Cut,
    JudgedClips,
    TrainingClips,
    num_batches,
    open_task,
    positions_of,
    spread,
)
from tests.labelled import RATE, write_sounds
from tests.test_tasks import write_shard

LENGTH = 9600
CUT = Cut(RATE, LENGTH, 3, (80, 64), (5, 4))
PLAIN = Augment(mixup=0)
ALL = Augment(mixup=0.5, frequency_mask=8, time_mask=8, frequency_drop=0.2, time_drop=0.25)
TRAIN = FinetuneTrain(steps=1, global_batch=12, micro_batch=3)


@pytest.fixture(scope="module")
def labelled(tmp_path_factory):
    task = write_sounds(tmp_path_factory.mktemp("sounds"))
    return open_task(FinetuneData(task=str(task), seconds=0.6), RATE)


def batches(labelled, augment, world_size=1, rank=0, micro_batch=3, start_step=0):
    clips = labelled.clips(labelled.parts.train)
    layout = batch_layout(TRAIN.model_copy(update={"micro_batch": micro_batch}), world_size)
    order = Order(len(clips), seed=0)
    return TrainingClips(clips, order, CUT, augment, layout, rank, start_step)


def rows(found):
    """Each clip of batches by its place in the run."""
    return {
        int(place): (batch.waveforms[row], batch.targets[row], batch.masks[row], batch.ids_keep[row])
        for batch in found
        for row, place in enumerate(batch.places)
    }


def test_world_size_and_micro_batch_do_not_change_a_clip(labelled):
    alone = rows(batch for batch, _ in zip(batches(labelled, ALL), range(8), strict=False))
    shared = {}
    for rank in range(2):
        found = batches(labelled, ALL, world_size=2, rank=rank, micro_batch=6)
        shared |= rows(batch for batch, _ in zip(found, range(2), strict=False))
    assert sorted(alone) == sorted(shared) == list(range(24))
    for place, parts in alone.items():
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(parts, shared[place], strict=True))


def test_loader_processes_and_a_later_start_do_not_change_the_batches(labelled):
    expected = [batch for batch, _ in zip(batches(labelled, ALL), range(10), strict=False)][4:]
    with contextlib.closing(start_loader(batches(labelled, ALL, start_step=1), 2)) as loader:
        for mine in expected:
            theirs = next(loader)
            assert torch.equal(mine.waveforms, theirs.waveforms)
            assert torch.equal(mine.places, theirs.places)
            assert torch.equal(mine.ids_keep, theirs.ids_keep)
            assert mine.keys == theirs.keys


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_a_step_takes_the_same_draws_at_any_world_size(world_size):
    layout = batch_layout(TRAIN.model_copy(update={"micro_batch": 2}), world_size)
    for step in (0, 3):
        taken = [
            positions_of(step * layout.accumulation + turn, rank, layout)
            for turn in range(layout.accumulation)
            for rank in range(world_size)
        ]
        assert np.concatenate(taken).tolist() == list(range(12 * step, 12 * step + 12))


def test_labels_are_those_of_the_clips(labelled):
    batch = next(iter(batches(labelled, PLAIN)))
    of = {clip.key: clip.labels[0] for clip in labelled.task.clips}
    assert batch.targets.argmax(1).tolist() == [of[key] for key in batch.keys]
    assert batch.targets.sum(1).tolist() == [1, 1, 1]
    assert batch.ids_keep is None
    assert not (batch.masks[:, 1::2] - batch.masks[:, ::2]).any()


def test_a_mixture_has_the_shares_of_both_labels_and_waveforms(labelled):
    plain, mixed = (rows_of(batches(labelled, augment)) for augment in (PLAIN, Augment(mixup=1, mixup_alpha=0.5)))
    assert not torch.equal(plain.waveforms, mixed.waveforms)
    assert [key.partition(" + ")[0] for key in mixed.keys] == list(plain.keys)
    assert all(key.endswith(".wav") and " + train" in key for key in mixed.keys)
    assert mixed.targets.sum(1).tolist() == pytest.approx([1] * len(mixed.targets))
    shares = mixed.targets.gather(1, plain.targets.argmax(1, keepdim=True))[:, 0]
    assert ((shares > 0) & (shares < 1)).any()
    for before, after, share in zip(plain.waveforms, mixed.waveforms, shares.tolist(), strict=True):
        if 0.9 < share < 1:  # two of one kind have a share of 1, whatever their weights
            likeness = torch.nn.functional.cosine_similarity(before.double(), after.double(), dim=0)
            assert likeness > 0.8


def rows_of(found):
    found = [batch for batch, _ in zip(found, range(12), strict=False)]
    return replace(
        found[0],
        waveforms=torch.cat([batch.waveforms for batch in found]),
        targets=torch.cat([batch.targets for batch in found]),
    )


@pytest.mark.parametrize("world_size", [1, 2, 5])
def test_every_clip_is_judged_once_in_each_round(labelled, world_size):
    clips = labelled.clips(labelled.parts.test)
    count = num_batches(len(clips), 4, world_size)
    for turn in range(2):
        places = []
        for rank in range(world_size):
            found = iter(JudgedClips(clips, CUT, 4, rank, world_size))
            rounds = [next(found) for _ in range(2 * count)]
            places += [place for batch in rounds[turn * count : (turn + 1) * count] for place in batch.places.tolist()]
        assert sorted(places) == list(range(count * 4 * world_size))
        assert count * 4 * world_size - len(clips) < 4 * world_size


def test_judged_clips_are_neither_mixed_nor_moved(labelled):
    clips = labelled.clips(labelled.parts.test)
    first = next(iter(JudgedClips(clips, CUT, 4, 0, 1)))
    again = next(iter(JudgedClips(clips, CUT, 4, 0, 1)))
    assert torch.equal(first.waveforms, again.waveforms)
    assert first.targets.sum(1).tolist() == [1] * 4
    assert first.waveforms.shape == (4, LENGTH)


def test_length_is_that_of_the_longest_first_clip_where_none_is_given(tmp_path):
    task = write_sounds(tmp_path)
    found = open_task(FinetuneData(task=str(task)), RATE)
    assert 14000 < found.num_samples < 16000
    assert open_task(FinetuneData(task=str(task), seconds=0.5), RATE).num_samples == 8000


def test_clips_that_can_not_be_read_give_no_length(tmp_path):
    task = write_sounds(tmp_path)
    lengths = [soundfile.info(tmp_path / f"train{number}.wav").frames for number in range(32)]
    for number in sorted(range(32), key=lengths.__getitem__)[10:]:
        (tmp_path / f"train{number}.wav").write_bytes(b"no audio")
    assert open_task(FinetuneData(task=str(task)), RATE).num_samples == sorted(lengths)[9]
    for number in range(32):
        (tmp_path / f"train{number}.wav").write_bytes(b"no audio")
    assert open_task(FinetuneData(task=str(task)), RATE).num_samples == 10 * RATE


def test_identity_of_a_task_is_that_of_its_labels_and_splits(tmp_path):
    path = write_sounds(tmp_path)
    data = FinetuneData(task=str(path), seconds=0.5)
    before = open_task(data, RATE).digest
    assert open_task(data, RATE).digest == before
    path.write_text(path.read_text().replace("train1.wav,hum", "train1.wav,hiss"))
    assert open_task(data, RATE).digest != before


def test_folds_are_chosen_by_name(tmp_path):
    path = write_sounds(tmp_path)
    lines = path.read_text().splitlines()
    folded = [f"{line.rpartition(',')[0]},{number % 3 + 1}" for number, line in enumerate(lines[1:])]
    path.write_text("\n".join(["file,label,fold", *folded]) + "\n")
    with pytest.raises(ConfigError, match="data.fold is missing: .* choose from 1, 2, 3"):
        open_task(FinetuneData(task=str(path), seconds=0.5), RATE)
    with pytest.raises(ConfigError, match="data.fold = 4: .* 1, 2, 3"):
        open_task(FinetuneData(task=str(path), seconds=0.5, fold=4), RATE)
    found = open_task(FinetuneData(task=str(path), seconds=0.5, fold=2), RATE)
    assert {clip.split for clip in found.clips(found.parts.test)} == {"2"}
    assert {clip.split for clip in found.clips(found.parts.train)} == {"1", "3"}
    assert len(found.parts.train) + len(found.parts.test) == len(lines) - 1
    assert not len(found.parts.valid)


def test_no_training_clip_is_held_out_where_there_are_no_validation_clips(tmp_path):
    path = write_sounds(tmp_path, valid=0)
    found = open_task(FinetuneData(task=str(path), seconds=0.5), RATE)
    assert [len(part) for part in (found.parts.train, found.parts.valid, found.parts.test)] == [36, 0, 24]


@pytest.mark.parametrize(
    ("column", "label", "message"),
    [("label", "hum", "has one class, hum: "), ("labels", "", "none of its 36 training clips has a label")],
)
def test_task_that_has_nothing_to_learn_is_refused(tmp_path, column, label, message):
    path = write_sounds(tmp_path)
    rows = [line.split(",") for line in path.read_text().splitlines()[1:]]
    lines = [f"{file},{label if column == 'label' or split == 'train' else kind},{split}" for file, kind, split in rows]
    path.write_text("\n".join([f"file,{column},split", *lines]) + "\n")
    with pytest.raises(DataError, match=message):
        open_task(FinetuneData(task=str(path), seconds=0.5), RATE)


def test_remedies_are_settings_of_fine_tuning(tmp_path):
    shards = write_shard(tmp_path / "shards", [["dog"]])
    with pytest.raises(DataError, match=r"data\.test=SHARDS"):
        open_task(FinetuneData(task=str(shards)), RATE)
    path = write_sounds(tmp_path / "sounds").rename(tmp_path / "sounds.csv")
    with pytest.raises(DataError, match=r"72 of 72 audio files are not there; .*data\.audio=FOLDER"):
        open_task(FinetuneData(task=str(path)), RATE)
    assert len(open_task(FinetuneData(task=str(path), audio=str(tmp_path / "sounds")), RATE).task.clips) == 72


def test_clip_that_can_not_be_read_is_a_fault_that_names_it(tmp_path):
    path = write_sounds(tmp_path)
    labelled = open_task(FinetuneData(task=str(path), seconds=0.6), RATE)
    (tmp_path / "test1.wav").write_bytes(b"no audio")
    loader = start_loader(JudgedClips(labelled.clips(labelled.parts.test), CUT, 4, 0, 1), 0)
    with pytest.raises(DataError, match="test1.wav: can't be read as audio"):
        next(loader)


def test_a_part_of_the_clips_is_spread_over_all_of_them():
    numbers = np.arange(100, 200)
    assert spread(numbers, 4).tolist() == [100, 125, 150, 175]
    assert spread(numbers, 500).tolist() == numbers.tolist()
    assert len(set(spread(numbers, 33).tolist())) == 33


def test_only_waveforms_leave_a_loader_process_by_shared_memory(labelled):
    batch = next(iter(batches(labelled, ALL)))
    make, parts = batch.__reduce__()
    assert [torch.is_tensor(part) for part in parts] == [True, *[False] * 5]
    again = make(*parts)
    assert again.keys == batch.keys
    for name in ("waveforms", "targets", "places", "masks", "ids_keep"):
        mine, theirs = getattr(batch, name), getattr(again, name)
        assert mine.dtype == theirs.dtype
        assert torch.equal(mine, theirs)
