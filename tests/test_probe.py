"""Probes of an encoder: each clip's own vector, made once, judged beside baselines, and reported whole."""

import io
import json
import os
import re
import sys
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.main import get_command
from typer.testing import CliRunner

from msm_dist.cli import app
from msm_dist.config import Features, Model
from msm_dist.data.index import Official, write_index
from msm_dist.data.shards import index_shards
from msm_dist.errors import ConfigError, DataError, MsmError
from msm_dist.evaluate import probe as probe_module
from msm_dist.evaluate import probe_vectors
from msm_dist.evaluate.encoder import Encoder
from msm_dist.evaluate.probe import Settings, probe, probe_task, report
from msm_dist.evaluate.probe_report import Outcome, table
from msm_dist.evaluate.probe_vectors import LOGMEL, RANDOM, TRAINED, clip_vectors, logmel_statistics, sources
from msm_dist.evaluate.recipes import RECIPES
from msm_dist.evaluate.tasks import Fold, Task, TaskClip, clip_waveform, read_task
from msm_dist.features import LogMel
from msm_dist.model.mae import MaskedSpectrogramModel
from msm_dist.model.weights import WeightsInfo, save
from tests.audio_files import encode, noise, write_audio
from tests.hear_tasks import RATE, tone, tone_files, write_hear, write_tones
from tests.processes import HERE
from tests.test_data_doc import commands
from tests.test_operations_doc import parse

MODEL = Model(embed_dim=16, depth=1, num_heads=2, decoder_embed_dim=16, decoder_depth=1, decoder_num_heads=2)
INFO = WeightsInfo(MODEL, Features(mean=-6.5, std=3.5), 96, {"run": "tiny"})
ABOUT = {"encoder_sha256": "0" * 64, "normalization": "checkpoint"}


def tiny(seed: int = 5) -> MaskedSpectrogramModel:
    return MaskedSpectrogramModel(MODEL, 80, 96, seed=seed)


@pytest.fixture
def run(tmp_path) -> Path:
    """A finished run's folder."""
    save(tmp_path / "run" / "export", tiny().state_dict(), INFO)
    return tmp_path / "run"


def made_task(labels: list[int], splits: list[str], folds: tuple[Fold, ...] | None = None) -> Task:
    """A task of three classes without audio."""
    pairs = enumerate(zip(labels, splits, strict=True))
    clips = [TaskClip(Path(), (label,), split, f"clip{i}") for i, (label, split) in pairs]
    folds = folds or (Fold(("train",), "valid", "test"),)
    return Task("made", ("a", "b", "c"), False, tuple(clips), folds, ("top1_acc",))


def made_vectors(labels: list[int], signal: float, seed: int = 0) -> torch.Tensor:
    """Vectors of 256 numbers about the centres of their classes."""
    centres = 0.1 * np.random.default_rng(99).standard_normal((3, 256))
    noise = np.random.default_rng(seed).standard_normal((len(labels), 256))
    return torch.tensor(signal * centres[labels] + noise, dtype=torch.float32)


LABELS = [number % 3 for number in range(240)]
SPLITS = ["train"] * 120 + ["valid"] * 30 + ["test"] * 90
KNN = Settings("knn", seeds=1)


def test_trained_vectors_are_judged_beside_the_baselines():
    vectors = {TRAINED: made_vectors(LABELS, 4), RANDOM: made_vectors(LABELS, 1, 1), LOGMEL: made_vectors(LABELS, 0, 2)}
    outcome = probe_task(made_task(LABELS, SPLITS), vectors, Settings(seeds=2))
    scored = outcome.scored
    assert scored[TRAINED].mean > 0.95 > scored[RANDOM].mean > scored[LOGMEL].mean
    assert abs(scored[LOGMEL].mean - 1 / 3) < 4 * np.sqrt(2 / 9 / 90)
    for name in (RANDOM, LOGMEL):
        compared = outcome.compared[name]
        assert compared.difference == pytest.approx(scored[TRAINED].mean - scored[name].mean)
        assert compared.interval.low < compared.difference < compared.interval.high
    assert outcome.beats_baselines
    assert not outcome.saturated
    assert (outcome.num_train, outcome.num_valid, outcome.num_test) == (120, 30, 90)
    assert {entry["lr"] for name in (TRAINED, RANDOM) for entry in scored[name].fits} <= {3e-5, 3e-4}
    assert {"fold", "seed", "lr", "epoch", "valid", "top1_acc"} == set(scored[TRAINED].fits[0])
    for one in scored.values():
        assert one.interval.low <= one.mean <= one.interval.high
        assert np.mean(one.by_seed) == pytest.approx(one.mean)
        assert one.deviation == pytest.approx(np.std(one.by_seed, ddof=1))


