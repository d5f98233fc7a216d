"""Before the first step: every clip that can't be read is named, and every score that can't be computed."""

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile

from msm_dist.engine.hang import Progress
from msm_dist.errors import DataError
from msm_dist.evaluate import finetune
from msm_dist.evaluate.finetune_config import FinetuneData, read_config
from msm_dist.evaluate.finetune_data import open_task
from msm_dist.evaluate.finetune_judging import (
    Stopping,
    allowed_scores,
    check_clips,
    finite,
    next_batch,
    scores_of,
)
from msm_dist.evaluate.finetune_report import results_of
from msm_dist.evaluate.finetune_start import read_start
from msm_dist.feed import GivenUp
from tests.labelled import RATE, write_sounds, write_weights


class Alone:
    """The one rank of a run."""

    rank, size, is_main = 0, 1, True

    def together(self, action, kind):
        return action()

    def gather(self, value):
        return [value]


class Interruption:
    """What a run has heard: a reason, after a number of questions."""

    def __init__(self, reason=0, after=0):
        self.reason, self.after = reason, after

    def heard_anywhere(self):
        return bool(self.heard)

    @property
    def heard(self):
        self.after -= 1
        return self.reason if self.after < 0 else 0

    def agreed(self):
        return self.reason if self.after <= 0 else 0


@pytest.fixture
def path(tmp_path):
    return write_sounds(tmp_path)


def opened(path):
    return open_task(FinetuneData(task=str(path), seconds=0.5), RATE)


def relabelled(path, column, label_of):
    """The task with other labels, by (number of the row, split)."""
    rows = [line.split(",") for line in path.read_text().splitlines()[1:]]
    lines = [f"{file},{label_of(number, split)},{split}" for number, (file, _, split) in enumerate(rows)]
    path.write_text("\n".join([f"file,{column},split", *lines]) + "\n")
    return opened(path)


