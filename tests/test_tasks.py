"""Labelled clips: every layout gives the same kind of task, and what is wrong with one is named before any work."""

import io
import json
import re
import shutil
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from msm_dist.config import Features
from msm_dist.data.index import Official, load_index, write_index
from msm_dist.data.shards import index_shards
from msm_dist.errors import DataError
from msm_dist.evaluate.tasks import Fold, Task, TaskClip, clip_waveform, parts_of, read_shards, read_task
from tests.audio_files import encode, noise, write_audio
from tests.hear_tasks import tone, tone_files, write_hear, write_tones


def write_csv(folder: Path, text: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for line in text.splitlines()[1:]:
        write_audio(folder / line.partition(",")[0], noise(800), "wav")
    (folder / "table.csv").write_text(text)
    return folder / "table.csv"


def write_shard(folder: Path, labels: list[list[str] | None], official: Official | None = None) -> Path:
    """An indexed shard of one clip per entry, its json with these labels; None: no json."""
    folder.mkdir(parents=True)
    with tarfile.open(folder / "clips-000000.tar", "w") as tar:
        for number, names in enumerate(labels):
            files = {f"clip{number}.flac": encode(noise(4000, seed=number))}
            if names is not None:
                files[f"clip{number}.json"] = json.dumps({"labels": names}).encode()
            for name, content in files.items():
                member = tarfile.TarInfo(name)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    index = index_shards([folder / "clips-000000.tar"], Features())
    if official:
        write_index(replace(index, official=official))
    return folder


def task_of(labels: list[tuple[int, ...]], split: str = "train", multilabel: bool = False) -> Task:
    """A task without audio: these training clips, one test clip."""
    clips = [TaskClip(Path(), one, split, str(number)) for number, one in enumerate(labels)]
    names = tuple(map(str, range(1 + max(number for one in labels for number in one))))
    return Task("made", names, multilabel, (*clips, TaskClip(Path(), (0,), "test")), (Fold((split,), None, "test"),))


def test_hear_folder_gives_its_labels_and_splits(tmp_path):
    task = read_task(write_tones(tmp_path, train=2, valid=1, test=1))
    assert (task.name, task.labels, task.multilabel) == ("tones", ("high", "low", "middle"), False)
    assert task.folds == (Fold(("train",), "valid", "test"),)
    assert task.scores == ("top1_acc",)
    assert [clip.split for clip in task.clips] == ["train"] * 6 + ["valid"] * 3 + ["test"] * 3
    first = task.clips[0]
    assert (first.path, first.labels) == (tmp_path / "16000" / "train" / "high0.wav", (0,))
    waveform = clip_waveform(first, 16000)
    np.testing.assert_allclose(waveform, tone("high", 0) / 32768, atol=1e-6)
    np.testing.assert_array_equal(task.targets()[:2], [[1, 0, 0], [0, 1, 0]])


def test_vocabulary_numbers_the_labels_not_its_lines(tmp_path):
    write_tones(tmp_path, 1, 1, 1)
    (tmp_path / "labelvocabulary.csv").write_text("idx,label\n2,high\n0,low\n1,middle\n")
    task = read_task(tmp_path)
    assert task.labels == ("low", "middle", "high")
    assert task.clips[0].labels == (2,)


def test_folds_are_tested_in_turn_and_chosen_by_the_next(tmp_path):
    folds = {f"fold0{number}": tone_files(1) for number in range(4)}
    task = read_task(write_hear(tmp_path, folds, split_mode="presplit_kfold"))
    assert task.folds[0] == Fold(("fold02", "fold03"), "fold01", "fold00")
    assert task.folds[3] == Fold(("fold01", "fold02"), "fold00", "fold03")
    parts = parts_of(task, task.folds[3], seed=0)
    assert parts.test.tolist() == [9, 10, 11]
    assert parts.valid.tolist() == [0, 1, 2]
    assert parts.train.tolist() == [3, 4, 5, 6, 7, 8]


def test_multilabel_clips_may_have_several_labels_or_none(tmp_path):
    files = {"a.wav": ["low", "high"], "b.wav": []}
    splits = dict.fromkeys(("train", "valid", "test"), files)
    task = read_task(write_hear(tmp_path, splits, prediction_type="multilabel", evaluation=["mAP"]))
    assert task.multilabel
    assert [clip.labels for clip in task.clips[:2]] == [(0, 1), ()]


@pytest.mark.parametrize(("rates", "taken"), [((16000, 48000), 16000), ((22050, 48000), 22050), ((8000,), 8000)])
def test_audio_is_taken_at_the_rate_wanted_or_the_nearest_above(tmp_path, rates, taken):
    for rate in rates:
        write_hear(tmp_path, {split: tone_files(1) for split in ("train", "valid", "test")}, rate=rate)
    clip = read_task(tmp_path, sample_rate=16000).clips[0]
    assert clip.path.parts[-3] == str(taken)
    assert len(clip_waveform(clip, 16000)) == 4800 * 16000 // taken + (4800 * 16000 % taken > 0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"embedding_type": "event"}, r"docs/hear\.md"),
        ({"prediction_type": "regression"}, "multiclass, multilabel"),
        ({"split_mode": "leave-one-out"}, "presplit_kfold"),
        ({"splits": "train"}, "list of names"),
        ({"splits": ["train", "valid"]}, "no clips in the split test"),
        ({"splits": ["train", "eval"]}, "eval.json"),
        ({"task_name": None}, "task_name"),
    ],
)
def test_metadata_out_of_order_is_named(tmp_path, changes, message):
    write_hear(tmp_path, {split: tone_files(1) for split in ("train", "valid", "test")}, **changes)
    with pytest.raises(DataError, match=message):
        read_task(tmp_path)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("train.json", '{"low0.wav": ["strange"]}', "'strange', which labelvocabulary.csv lacks"),
        ("train.json", '{"low0.wav": ["low", "high"]}', "2 labels"),
        ("train.json", '{"lost.wav": ["low"]}', "1 of 7 audio files are not there"),
        ("train.json", "[]", "no JSON object"),
        ("train.json", "{", "not JSON"),
        ("task_metadata.json", "[]", "no JSON object"),
        ("labelvocabulary.csv", "idx,label\n0,low\n2,high\n", "without gaps"),
        ("labelvocabulary.csv", "idx,label\n0,low\n1,low\n", "each label once"),
        ("labelvocabulary.csv", "0,low\n", "lacks idx"),
    ],
)
def test_damaged_hear_folder_is_named(tmp_path, file, content, message):
    write_tones(tmp_path, 1, 1, 1)
    (tmp_path / file).write_text(content)
    with pytest.raises(DataError, match=message):
        read_task(tmp_path)