def test_differences_are_paired_by_clip():
    rows = made_vectors(LABELS, 1)
    outcome = probe_task(made_task(LABELS, SPLITS), {TRAINED: rows, RANDOM: rows.clone()}, KNN)
    assert outcome.compared[RANDOM].interval == (0, 0)
    assert outcome.scored[TRAINED].interval.high > outcome.scored[TRAINED].interval.low
    assert not outcome.beats_baselines


def test_baseline_above_95_percent_marks_a_task_saturated():
    vectors = {TRAINED: made_vectors(LABELS, 20), RANDOM: made_vectors(LABELS, 0), LOGMEL: made_vectors(LABELS, 20, 1)}
    outcome = probe_task(made_task(LABELS, SPLITS), vectors, KNN)
    assert outcome.saturated
    assert "saturated" in table([outcome], ABOUT | {"settings": {**vars(KNN)}})
    del vectors[LOGMEL]
    assert not probe_task(made_task(LABELS, SPLITS), vectors, KNN).saturated


@pytest.mark.parametrize("protocol", ["linear", "knn"])
def test_shuffled_labels_give_chance(protocol):
    vectors = {TRAINED: made_vectors(LABELS, 8)}
    settings = Settings(protocol, seeds=3, shuffle_labels=True)
    outcome = probe_task(made_task(LABELS, SPLITS), vectors, settings)
    # Over seeds the classifiers differ, the clips do not: the bound is that of one seed.
    assert abs(outcome.scored[TRAINED].mean - 1 / 3) < 4 * np.sqrt(2 / 9 / 90)
    assert probe_task(made_task(LABELS, SPLITS), vectors, Settings(protocol)).scored[TRAINED].mean > 0.95


def test_every_clip_is_judged_once_over_the_folds():
    splits = [str(number % 4) for number in range(240)]
    folds = tuple(
        Fold(tuple(str(k) for k in range(4) if k not in (n, (n + 1) % 4)), str((n + 1) % 4), str(n)) for n in range(4)
    )
    outcome = probe_task(made_task(LABELS, splits, folds), {TRAINED: made_vectors(LABELS, 4)}, KNN)
    assert outcome.num_test == 240
    assert (outcome.num_folds, outcome.num_train, outcome.num_valid) == (4, 120, 60)
    scored = outcome.scored[TRAINED]
    assert [entry["fold"] for entry in scored.fits] == ["0", "1", "2", "3"]
    assert scored.by_fold == tuple(entry["top1_acc"] for entry in scored.fits)
    assert scored.mean == pytest.approx(np.mean(scored.by_fold))


def test_few_labels_of_each_class_are_used(tmp_path):
    outcome = probe_task(
        made_task(LABELS, SPLITS), {TRAINED: made_vectors(LABELS, 4)}, replace(KNN, labels_per_class=5)
    )
    assert (outcome.num_train, outcome.num_valid, outcome.num_test) == (15, 30, 90)
    assert outcome.scored[TRAINED].fits[0]["neighbours"] == 10
    assert "; 5 labels per class" in told(outcome, labels_per_class=5)


def told(outcome: Outcome, **settings: object) -> str:
    return table([outcome], ABOUT | {"settings": vars(replace(KNN, **settings))})


def test_fewer_labels_than_asked_for_are_said():
    splits = ["train" if number < 10 or (number < 60 and number % 3) else "test" for number in range(240)]
    for asked, note, most in ((4, "", ""), (30, "4 to 20 of 30", "at most "), (10, "4 to 10 of 10", "at most ")):
        settings = replace(KNN, labels_per_class=asked)
        outcome = probe_task(made_task(LABELS, splits), {TRAINED: made_vectors(LABELS, 4)}, settings)
        said = told(outcome, labels_per_class=asked)
        assert (f"; {note} labels per class |" in said) == bool(note)
        assert f"; {most}{asked} labels per class" in said