def parts(labelled):
    return labelled.clips(labelled.parts.valid), labelled.clips(labelled.parts.test)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_all_clips_that_can_not_be_read_are_named_at_once(path, num_workers):
    labelled = opened(path)
    (path.parent / "train3.wav").write_bytes(b"no audio")
    for name in ("valid2.wav", "test23.wav"):
        # Only decoding finds it: the header, which says what the content is, is sound.
        soundfile.write(path.parent / name, soundfile.read(path.parent / name)[0], RATE, format="FLAC")
        content = (path.parent / name).read_bytes()
        (path.parent / name).write_bytes(content[: len(content) // 2] + bytes(len(content) // 2))
    (path.parent / "test5.wav").unlink()
    valid, test = parts(labelled)
    with pytest.raises(DataError, match=r"sounds: 4 of 72 clips can't be read") as error:
        check_clips(labelled, [*valid, *test], num_workers, Alone(), Interruption(), Progress())
    assert all(f"{name}.wav: " in str(error.value) for name in ("train3", "valid2", "test23", "test5"))


def test_clips_in_order_are_passed_over_in_silence(path):
    labelled = opened(path)
    check_clips(labelled, labelled.clips(labelled.parts.test), 0, Alone(), Interruption(), Progress())


@pytest.mark.parametrize("num_workers", [0, 1])
def test_check_of_clips_ends_when_the_run_is_to_stop(path, num_workers):
    labelled = opened(path)
    with pytest.raises(Stopping) as stopping:
        judged = labelled.clips(labelled.parts.test)
        check_clips(labelled, judged, num_workers, Alone(), Interruption(2, after=1), Progress())
    assert stopping.value.reason == 2


def test_score_without_a_meaning_on_the_clips_is_left_out_with_a_note(path):
    def label_of(number, split):
        return "a;b" if split == "valid" or number % 2 else "a"

    labelled = relabelled(path, "labels", label_of)
    scores = allowed_scores(labelled, *parts(labelled))
    assert scores.test == ("mAP", "aucroc")
    assert scores.valid == ("mAP",)
    (note,) = scores.notes
    assert "validation: without aucroc: every clip that is to be judged has every label" in note


def test_deciding_score_without_a_meaning_on_the_test_clips_is_refused(path):
    labelled = relabelled(path, "labels", lambda number, split: "" if split == "test" else "a")
    with pytest.raises(DataError, match="sounds, test clips: mAP can't be computed: no clip .* has a label"):
        allowed_scores(labelled, *parts(labelled))


def test_validation_without_a_score_is_left_with_its_loss(path):
    labelled = relabelled(path, "labels", lambda number, split: "" if split == "valid" else "ab"[number % 2])
    scores = allowed_scores(labelled, *parts(labelled))
    assert (scores.valid, scores.test) == ((), ("mAP", "aucroc"))
    assert len(scores.notes) == 2


def test_unknown_score_is_refused_before_the_training(path):
    labelled = opened(path)
    labelled = replace(labelled, task=replace(labelled.task, scores=("top1_acc", "f1")))
    with pytest.raises(DataError, match="sounds: has the score f1"):
        allowed_scores(labelled, *parts(labelled))


def test_task_without_validation_clips_has_its_test_scores(path):
    labelled = opened(path)
    scores = allowed_scores(labelled, [], parts(labelled)[1])
    assert (scores.test, scores.notes) == (("top1_acc", "mAP"), ())


def test_infinite_score_is_null_in_the_results(path, tmp_path):
    targets = np.eye(3, dtype=np.float32)[[0, 1, 2, 0, 1, 2]]
    values = scores_of(10 * targets, targets, False, ("top1_acc", "d_prime"))
    assert values["d_prime"] == np.inf
    assert finite(values).keys() == {"loss", "top1_acc"}
    cfg = read_config(str(write_weights(tmp_path / "base")), str(path), ["train.steps=1"])
    results = results_of(cfg, opened(path), read_start(cfg), 1, values)
    found = json.loads(json.dumps(results, allow_nan=False))
    assert (found["test_d_prime"], found["test_top1_acc"]) == (None, 1)
    assert found["splits"] == {"train": ["train"], "valid": ["valid"], "test": ["test"]}


def test_batch_is_not_judged_once_the_run_is_to_stop():
    assert next_batch(iter(["batch"]), Alone(), Interruption()) == "batch"
    with pytest.raises(Stopping):
        next_batch(iter(["batch"]), Alone(), Interruption(1))


def test_late_batch_that_is_given_up_is_a_stop():
    def late():
        raise GivenUp
        yield

    with pytest.raises(Stopping):
        next_batch(late(), Alone(), Interruption(1))


@pytest.mark.parametrize("fault", [DataError("a clip is damaged by now"), Stopping(2)])
def test_validation_that_is_cut_short_is_left_saved(monkeypatch, fault):
    def judge(*arguments):
        raise fault

    saved = []
    monkeypatch.setattr(finetune, "judge", judge)
    monkeypatch.setattr(finetune, "save", lambda run, complete: saved.append(complete))
    with pytest.raises(type(fault)):
        finetune.validate(SimpleNamespace(valid=object(), num_valid=3, scores=SimpleNamespace(valid=())))
    assert saved == [True]


@pytest.mark.parametrize(("step", "is_due"), [(0, False), (5, True), (10, False), (12, False), (13, True)])
def test_validation_that_was_due_and_is_not_recorded_is_made_up_for(monkeypatch, tmp_path, step, is_due):
    done = []
    monkeypatch.setattr(finetune, "validate", done.append)
    lines = [{"step": 5, "loss": 1.0}, {"step": 10, "loss": 1.0}, {"step": 10, "valid_loss": 1.0}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    cfg = SimpleNamespace(train=SimpleNamespace(valid_every=5), run=SimpleNamespace(folder=tmp_path))
    world = SimpleNamespace(on_main=lambda action: action())
    run = SimpleNamespace(valid=object(), step=step, total_steps=13, cfg=cfg, world=world)
    finetune.validate_if_cut_short(run)
    assert done == ([run] if is_due else [])