def test_csv_with_splits_gives_a_task(tmp_path):
    task = read_task(write_csv(tmp_path, "file,label,split\na.wav,dog,train\nb.wav,cat,valid\nc.wav,dog,test\n"))
    assert (task.name, task.labels, task.multilabel) == ("table", ("cat", "dog"), False)
    assert task.folds == (Fold(("train",), "valid", "test"),)
    assert [(clip.path.name, clip.labels, clip.split) for clip in task.clips] == [
        ("a.wav", (1,), "train"),
        ("b.wav", (0,), "valid"),
        ("c.wav", (1,), "test"),
    ]


def test_csv_with_folds_rotates_them_by_number(tmp_path):
    rows = "".join(f"{number}.wav,{'ab'[number % 2]},{number}\n" for number in (10, 1, 2))
    task = read_task(write_csv(tmp_path, "file,label,fold\n" + rows))
    assert [fold.test for fold in task.folds] == ["1", "2", "10"]
    assert task.folds[2] == Fold(("2",), "1", "10")


def test_two_folds_choose_by_a_tenth_of_the_other(tmp_path):
    rows = "".join(f"{number}.wav,{'ab'[number % 2]},{number % 3 // 2}\n" for number in range(24))
    task = read_task(write_csv(tmp_path, "file,label,fold\n" + rows))
    assert task.folds == (Fold(("1",), None, "0"), Fold(("0",), None, "1"))


@pytest.mark.parametrize("separator", [";", "|"])
def test_several_labels_in_a_cell_make_a_csv_multilabel(tmp_path, separator):
    text = f"file,label,split\na.wav,dog{separator} cat,train\nb.wav,cat,test\n"
    task = read_task(write_csv(tmp_path, text))
    assert task.multilabel
    assert task.clips[0].labels == (0, 1)
    assert task.scores[0] == "mAP"


