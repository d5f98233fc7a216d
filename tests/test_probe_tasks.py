"""The probe tasks: reproducible, readable, solvable, and silent to who only looks at the average over time."""

import csv
import fcntl
import json
import os
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from typer.testing import CliRunner

from msm_dist.config import Features
from msm_dist.data import probe_tasks
from msm_dist.data.commands import app
from msm_dist.data.probe_sounds import CLIP_SAMPLES, RATE, TEXTURES, TONES, VOICES, record
from msm_dist.data.probe_tasks import (
    CONTOURS,
    RATES_HZ,
    RHYTHMS,
    SPLITS,
    TASKS,
    VOWEL_ORDERS,
    default_clips,
    make_clip,
    write_tasks,
)
from msm_dist.errors import ConfigError

HONEST = [name for name, task in TASKS.items() if not task.spectrum_carries_label]
REARRANGED = ("order", "contour", "glide", "rhythm", "vowels")
"""Tasks whose classes are the same sounds in other places or backwards; the others have other sounds."""
NUISANCES = ("tilt_db", "onset_seconds", "snr_db", "level_db")


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("tasks")
    write_tasks(out, seed=3, clips=(3, 1, 2))
    return out


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_same_seed_gives_the_same_bytes_whatever_else_is_written(written, tmp_path):
    write_tasks(tmp_path, ["vowels"], seed=3, clips=(3, 1, 2))
    assert contents(tmp_path / "vowels") == contents(written / "vowels")


def test_a_clip_does_not_depend_on_how_many_there_are(written, tmp_path):
    write_tasks(tmp_path, ["rhythm"], seed=3, clips=(2, 1, 1))
    for path in (tmp_path / "rhythm").rglob("*.wav"):
        assert path.read_bytes() == (written / path.relative_to(tmp_path)).read_bytes()


def test_clips_of_all_tasks_splits_and_seeds_differ(written, tmp_path):
    write_tasks(tmp_path, ["order", "glide"], seed=4, clips=(3, 1, 2))
    wavs = [path.read_bytes() for folder in (written, tmp_path) for path in folder.rglob("*.wav")]
    classes = sum(len(task.labels) for task in TASKS.values())
    assert len(wavs) == len(set(wavs)) == 6 * (classes + 4)


@pytest.mark.parametrize("name", TASKS)
def test_layout_is_that_of_the_kit(written, name):
    folder = written / name
    metadata = json.loads((folder / "task_metadata.json").read_text())
    expected = {
        "task_name": name,
        "embedding_type": "scene",
        "prediction_type": "multiclass",
        "split_mode": "trainvaltest",
        "splits": ["train", "valid", "test"],
        "sample_duration": 3.0,
        "evaluation": ["top1_acc"],
    }
    assert metadata | expected == metadata
    rows = list(csv.DictReader((folder / "labelvocabulary.csv").open()))
    assert [int(row["idx"]) for row in rows] == list(range(len(TASKS[name].labels)))
    assert tuple(row["label"] for row in rows) == TASKS[name].labels
    made_of = json.loads((folder / "clips.json").read_text())
    for split, count in zip(SPLITS, (3, 1, 2), strict=True):
        labels = json.loads((folder / f"{split}.json").read_text())
        assert sorted(labels) == sorted(path.name for path in (folder / "16000" / split).iterdir())
        given = [label for (label,) in labels.values()]
        assert given == list(TASKS[name].labels) * count
        assert given == [made_of[file]["label"] for file in labels]
        for file in labels:
            info = soundfile.info(folder / "16000" / split / file)
            assert (info.frames, info.samplerate, info.channels) == (CLIP_SAMPLES, 16000, 1)
            assert (info.format, info.subtype) == ("WAV", "PCM_16")
    assert len(made_of) == 6 * len(TASKS[name].labels)


def test_sizes_are_those_of_the_two_protocols():
    for name, task in TASKS.items():
        train, valid, test = default_clips(name)
        assert (train, valid) == (50, 20)
        assert test >= 40
        assert test * len(task.labels) >= 200