def test_test_classes_without_a_training_clip_are_counted():
    labels = [0 if split == "train" else number % 3 for number, split in enumerate(SPLITS)]
    outcome = probe_task(made_task(labels, SPLITS), {TRAINED: made_vectors(labels, 4)}, KNN)
    assert outcome.untrained_classes == (2, 3)
    assert "; 2 of 3 test classes have no training clip |" in told(outcome)
    outcome = probe_task(made_task(LABELS, SPLITS), {TRAINED: made_vectors(LABELS, 4)}, KNN)
    assert outcome.untrained_classes == (0, 3)
    assert "no training clip" not in told(outcome)


def test_neighbours_are_sought_among_all_training_clips():
    task = made_task(LABELS, ["train"] * 150 + ["test"] * 90, (Fold(("train",), None, "test"),))
    vectors = {TRAINED: made_vectors(LABELS, 4)}
    outcome = probe_task(task, vectors, KNN)
    assert (outcome.num_train, outcome.num_valid, outcome.num_test) == (150, 0, 90)
    outcome = probe_task(task, vectors, replace(KNN, labels_per_class=50))
    assert (outcome.num_train, outcome.num_valid) == (150, 0)
    outcome = probe_task(task, vectors, Settings(seeds=1))
    assert (outcome.num_train, outcome.num_valid) == (135, 15)


def test_a_task_of_one_class_is_refused():
    task = replace(made_task([0] * 240, SPLITS), labels=("a",))
    with pytest.raises(DataError, match="made: has one class, a: "):
        probe_task(task, {TRAINED: made_vectors([0] * 240, 4)}, KNN)


def test_grid_is_searched_on_the_first_rotation_alone(monkeypatch):
    from msm_dist.evaluate import protocols

    searched = []
    monkeypatch.setattr(
        protocols, "hear", lambda problem, seed, grid: (searched.append(len(grid)), protocols.knn(problem))[1]
    )
    knn = protocols.knn
    point = protocols.HEAR_GRID[1]._asdict()
    monkeypatch.setattr(protocols, "knn", lambda problem: replace(knn(problem), chosen=point))
    splits = [str(number % 3) for number in range(240)]
    folds = tuple(Fold((str((n + 2) % 3),), str((n + 1) % 3), str(n)) for n in range(3))
    probe_task(made_task(LABELS, splits, folds), {TRAINED: made_vectors(LABELS, 4)}, Settings("hear", seeds=2))
    assert searched == [8, 1, 1, 1, 1, 1]


def test_clips_that_do_not_decode_are_left_out_of_every_part():
    rows = made_vectors(LABELS, 4)
    random = made_vectors(LABELS, 1)
    rows[[0, 130, 200]] = torch.nan
    random[[0, 130, 200]] = torch.nan
    outcome = probe_task(made_task(LABELS, SPLITS), {TRAINED: rows, RANDOM: random}, KNN)
    assert (outcome.num_train, outcome.num_valid, outcome.num_test) == (119, 29, 89)
    assert outcome.left_out == ("clip0", "clip130", "clip200")
    assert outcome.not_finite == ()


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_clips_without_a_finite_vector_are_left_out_and_told_from_unreadable_ones(value, monkeypatch):
    monkeypatch.setattr(probe_module, "ROWS_AT_ONCE", 7)
    rows = made_vectors(LABELS, 4)
    rows[3, 5] = rows[233, 255] = value
    outcome = probe_task(made_task(LABELS, SPLITS), {TRAINED: rows, RANDOM: made_vectors(LABELS, 1)}, KNN)
    assert (outcome.num_train, outcome.num_test) == (119, 89)
    assert (outcome.left_out, outcome.not_finite) == ((), ("clip3", "clip233"))
    assert outcome.scored[TRAINED].mean > 0.8
    assert "2 without a finite vector left out" in table([outcome], ABOUT | {"settings": vars(KNN)})
    rows[:5] = value
    with pytest.raises(DataError, match="6 of 240 vectors of trained are not finite"):
        probe_task(made_task(LABELS, SPLITS), {TRAINED: rows, RANDOM: made_vectors(LABELS, 1)}, KNN)