def test_column_called_labels_is_multilabel_and_may_be_empty(tmp_path):
    task = read_task(write_csv(tmp_path, "file,labels,split\na.wav,dog,train\nb.wav,,test\n"))
    assert task.multilabel
    assert task.clips[1].labels == ()


def test_files_of_a_csv_may_lie_in_another_folder(tmp_path):
    table = write_csv(tmp_path / "audio", "file,label,split\na.wav,dog,train\nb.wav,cat,test\n")
    moved = table.rename(tmp_path / "table.csv")
    with pytest.raises(DataError, match=r"2 of 2 audio files are not there; .*--audio"):
        read_task(moved)
    assert len(read_task(moved, audio=tmp_path / "audio").clips) == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("file,label\na.wav,dog\n", "one of split and fold"),
        ("file,label,split,fold\na.wav,dog,train,1\n", "one of split and fold"),
        ("file,split\na.wav,train\n", "one of label and labels"),
        ("name,label,split\na.wav,dog,train\n", "lacks file"),
        ("file,label,split\na.wav,dog,train\na.wav,cat,test\n", "line 3: a.wav is on line 2 already"),
        ("file,label,split\na.wav,dog,training\n", "'training', must be one of train, valid, test"),
        ("file,label,split\na.wav,,train\n", "empty cell"),
        ("file,label,split\na.wav,dog\n", "line 2: has 2 cells, the header 3"),
        ("file,label,split\n", "no clips"),
        ("file,label,split\na.wav,dog,train\n", r"table\.csv: has no clips in the split test"),
        ("file,label,fold\na.wav,dog,1\n", r"table\.csv: all clips are in the fold 1; .* at least 2"),
        ("file;label;split\na.wav;dog;train\n", "cells are separated by semicolons; save it with commas"),
        ("file\tlabel\tsplit\na.wav\tdog\ttrain\n", "cells are separated by tabs; save it with commas"),
        ("", r"table\.csv: its first line is empty; it must name the columns, file"),
    ],
)
def test_csv_out_of_order_is_named(tmp_path, text, message):
    with pytest.raises(DataError, match=message):
        read_task(write_csv(tmp_path, text))


def test_a_folder_of_tasks_says_which_it_holds(tmp_path):
    for name in ("order", "glide"):
        write_tones(tmp_path / name, 1, 1, 1)
    (tmp_path / "table.csv").touch()
    held = " ".join(str(tmp_path / name) for name in ("glide", "order", "table.csv"))
    with pytest.raises(DataError, match=f"is no task but holds 3; name those wanted: {re.escape(held)}$"):
        read_task(tmp_path)


def test_anything_else_is_named_with_what_is_read(tmp_path):
    with pytest.raises(DataError, match=r"HEAR task folder .* esc50"):
        read_task(tmp_path)
    with pytest.raises(DataError, match="is no task"):
        read_task(tmp_path / "absent.csv")


def test_shards_give_the_labels_in_their_json(tmp_path):
    official = Official(("eval_segments.csv",), 20371, 2, "0" * 64)
    train = write_shard(tmp_path / "train", [["dog"], ["cat", "dog"], None, ["bird"]])
    test = write_shard(tmp_path / "eval", [["dog"], ["bird"]], official)
    task = read_shards(train, test)
    assert (task.name, task.labels, task.multilabel) == ("eval", ("bird", "cat", "dog"), True)
    assert task.folds == (Fold(("train",), None, "test"),)
    assert [clip.labels for clip in task.clips] == [(2,), (1, 2), (0,), (2,), (0,)]
    assert task.official == official
    waveform = clip_waveform(task.clips[1], 16000)
    np.testing.assert_allclose(waveform, noise(4000, seed=1) / 32768, atol=1e-6)
    assert task.clips[-1].path == load_index(str(test)).shards[0].path


def test_clips_without_labels_are_counted(tmp_path, caplog):
    train, test = (write_shard(tmp_path / name, [[name], None]) for name in ("train", "test"))
    read_shards(train, test)
    assert "1 of 2 clips have no labels" in caplog.text