def test_what_is_there_stays_and_other_clips_are_refused(written):
    before = contents(written)
    write_tasks(written, ["order"], seed=3, clips=(3, 1, 2))
    for seed, clips in ((9, (3, 1, 2)), (3, (4, 1, 2))):
        with pytest.raises(ConfigError, match=r"order: holds other clips .* choose another output folder"):
            write_tasks(written, ["order"], seed=seed, clips=clips)
    assert contents(written) == before


def test_a_folder_that_is_no_task_is_refused(tmp_path):
    (tmp_path / "order").mkdir()
    (tmp_path / "order" / "mine.txt").write_text("keep")
    with pytest.raises(ConfigError, match="not a task that this command has written"):
        write_tasks(tmp_path, ["order"], clips=(1, 1, 1))
    assert (tmp_path / "order" / "mine.txt").read_text() == "keep"


def test_a_broken_start_leaves_no_half_task_and_the_next_one_mends_it(tmp_path, monkeypatch):
    whole, calls = probe_tasks.make_clip, []

    def failing(*arguments):
        calls.append(arguments)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return whole(*arguments)

    monkeypatch.setattr(probe_tasks, "make_clip", failing)
    with pytest.raises(KeyboardInterrupt):
        write_tasks(tmp_path, ["glide"], clips=(2, 1, 1))
    assert not (tmp_path / "glide").exists()
    write_tasks(tmp_path, ["glide"], clips=(2, 1, 1))
    assert [path.name for path in tmp_path.iterdir()] == ["glide"]


def test_a_folder_in_use_is_refused(tmp_path):
    descriptor = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    try:
        with pytest.raises(ConfigError, match="another process is writing"):
            write_tasks(tmp_path, ["order"], clips=(1, 1, 1))
    finally:
        os.close(descriptor)
    write_tasks(tmp_path, ["order"], clips=(1, 1, 1))


def test_command_writes_tasks_and_names_what_is_wrong(tmp_path):
    run = CliRunner().invoke
    done = run(app, ["tasks", str(tmp_path), "--task", "order", "--task", "pitch", "--clips", "1", "1", "1"])
    assert done.exit_code == 0, done.output
    assert "order: 6 clips" in done.output
    assert sorted(path.name for path in tmp_path.iterdir()) == ["order", "pitch"]
    assert isinstance(run(app, ["tasks", str(tmp_path), "--task", "ordr"]).exception, ConfigError)
    assert isinstance(run(app, ["tasks", str(tmp_path), "--clips", "1", "0", "1"]).exception, ConfigError)


@pytest.mark.parametrize("name", TASKS)
def test_test_clips_alone_have_the_unseen_timbres_half_of_each_class(name):
    known = {*TONES[False], *TEXTURES[False], *VOICES[False]}
    unseen = {*TONES[True], *TEXTURES[True], *VOICES[True]}
    assert not known & unseen
    count = 4 * len(TASKS[name].labels)
    for split in SPLITS:
        for number in range(count):
            _, made = make_clip(name, 0, split, number)
            expected = unseen if split == "test" and number * 4 // count % 2 else known
            assert set(made["timbre"].split()) <= expected
            assert made["unseen_timbre"] is (expected is unseen)


@pytest.mark.parametrize("name", TASKS)
def test_disturbances_do_not_know_the_class(name):
    for number in (0, 5):
        found = [make_clip(name, 0, "train", number, label)[1] for label in range(len(TASKS[name].labels))]
        # The onset is a place in the room that the event leaves; events of one draw are equally long in all classes.
        assert all(made[key] == found[0][key] for made in found for key in (*NUISANCES, "noise"))