@pytest.mark.parametrize("split", ["train", "valid", "test"])
def test_a_part_without_readable_clips_is_named(split):
    others = [name for name in ("train", "valid", "test") if name != split]
    splits = [split] * 2 + [others[number % 2] for number in range(238)]
    rows = made_vectors(LABELS, 4)
    rows[:2] = torch.nan
    with pytest.raises(DataError, match=f"made: all 2 {split} clips .* left out"):
        probe_task(made_task(LABELS, splits), {TRAINED: rows}, KNN)


def test_resamples_are_shared_by_sources_and_differ_between_folds(monkeypatch):
    seen = []
    resampled = probe_module.resampled
    monkeypatch.setattr(probe_module, "resampled", lambda *given: (seen.append(given[-1]), resampled(*given))[1])
    splits = [str(number % 3) for number in range(240)]
    folds = tuple(Fold((str((n + 2) % 3),), str((n + 1) % 3), str(n)) for n in range(3))
    vectors = {TRAINED: made_vectors(LABELS, 4), RANDOM: made_vectors(LABELS, 1, 1)}
    probe_task(made_task(LABELS, splits, folds), vectors, KNN)
    trained, random = seen[:3], seen[3:]
    assert all(map(np.array_equal, trained, random))
    assert not any(np.array_equal(trained[a], trained[b]) for a, b in ((0, 1), (0, 2), (1, 2)))


def test_classes_without_test_clips_are_named():
    labels = [number % 2 if split == "test" else number % 3 for number, split in enumerate(SPLITS)]
    task = replace(made_task(labels, SPLITS), multilabel=True, scores=("mAP",))
    outcome = probe_task(task, {TRAINED: made_vectors(labels, 4)}, KNN)
    assert (outcome.judged_classes, outcome.num_classes) == (2, 3)
    assert "mAP of 2 of 3 classes" in table([outcome], ABOUT | {"settings": vars(KNN)})
    assert outcome.scored[TRAINED].mean > 0.9


def test_a_vector_is_that_of_the_clip_alone(tmp_path):
    task = read_task(write_tones(tmp_path / "task", 3, 2, 2))
    # Clips of other lengths, one longer than a chunk.
    for clip, samples in zip(task.clips[:2], (2000, 40000), strict=True):
        write_audio(clip.path, tone("low", 7, samples), "wav")
    encoder = Encoder(tiny(), INFO)
    vectors = clip_vectors(task, sources(encoder), RATE, None)
    random = Encoder(MaskedSpectrogramModel(MODEL, 80, 96, seed=0), INFO)
    for number in (0, 1, 5):
        waveform = clip_waveform(task.clips[number], RATE)
        for name, one in ((TRAINED, encoder), (RANDOM, random)):
            expected = one.embed(torch.from_numpy(waveform)[None], RATE)[0]
            torch.testing.assert_close(vectors[name][number], expected, atol=1e-5, rtol=1e-4)
    assert vectors[LOGMEL].shape == (21, 320)


def test_logmel_baseline_is_mean_and_deviation_of_bands_and_their_differences():
    front_end = LogMel(INFO.features)
    waveform = tone("middle", 3) / np.float32(32768)
    logmel = front_end(torch.from_numpy(waveform)[None], centred=True)[0, 0].numpy()
    steps = np.diff(logmel, axis=1)
    expected = np.concatenate([logmel.mean(1), logmel.std(1), steps.mean(1), steps.std(1)])
    np.testing.assert_allclose(logmel_statistics(waveform, front_end), expected, atol=1e-4)
    assert torch.isfinite(logmel_statistics(waveform[:100], front_end)).all()


def test_vectors_are_made_once(tmp_path, monkeypatch):
    task = read_task(write_tones(tmp_path / "task", 2, 1, 1))
    first = clip_vectors(task, sources(Encoder(tiny(), INFO)), RATE, tmp_path / "cache")
    reads = count_reads(monkeypatch)
    again = clip_vectors(task, sources(Encoder(tiny(), INFO)), RATE, tmp_path / "cache")
    assert not reads
    for name, rows in first.items():
        assert torch.equal(again[name], rows)
    # Other labels and splits of the same clips need no new vectors.
    clips = tuple(replace(clip, labels=(0,), split="train") for clip in task.clips)
    clip_vectors(replace(task, clips=clips), sources(Encoder(tiny(), INFO)), RATE, tmp_path / "cache")
    assert not reads