def test_shards_without_labels_are_named(tmp_path):
    train, test = write_shard(tmp_path / "train", [["dog"]]), write_shard(tmp_path / "test", [None, []])
    with pytest.raises(DataError, match="test: none of its 2 clips has labels"):
        read_shards(train, test)


def test_shards_that_are_in_two_parts_are_refused(tmp_path):
    train, test = (write_shard(tmp_path / name, [["dog"], ["cat"]] + [["cat"]] * n) for n, name in enumerate("ab"))
    read_shards(train, test)
    (tmp_path / "link").symlink_to(train)
    copied = shutil.copytree(train, tmp_path / "copied")
    for parts in ((train, train), (train, tmp_path / "link"), (train, copied), (train, test, test)):
        with pytest.raises(DataError, match="is among the shards of"):
            read_shards(*parts)


def test_shards_alone_ask_for_shards_to_be_judged_on(tmp_path):
    with pytest.raises(DataError, match="--test"):
        read_task(write_shard(tmp_path / "train", [["dog"]]))


def test_clip_that_does_not_decode_is_named(tmp_path):
    path = tmp_path / "bad.wav"
    path.write_bytes(b"no audio at all")
    with pytest.raises(DataError, match=r"bad\.wav"):
        clip_waveform(TaskClip(path, (0,), "train"), 16000)
    with pytest.raises(DataError, match=r"bad\.wav: the key"):
        clip_waveform(TaskClip(path, (0,), "train", "the key", (0, 5)), 16000)


def test_so_many_labels_of_each_class_are_drawn_by_the_seed():
    task = task_of([(0,)] * 60 + [(1,)] * 30 + [(2,)] * 4)
    """And beside them a tenth to choose by."""
    draws = [parts_of(task, task.folds[0], seed, labels_per_class=10) for seed in (0, 0, 1)]
    assert np.array_equal(draws[0].train, draws[1].train)
    assert not np.array_equal(draws[0].train, draws[2].train)
    for parts in draws:
        for part, expected in ((parts.train, [10, 10, 3]), (parts.valid, [2, 2, 1])):
            labels = [task.clips[place].labels[0] for place in part]
            assert [labels.count(number) for number in range(3)] == expected


@pytest.mark.parametrize("count", [1, 2, 8, 9, 10, 11, 18, 19, 50])
def test_no_label_to_train_on_is_taken_to_choose_by(count):
    task = task_of([(0,)] * 80 + [(1,)] * 80)
    parts = parts_of(task, task.folds[0], 0, labels_per_class=count)
    labels = [task.clips[place].labels[0] for place in parts.train]
    assert (labels.count(0), labels.count(1)) == (count, count)
    assert len(parts.valid) == 2 * -(-count // 9)


def test_so_many_labels_of_each_class_counts_every_label_of_a_clip():
    task = task_of([(0, 1)] * 20 + [(1,)] * 20 + [(0,)] * 20, multilabel=True)
    parts = parts_of(task, task.folds[0], 0, labels_per_class=5)
    targets = task.targets()[parts.train]
    assert (targets.sum(0) >= 5).all()
    assert len(targets) <= 10


def test_a_tenth_of_each_class_is_kept_to_choose_by():
    task = task_of([(0,)] * 50 + [(1,)] * 20 + [(2,)])
    parts = parts_of(task, task.folds[0], seed=3)
    labels = [task.clips[place].labels[0] for place in parts.valid]
    assert [labels.count(number) for number in range(3)] == [5, 2, 0]
    assert not set(parts.valid) & set(parts.train)
    assert len(parts.train) + len(parts.valid) == 71
    assert not np.array_equal(parts.valid, parts_of(task, task.folds[0], seed=4).valid)


def test_given_validation_clips_are_all_used(tmp_path):
    task = read_task(write_tones(tmp_path, train=4, valid=2, test=1))
    parts = parts_of(task, task.folds[0], 0, labels_per_class=1)
    assert len(parts.train) == 3
    assert parts.valid.tolist() == list(range(12, 18))


def test_too_few_clips_are_named():
    task = task_of([(0,), (1,)])
    with pytest.raises(
        DataError, match=r"no validation clips .* splits test, train\); give validation clips, or several"
    ):
        parts_of(task, task.folds[0], 0)
    parts = parts_of(task, task.folds[0], 0, holds_out=False)
    assert (len(parts.train), len(parts.valid)) == (2, 0)