def test_disturbances_span_what_is_promised():
    event = sum(np.sin(2 * np.pi * hz * np.arange(RATE) / RATE) for hz in (500, 4000))
    made = [record(event, np.random.default_rng(seed)) for seed in range(300)]
    spans = {key: (min(m[key] for _, m in made), max(m[key] for _, m in made)) for key in NUISANCES}
    for key, low, high in (("snr_db", 0, 20), ("level_db", -53, -13), ("tilt_db", -4, 4), ("onset_seconds", 0.1, 1.9)):
        assert low <= spans[key][0] <= low + 0.05 * (high - low)
        assert high - 0.05 * (high - low) <= spans[key][1] <= high
    assert {m["noise"] for _, m in made} == {"brown", "pink", "white", "blue"}
    for clip, m in made:
        assert len(clip) == CLIP_SAMPLES
        assert np.abs(clip).max() < 1
        start = round(m["onset_seconds"] * RATE)
        outside = np.concatenate([clip[:start], clip[start + RATE :]])
        inside = clip[start : start + RATE]
        noise, level = (10 * np.log10(np.mean(x**2)) for x in (outside, inside))
        assert level == pytest.approx(m["level_db"] + 10 * np.log10(1 + 10 ** (-m["snr_db"] / 10)), abs=1)
        assert noise == pytest.approx(m["level_db"] - m["snr_db"], abs=1.5)
        low, high = (20 * np.log10(np.abs(np.fft.rfft(inside))[hz]) for hz in (500, 4000))
        assert high - low == pytest.approx(3 * m["tilt_db"], abs=1)


@pytest.mark.parametrize("name", HONEST)
def test_average_spectrum_does_not_tell_the_class(name):
    """Nearest centroid and least squares stay within 3.3 deviations of chance, on means with and without deviations."""
    num_classes = len(TASKS[name].labels)
    (train, known), (test, wanted) = (statistics(name, split, 120) for split in ("train", "test"))
    chance = 1 / num_classes
    bound = chance + 3.3 * np.sqrt(chance * (1 - chance) / len(wanted))
    for width in (80, 160):
        mean, std = train[:, :width].mean(0), train[:, :width].std(0)
        x, z = ((part[:, :width] - mean) / std for part in (train, test))
        targets = np.eye(num_classes)[known]
        centroids = (targets.T @ x) / targets.sum(0)[:, None]
        nearest = ((z[:, None] - centroids) ** 2).sum(-1).argmin(1)
        least_squares = (z @ np.linalg.solve(x.T @ x + 30 * np.eye(width), x.T @ targets)).argmax(1)
        assert (nearest == wanted).mean() < bound
        assert (least_squares == wanted).mean() < bound


def test_average_spectrum_tells_pitch():
    (train, known), (test, wanted) = (statistics("pitch", split, 160) for split in ("train", "valid"))
    mean, std = train[:, :80].mean(0), train[:, :80].std(0)
    x, z = ((part[:, :80] - mean) / std for part in (train, test))
    guess = (z @ np.linalg.solve(x.T @ x + 30 * np.eye(80), x.T @ np.eye(8)[known])).argmax(1)
    assert (guess == wanted).mean() > 0.4


@pytest.mark.parametrize("name", REARRANGED)
def test_the_same_draw_in_all_classes_has_the_same_average_spectrum(name):
    labels = range(len(TASKS[name].labels))
    averages = np.array(
        [[log_mel(make_clip(name, 5, "train", number, label)[0]).mean(1) for label in labels] for number in range(8)]
    )
    between_clips = averages.mean(1).std(0).mean()
    between_classes = np.abs(averages - averages[:, :1]).mean((0, 2)).max()
    assert between_classes < 0.02 * between_clips
    full = [log_mel(make_clip(name, 5, "train", 0, label)[0]) for label in (0, 1)]
    assert np.abs(full[0] - full[1]).mean() > 5 * between_classes