def test_other_weights_statistics_or_audio_are_embedded_anew(tmp_path, monkeypatch):
    task = read_task(write_tones(tmp_path / "task", 2, 1, 1))
    encoder = Encoder(tiny(), INFO)
    clip_vectors(task, sources(encoder), RATE, tmp_path / "cache")
    reads = count_reads(monkeypatch)
    names = {path.name.partition("-")[0] for path in (tmp_path / "cache").iterdir()}
    assert names == {TRAINED, RANDOM, LOGMEL}

    def made_anew(encoder: Encoder) -> set[str]:
        before = set((tmp_path / "cache").iterdir())
        reads.clear()
        clip_vectors(task, sources(encoder), RATE, tmp_path / "cache")
        return {path.name.partition("-")[0] for path in set((tmp_path / "cache").iterdir()) - before}

    assert made_anew(Encoder(tiny(6), INFO)) == {TRAINED}
    assert len(reads) == len(task.clips)
    assert made_anew(encoder.for_dataset([noise(8000) / np.float32(32768)], RATE)) == {TRAINED, RANDOM}
    assert made_anew(Encoder(tiny(), INFO, normalization="batch")) == {TRAINED, RANDOM}
    os.utime(task.clips[0].path, ns=(1, 1))
    assert made_anew(encoder) == {TRAINED, RANDOM, LOGMEL}
    assert made_anew(encoder) == set()


def test_damaged_cache_is_made_again(tmp_path, caplog):
    task = read_task(write_tones(tmp_path / "task", 1, 1, 1))
    first = clip_vectors(task, sources(Encoder(tiny(), INFO)), RATE, tmp_path / "cache")
    damaged = next((tmp_path / "cache").glob("trained-*"))
    expected = first[TRAINED].clone()
    damaged.write_bytes(damaged.read_bytes()[:100])
    again = clip_vectors(task, sources(Encoder(tiny(), INFO)), RATE, tmp_path / "cache")
    assert torch.equal(again[TRAINED], expected)
    assert "no longer readable" in caplog.text


def test_unreadable_clip_is_left_out_and_many_are_an_error(tmp_path, caplog):
    task = read_task(write_tones(tmp_path / "task", 2, 1, 1))
    task.clips[4].path.write_bytes(b"no audio")
    vectors = clip_vectors(task, sources(Encoder(tiny(), INFO)), RATE, tmp_path / "cache")
    assert vectors[TRAINED].isnan().any(1).nonzero().flatten().tolist() == [4]
    assert "left out" in caplog.text
    task.clips[5].path.write_bytes(b"no audio")
    with pytest.raises(DataError, match=r"2 of 12 clips can't be read .* train/low1\.wav"):
        clip_vectors(task, sources(Encoder(tiny(), INFO)), RATE, tmp_path / "cache")
    assert not list((tmp_path / "cache").glob("*.tmp"))


def test_dataset_normalization_measures_the_clips_trained_on(tmp_path, run):
    folder = write_tones(tmp_path / "task", 3, 1, 1)
    about, (outcome,) = probe(str(run), [str(folder)], KNN, normalization="dataset")
    task = read_task(folder)
    clips = [clip_waveform(clip, RATE) for clip in task.clips if clip.split == "train"]
    expected = Encoder(tiny(), INFO).for_dataset(clips, RATE).statistics
    assert outcome.statistics == pytest.approx(tuple(expected))
    assert about["normalization"] == "dataset"
    assert not about.keys() & {"mean", "std"}
    about, _ = probe(str(run), [str(folder)], KNN)
    assert (about["mean"], about["std"]) == (-6.5, 3.5)