@pytest.mark.parametrize("name", ["am_rate", "fm_rate"])
def test_rates_of_the_same_draws_have_the_same_spectrum_on_average(name):
    """Swings begin and end anywhere, so single clips differ; their mean and deviation do not lean with the class."""
    labels = range(len(TASKS[name].labels))
    clips = [[log_mel(make_clip(name, 5, "train", number, label)[0]) for label in labels] for number in range(12)]
    averages = np.array([[(clip.mean(1), clip.std(1)) for clip in draw] for draw in clips])
    between_clips = averages.mean(1).std(0).mean(1)
    leaning = np.abs((averages - averages.mean(1, keepdims=True)).mean(0)).mean(2)
    assert (leaning < 0.03 * between_clips).all()


def test_classes_are_the_same_parts_in_other_places():
    for parts in (list(CONTOURS.values()), [order.split("_") for order in VOWEL_ORDERS]):
        assert len({tuple(part) for part in parts}) == len(parts)
        assert len({tuple(sorted(part)) for part in parts}) == 1
        assert all(len(set(part)) == len(part) for part in parts)
    patterns = [tuple(np.roll(steps, turn)) for steps in RHYTHMS.values() for turn in range(4)]
    assert {(len(pattern), sum(pattern)) for pattern in patterns} == {(4, 8)}
    assert len(set(patterns)) == 1 + 2 + 4 + 4  # no rotation of one is another