def test_tasks_before_one_that_fails_are_written_and_printed(tmp_path, run, capsys):
    one = write_tones(tmp_path / "one", 3, 1, 1)
    two = write_hear(
        tmp_path / "two", {split: tone_files(1) for split in ("train", "valid", "test")}, task_name="broken"
    )
    for path in (two / "16000" / "valid").iterdir():
        path.write_bytes(b"no audio")
    out = tmp_path / "report.json"
    with pytest.raises(DataError, match="broken: 3 of 9 clips can't be read"):
        report(str(run), [str(one), str(two)], KNN, out)
    written = json.loads(out.read_text())
    assert [task["task"] for task in written["tasks"]] == ["tones"]
    assert written["to_come"] == ["broken"]
    assert "| tones " in capsys.readouterr().out
    content = out.read_text()
    with pytest.raises(ConfigError, match=r"report\.json: is there already; .*--overwrite"):
        report(str(run), [str(one)], KNN, out)
    assert out.read_text() == content
    report(str(run), [str(one)], KNN, out, overwrite=True)
    assert json.loads(out.read_text())["to_come"] == []


def test_what_would_fail_at_the_end_is_named_before_any_work(tmp_path, run, monkeypatch):
    folder = write_tones(tmp_path / "task", 1, 1, 1)
    reads = count_reads(monkeypatch)
    with pytest.raises(ConfigError, match=r"is a folder; name a file"):
        report(str(run), [str(folder)], KNN, tmp_path)
    metadata = json.loads((folder / "task_metadata.json").read_text())
    (folder / "task_metadata.json").write_text(json.dumps(metadata | {"evaluation": ["top1_acc", "mAP"]}))
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(ConfigError, match="scikit-learn"):
        probe(str(run), [str(folder)], KNN)
    assert not reads


def test_long_recordings_are_not_read_ahead_in_dozens(tmp_path, monkeypatch):
    task = read_task(write_tones(tmp_path / "task", 3, 1, 1))
    size = task.clips[0].path.stat().st_size
    alone = [1] * len(task.clips)
    for most, expected in ((2**20, [15]), (4 * size, [4, 4, 4, 3]), (size // 2, alone)):
        monkeypatch.setattr(probe_vectors, "BATCH_BYTES", most)
        batches = list(probe_vectors._batches(task.clips, RATE))
        assert [len(batch) for batch in batches] == expected
        waveforms = [waveform for batch in batches for waveform in batch]
        assert all(map(np.array_equal, waveforms, [clip_waveform(clip, RATE) for clip in task.clips]))


def test_command_prints_a_row_per_task_and_writes_everything(tmp_path, run):
    one = write_tones(tmp_path / "one", 8, 3, 4)
    two = write_hear(
        tmp_path / "two", {f"fold0{n}": tone_files(4) for n in range(3)}, split_mode="presplit_kfold", task_name="two"
    )
    out = tmp_path / "reports" / "report.json"
    words = ["probe", str(run), str(one), str(two), "--protocol", "knn", "--seeds", "2", "--out", str(out)]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    rows = [line for line in done.stdout.splitlines() if line.startswith("|")]
    assert [row.split("|")[1].strip() for row in rows] == ["task", "-----", "tones", "two"]
    assert "24+9/12 clips" in rows[2]
    assert "12+12/36 clips, 3 folds" in rows[3]
    written = json.loads(out.read_text())
    assert written["encoder_sha256"] == Encoder(tiny(), INFO).digest()
    assert written["settings"] == {
        "protocol": "knn",
        "seeds": 2,
        "labels_per_class": None,
        "shuffle_labels": False,
    }
    assert [task["task"] for task in written["tasks"]] == ["tones", "two"]
    scored = written["tasks"][1]["scored"]
    assert set(scored) == {TRAINED, RANDOM, LOGMEL}
    assert {"fold", "seed", "neighbours", "top1_acc"} == set(scored[TRAINED]["fits"][0])
    assert len(scored[TRAINED]["fits"]) == 6
    assert f"{100 * scored[LOGMEL]['mean']:.1f}" in rows[3]
    assert {path.name.partition("-")[0] for path in (run / "probe").iterdir()} == {TRAINED, RANDOM, LOGMEL}


def test_evaluation_clips_of_audioset_are_counted(tmp_path, run):
    train = write_shards(tmp_path / "train", [["dog"], ["cat"], ["dog", "cat"], ["cat"]] * 5)
    evaluation = write_shards(tmp_path / "eval", [["dog"], ["cat"], ["dog", "cat"]])
    official = Official(("eval_segments.csv",), 20371, 3, "0" * 64)
    write_index(replace(index_of(evaluation), official=official))
    printed = report(str(run), [str(train)], KNN, None, test=str(evaluation))
    assert "3 of 20,371 eval clips" in printed
    assert "| mAP " in printed


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["{run}", "{task}", "--valid", "{task}"], "goes with --test"),
        (["{run}", "{task}", "{task}", "--test", "{task}"], "goes with one folder"),
        (["{run}", "{task}", "{task}/../task"], "task: is named twice"),
        (["{run}", "{task}/.."], "holds 1; name those wanted: "),
        (["{run}", "nowhere"], "nowhere: is no task"),
        (["{run}", "nowhere", "--recipe", "esc50"], "nowhere: no such folder"),
        (["{run}", "{task}", "--recipe", "esc10"], "'esc10' is unknown"),
        (["nowhere", "{task}"], "nowhere"),
        (["{run}", "{task}", "--device", "cuda:77"], "GPUs here"),
    ],
)
def test_wrong_use_is_one_message(tmp_path, run, arguments, says):
    task = write_tones(tmp_path / "task", 1, 1, 1)
    done = CliRunner().invoke(app, ["probe", *[argument.format(run=run, task=task) for argument in arguments]])
    assert isinstance(done.exception, MsmError), done.output
    assert says in str(done.exception)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"protocol": "foo"}, "protocol = 'foo': must be one of linear, hear, knn"),
        ({"seeds": 0}, "seeds = 0: must be"),
        ({"labels_per_class": 2.5}, "labels_per_class = 2.5: must be"),
    ],
)
def test_settings_that_can_not_be_are_named(settings, message):
    with pytest.raises(ConfigError, match=message):
        Settings(**settings)