@pytest.mark.parametrize("name", HONEST)
def test_the_clean_sound_tells_the_class(name):
    """A detector that looks at the order in time solves the task without background."""
    labels = range(len(TASKS[name].labels))
    made = [
        (label, TASKS[name].make(np.random.default_rng([seed, label]), label, seed % 2 == 1).waveform)
        for seed in range(24 // len(labels))
        for label in labels
    ]
    right = sum(DETECTORS[name](waveform) == label for label, waveform in made)
    assert right >= 0.85 * len(made)


def test_pitches_and_sources_are_those_of_their_classes():
    for number in range(32):
        _, made = make_clip("pitch", 0, "test", number)
        nominal = 147 * 2 ** (3 * (number % 8) / 12)
        assert abs(12 * np.log2(made["pitches"][0] / nominal)) <= 0.5
        _, made = make_clip("sources", 0, "test", number)
        assert len(made["pitches"]) == 1 + number % 4
        assert np.all(np.diff(np.sort(np.log2(made["pitches"]))) > 1.9 / 12)


def statistics(name: str, split: str, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Mean and deviation of each mel band [count, 160] of clips that no command writes, and their classes [count]."""
    spectra = [log_mel(make_clip(name, 77, split, number)[0]) for number in range(count)]
    num_classes = len(TASKS[name].labels)
    return np.array([np.append(s.mean(1), s.std(1)) for s in spectra]), np.arange(count) % num_classes


def log_mel(clip: np.ndarray) -> np.ndarray:
    """[80, frames] at a plain hop, faster than the front end: what it is made with doesn't matter here."""
    frames = np.lib.stride_tricks.sliding_window_view(clip, 400)[::160] * np.hanning(400)
    return np.log((np.abs(np.fft.rfft(frames)) ** 2) @ FILTERS + 1.2e-7).T


def order_of(event: np.ndarray) -> int:
    """Which half is the more periodic one."""
    first, second = sounding(event)
    return int(periodicity(first)[1] < periodicity(second)[1])


def contour_of(event: np.ndarray) -> int:
    heights = np.log([periodicity(note)[0] for note in sounding(event)])
    shapes = np.array(list(CONTOURS.values()), dtype=float)
    return int(np.argmax([np.corrcoef(shape, heights)[0, 1] for shape in shapes]))


def glide_of(event: np.ndarray) -> int:
    rises = []
    for call in sounding(event):
        quarter = len(call) // 4
        # What is left of a call when its halves below zero and its fine structure are gone has its pitch.
        rough = np.convolve(np.maximum(call, 0), np.hanning(25), "same")
        rough -= np.convolve(rough, np.full(160, 1 / 160), "same")
        first, last = (periodicity(part, 190, 1000)[0] for part in (rough[:quarter], rough[-quarter:]))
        rises.append(np.log(last / first))
    return int(np.median(rises) < 0)


def rhythm_of(event: np.ndarray) -> int:
    energy = (event[: len(event) // 80 * 80].reshape(-1, 80) ** 2).sum(1) > 0
    hits = np.flatnonzero(np.diff(energy.astype(int), prepend=0) == 1)
    intervals = np.diff(hits)[:4] / np.diff(hits).min()
    known = [sorted(np.array(pattern) / min(pattern)) for pattern in RHYTHMS.values()]
    return int(np.argmin([np.abs(sorted(intervals) - np.array(pattern)).sum() for pattern in known]))


def am_rate_of(event: np.ndarray) -> int:
    level = 10 * np.log10((event[800:-800][: (len(event) - 1600) // 160 * 160].reshape(-1, 160) ** 2).mean(1) + 1e-6)
    return nearest_rate(level)


def fm_rate_of(event: np.ndarray) -> int:
    frames = np.lib.stride_tricks.sliding_window_view(event[800:-800], 480)[::160]
    return nearest_rate(np.log([periodicity(frame, 150, 600)[0] for frame in frames]))


def vowels_of(event: np.ndarray) -> int:
    """a is strong between 700 and 1700 Hz, i above 2000 Hz, u below 600 Hz."""
    votes = []
    for part in sounding(event):
        power, hz = np.abs(np.fft.rfft(part)) ** 2, np.fft.rfftfreq(len(part), 1 / RATE)
        share = {
            "u": power[hz < 520].sum(),
            "a": power[(hz > 750) & (hz < 1700)].sum(),
            "i": 20 * power[hz > 2500].sum(),
        }
        votes.append({name: np.log(value / power.sum() + 1e-6) for name, value in share.items()})
    scores = [sum(vote[name] for vote, name in zip(votes, known.split("_"), strict=True)) for known in VOWEL_ORDERS]
    return int(np.argmax(scores))


DETECTORS = {
    "order": order_of,
    "contour": contour_of,
    "glide": glide_of,
    "rhythm": rhythm_of,
    "am_rate": am_rate_of,
    "fm_rate": fm_rate_of,
    "vowels": vowels_of,
}


def sounding(event: np.ndarray) -> list[np.ndarray]:
    """The parts between silences of 25 ms and more."""
    silent = np.lib.stride_tricks.sliding_window_view(np.abs(event), 400).max(1) == 0
    loud = np.ones(len(event), dtype=int)
    for start in np.flatnonzero(silent):
        loud[start : start + 400] = 0
    edges = np.flatnonzero(np.diff(loud, prepend=0, append=0))
    return [event[begin:end] for begin, end in edges.reshape(-1, 2)]


def periodicity(sound: np.ndarray, low: float = 120, high: float = 900) -> tuple[float, float]:
    """The pitch in Hz by autocorrelation, and how periodic it is, 0 to 1."""
    spectrum = np.fft.rfft(sound, 2 * len(sound))
    correlation = np.fft.irfft(np.abs(spectrum) ** 2)[: len(sound)]
    correlation /= correlation[0] * (1 - np.arange(len(sound)) / len(sound) * 0.9)
    lags = np.arange(int(RATE / high), min(int(RATE / low), len(sound) - 1))
    values = correlation[lags]
    best = lags[np.flatnonzero(values > 0.85 * values.max())[0] :][:8]
    lag = best[np.argmax(correlation[best])]
    return RATE / lag, float(values.max())


def nearest_rate(curve: np.ndarray) -> int:
    """The class whose rate is nearest to the strongest swing of a curve of 100 values a second."""
    power = np.abs(np.fft.rfft((curve - curve.mean()) * np.hanning(len(curve)), 1024))
    hz = np.fft.rfftfreq(1024, 0.01)
    peak = hz[np.argmax(power * ((hz > 1.2) & (hz < 15)))]
    return int(np.argmin(np.abs(np.log(peak / np.array(list(RATES_HZ.values()))))))


def _filters() -> np.ndarray:
    from msm_dist.features import mel_filters

    return mel_filters(Features()).to(torch.float64).numpy()


FILTERS = _filters()