def test_scores_that_do_not_fit_a_probe_are_named_before_any_work(tmp_path, run, monkeypatch):
    folder = write_tones(tmp_path / "task", 1, 1, 1)
    metadata = json.loads((folder / "task_metadata.json").read_text())
    (folder / "task_metadata.json").write_text(json.dumps(metadata | {"evaluation": ["segment_1s_er"]}))
    reads = count_reads(monkeypatch)
    with pytest.raises(DataError, match="segment_1s_er"):
        probe(str(run), [str(folder)], KNN)
    assert not reads


def count_reads(monkeypatch) -> list[TaskClip]:
    """The clips decoded from now on."""
    reads = []
    monkeypatch.setattr(
        probe_vectors, "clip_waveform", lambda clip, rate: (reads.append(clip), clip_waveform(clip, rate))[1]
    )
    return reads


def write_shards(folder: Path, labels: list[list[str]]) -> Path:
    folder.mkdir()
    with tarfile.open(folder / "clips-000000.tar", "w") as tar:
        for number, names in enumerate(labels):
            content = {".flac": encode(noise(4000, seed=number)), ".json": json.dumps({"labels": names}).encode()}
            for suffix, data in content.items():
                member = tarfile.TarInfo(f"clip{number}{suffix}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    index_of(folder)
    return folder


def index_of(folder: Path):
    return index_shards(sorted(folder.glob("*.tar")), Features())


def test_page_shows_commands_and_recipes_that_exist():
    page = HERE.parent / "docs" / "probes.md"
    found = commands(page)
    assert len(found) >= 6
    for words in found:
        parse(words)
    text = page.read_text(encoding="utf-8")
    rows = [line.split("|")[1].strip() for line in text.splitlines() if line.startswith("|")]
    assert set(RECIPES) <= set(rows)
    options = {option for parameter in get_command(app).commands["probe"].params for option in parameter.opts}
    assert set(re.findall(r"`(--[a-z-]+)", text)) <= options


def test_python_of_the_page_runs(tmp_path, run):
    page = (HERE.parent / "docs" / "probes.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    folder = write_tones(tmp_path / "task", 3, 1, 2)
    code = code.replace("runs/quickstart", str(run)).replace("tasks/order", str(folder)).replace("linear", "knn")
    names: dict[str, object] = {}
    exec(code, names)
    (outcome,) = names["outcomes"]
    assert set(outcome.scored) == {TRAINED, RANDOM, LOGMEL}
