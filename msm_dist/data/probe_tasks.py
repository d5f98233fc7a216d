"""Probe tasks: small labelled sets of synthetic clips in which the time-averaged spectrum mostly carries no label.

In: names of tasks, a seed, clips per class. Out: a folder per task as the HEAR 2021 kit reads it (16 kHz PCM16 wav
files of 3 s in train, valid and test), with clips.json, which says how every clip was made. The same seed gives the
same bytes, and a clip does not depend on how many there are. docs/probe_tasks.md says what carries each label.
Fails with ConfigError on an unknown task or a folder that holds another output.
"""

import errno
import fcntl
import io
import json
import os
import shutil
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import soundfile

from msm_dist.data.clips import Progress, quiet
from msm_dist.data.probe_sounds import (
    CLIP_SECONDS,
    FORMANTS,
    RATE,
    TEXTURES,
    TONES,
    VOICES,
    Rng,
    log_uniform,
    record,
    unit,
    vowel,
)
from msm_dist.errors import ConfigError
from msm_dist.files import write_atomically

VERSION = 1  # of the generator: other sounds or draws are another version
SPLITS = ("train", "valid", "test")
TRAIN_CLIPS, VALID_CLIPS = 50, 20  # of each class
TEST_CLIPS, LEAST_TEST_CLIPS = 200, 40  # of a task; of each class
MOST_CLIPS = 100_000  # of a class and split
UNFINISHED = ".unfinished"

NUM_NOTES = 8
CONTOURS = {  # the same notes in other orders, counted from the lowest
    "rise": (0, 1, 2, 3, 4, 5, 6, 7),
    "fall": (7, 6, 5, 4, 3, 2, 1, 0),
    "rise_fall": (0, 2, 4, 6, 7, 5, 3, 1),
    "fall_rise": (7, 5, 3, 1, 0, 2, 4, 6),
}
RHYTHMS = {  # steps from hit to hit, four hits in eight steps
    "even": (2, 2, 2, 2),
    "gallop": (1, 3, 1, 3),
    "cluster": (1, 1, 1, 5),
    "syncopated": (1, 2, 2, 3),
}
CYCLES = 2
RATES_HZ = {"slow": 2.0, "medium": 3.2, "fast": 5.1, "rapid": 8.2}
VOWEL_ORDERS = tuple("_".join(order) for order in permutations(sorted(FORMANTS)))
NUM_PITCHES, LOWEST_HZ, SEMITONES_APART = 8, 147.0, 3
MOST_SOURCES = 4


@dataclass(frozen=True)
class Event:
    """A clean sound [S] of a root mean square of 1, and what it was made of."""

    waveform: np.ndarray
    made_of: dict[str, Any]


@dataclass(frozen=True)
class ProbeTask:
    """One task: its classes, and how an event of a class is made."""

    labels: tuple[str, ...]
    make: Callable[[Rng, int, bool], Event]
    """(generator, class, whether the timbre is one that only test clips have). What is drawn does not depend on the
    class, save for the number of sources: the class only says how it is arranged."""
    spectrum_carries_label: bool = False


def order(rng: Rng, label: int, unseen: bool) -> Event:
    """A tone and a noise, or the other way round."""
    tone_name, tone = _pick(rng, TONES[unseen])
    texture_name, texture = _pick(rng, TEXTURES[unseen])
    samples, gap = _samples(rng.uniform(0.3, 0.7)), _samples(rng.uniform(0.05, 0.2))
    pitch, softer = log_uniform(rng, 150, 500), 10 ** (rng.uniform(-4, 4) / 20)
    shape = _fade(samples, rng.uniform(0.01, 0.06))
    parts = [tone(np.full(samples, pitch), rng) * shape, texture(samples, rng) * shape * softer]
    first, second = parts if label == 0 else parts[::-1]
    return _event(np.concatenate([first, np.zeros(gap), second]), timbre=f"{tone_name} {texture_name}")


def contour(rng: Rng, label: int, unseen: bool) -> Event:
    """Eight notes of different pitch that rise, fall, rise and fall, or fall and rise."""
    name, tone = _pick(rng, TONES[unseen])
    samples, gap = _samples(rng.uniform(0.11, 0.2)), _samples(0.03)
    pitches = log_uniform(rng, 150, 350) * 2 ** (rng.uniform(0.7, 1.3) * np.arange(NUM_NOTES) / (NUM_NOTES - 1))
    shape = _fade(samples, 0.015) * np.exp(-rng.uniform(0, 2) * np.arange(samples) / samples)
    notes = [np.append(tone(np.full(samples, pitch), rng) * shape, np.zeros(gap)) for pitch in pitches]
    sequence = list(CONTOURS.values())[label]
    return _event(np.concatenate([notes[i] for i in sequence]), timbre=name, pitches=pitches[list(sequence)].tolist())


def glide(rng: Rng, label: int, unseen: bool) -> Event:
    """Four to six short calls that all glide up, or all down."""
    name, tone = _pick(rng, TONES[unseen])
    count, samples = int(rng.integers(4, 7)), _samples(rng.uniform(0.12, 0.24))
    low, octaves = log_uniform(rng, 200, 450), rng.uniform(0.5, 1.0)
    gaps = [_samples(gap) for gap in rng.uniform(0.06, 0.14, count)]
    frequency = low * 2 ** (octaves * np.arange(samples) / samples)
    calls = [tone(frequency if label == 0 else frequency[::-1], rng) * _fade(samples, 0.02) for _ in range(count)]
    parts = [part for call, gap in zip(calls, gaps, strict=True) for part in (call, np.zeros(gap))]
    return _event(np.concatenate(parts), timbre=name)


def rhythm(rng: Rng, label: int, unseen: bool) -> Event:
    """Eight equal hits in two cycles of eight steps, begun at any of the pattern's hits."""
    name, hit = _hit(rng, unseen)
    step, begin = _samples(rng.uniform(0.09, 0.15)), int(rng.integers(4))
    intervals = np.roll(list(RHYTHMS.values())[label], -begin)
    starts = step * np.concatenate([[0], np.cumsum(np.tile(intervals, CYCLES))[:-1]])
    waveform = np.zeros(step * 8 * CYCLES)
    for start in starts:
        waveform[start : start + len(hit)] += hit
    return _event(waveform, timbre=name, hits_seconds=(starts / RATE).tolist())


def am_rate(rng: Rng, label: int, unseen: bool) -> Event:
    """A steady tone or noise whose level swings up and down 2 to 8 times a second."""
    samples = _samples(rng.uniform(1.6, 2.4))
    name, carrier = _steady(rng, samples, unseen)
    swing, rate = _swing(rng, label, samples)
    waveform = carrier * 10 ** (rng.uniform(8, 14) * swing / 20) * _fade(samples, 0.03)
    return _event(waveform, timbre=name, rate_hz=rate)


def fm_rate(rng: Rng, label: int, unseen: bool) -> Event:
    """A tone whose pitch swings up and down 2 to 8 times a second."""
    name, tone = _pick(rng, TONES[unseen])
    samples = _samples(rng.uniform(1.6, 2.4))
    swing, rate = _swing(rng, label, samples)
    frequency = log_uniform(rng, 200, 450) * 2 ** (rng.uniform(0.08, 0.18) * swing)
    return _event(tone(frequency, rng) * _fade(samples, 0.03), timbre=name, rate_hz=rate)


def vowels(rng: Rng, label: int, unseen: bool) -> Event:
    """The vowels a, i and u in one of six orders."""
    voice = str(rng.choice(VOICES[unseen]))
    samples, gap, scale = _samples(rng.uniform(0.25, 0.5)), _samples(0.05), rng.uniform(0.92, 1.12)
    frequency = np.full(samples, log_uniform(rng, 130, 300))
    shape = _fade(samples, 0.03)
    spoken = {name: vowel(voice, name, scale, frequency, rng) * shape for name in sorted(FORMANTS)}
    parts = [part for name in VOWEL_ORDERS[label].split("_") for part in (spoken[name], np.zeros(gap))]
    return _event(np.concatenate(parts), timbre=voice)


def pitch(rng: Rng, label: int, unseen: bool) -> Event:
    """A note of one of eight pitches, three semitones apart, each half a semitone off at most."""
    name, tone = _pick(rng, TONES[unseen])
    samples, cents = _samples(rng.uniform(0.8, 2.0)), rng.uniform(-50, 50)
    hertz = LOWEST_HZ * 2 ** ((SEMITONES_APART * label + cents / 100) / 12)
    shape = _fade(samples, 0.03) * np.exp(-rng.uniform(0, 2) * np.arange(samples) / samples)
    return _event(tone(np.full(samples, hertz), rng) * shape, timbre=name, pitches=[hertz])


def sources(rng: Rng, label: int, unseen: bool) -> Event:
    """One to four tones at once, two semitones apart at least, that begin and end apart; equal energy in all."""
    samples = _samples(rng.uniform(1.6, 2.4))
    candidates = rng.permutation(120 * 2 ** (np.arange(0, 32, 2) / 12)) * 2 ** (rng.uniform(0, 2) / 12)
    mixed, names, pitches = np.zeros(samples), [], candidates[: label + 1]
    for hertz in pitches:
        name, tone = _pick(rng, TONES[unseen])
        begin, end = _samples(rng.uniform(0, 0.35)), samples - _samples(rng.uniform(0, 0.35))
        part = tone(np.full(end - begin, hertz), rng) * _fade(end - begin, 0.03)
        mixed[begin:end] += part * 10 ** (rng.uniform(-3, 3) / 20)
        names.append(name)
    return _event(mixed, timbre=" ".join(names), pitches=pitches.tolist())


TASKS: dict[str, ProbeTask] = {
    "order": ProbeTask(("tone_then_noise", "noise_then_tone"), order),
    "contour": ProbeTask(tuple(CONTOURS), contour),
    "glide": ProbeTask(("up", "down"), glide),
    "rhythm": ProbeTask(tuple(RHYTHMS), rhythm),
    "am_rate": ProbeTask(tuple(RATES_HZ), am_rate),
    "fm_rate": ProbeTask(tuple(RATES_HZ), fm_rate),
    "vowels": ProbeTask(VOWEL_ORDERS, vowels),
    "pitch": ProbeTask(tuple(f"pitch_{i}" for i in range(NUM_PITCHES)), pitch, spectrum_carries_label=True),
    "sources": ProbeTask(tuple(f"sources_{i + 1}" for i in range(MOST_SOURCES)), sources, spectrum_carries_label=True),
}


def make_clip(name: str, seed: int, split: str, number: int, label: int | None = None) -> tuple[np.ndarray, dict]:
    """Clip `number` of a task's split: float [S] within -1..1, and how it was made.

    Classes take turns, so that the first 10 of each are the first 10 times as many clips; every second round of test
    clips has timbres that only they have. Another `label` gives the same draws and disturbances in another class.
    """
    task = TASKS[name]
    turn, own = divmod(number, len(task.labels))
    label = own if label is None else label
    unseen = split == "test" and turn % 2 == 1
    key = [seed, zlib.crc32(name.encode()), SPLITS.index(split), number]
    event = task.make(np.random.default_rng([*key, 0]), label, unseen)
    clip, disturbed = record(event.waveform, np.random.default_rng([*key, 1]))
    return clip, {"label": task.labels[label], "unseen_timbre": unseen, **event.made_of, **disturbed}


def default_clips(name: str) -> tuple[int, int, int]:
    """Clips per class of training, validation and test: 50, 20, and 200 in the task's test, but 40 per class."""
    return TRAIN_CLIPS, VALID_CLIPS, max(LEAST_TEST_CLIPS, TEST_CLIPS // len(TASKS[name].labels))


def write_tasks(
    out: Path,
    names: Sequence[str] = (),
    seed: int = 0,
    clips: tuple[int, int, int] | None = None,
    progress: Progress = quiet,
) -> dict[str, int]:
    """Write tasks, all of them if none is named, into folders of `out`; what is there already stays.

    Returns the number of clips of each. Raises ConfigError on an unknown task, no clips, or a folder that holds
    something else.
    """
    names = list(dict.fromkeys(names)) or list(TASKS)
    if unknown := [name for name in names if name not in TASKS]:
        raise ConfigError(f"--task {unknown[0]}: no such task; there are {', '.join(TASKS)}")
    if clips and not all(1 <= count <= MOST_CLIPS for count in clips):
        shown = " ".join(map(str, clips))
        raise ConfigError(f"--clips {shown}: must be 1 to {MOST_CLIPS} clips per class of train, valid and test")
    wanted = {name: _metadata(name, seed, clips or default_clips(name)) for name in names}
    out.mkdir(parents=True, exist_ok=True)
    with _locked(out):
        for name in [name for name in names if not _is_there(out / name, wanted[name])]:
            _write_task(out, name, wanted[name], progress)
    return {name: len(TASKS[name].labels) * sum(wanted[name]["clips_per_class"].values()) for name in names}


@contextmanager
def _locked(out: Path) -> Iterator[None]:
    """Hold the folder itself: a file for it would be a task to the kit. File systems that know no locks go without."""
    descriptor = os.open(out, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise ConfigError(f"{out}: another process is writing tasks here; wait for it, or choose another") from None
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK):
            raise
    try:
        yield
    finally:
        os.close(descriptor)


def _metadata(name: str, seed: int, clips: tuple[int, int, int]) -> dict[str, Any]:
    """What the kit asks for, and after that what tells these clips from others."""
    return {
        "task_name": name,
        "version": str(VERSION),
        "embedding_type": "scene",
        "prediction_type": "multiclass",
        "split_mode": "trainvaltest",
        "splits": list(SPLITS),
        "sample_duration": CLIP_SECONDS,
        "evaluation": ["top1_acc"],
        "use_scoring_for_early_stopping": True,
        "generator": "msm-dist data tasks",
        "seed": seed,
        "clips_per_class": dict(zip(SPLITS, clips, strict=True)),
    }


def _is_there(folder: Path, wanted: dict[str, Any]) -> bool:
    """Whether the task was written before. Raises ConfigError if something else was."""
    if not folder.exists():
        return False
    remedy = "choose another output folder, or remove this one"
    try:
        found = json.loads((folder / "task_metadata.json").read_text(encoding="utf-8"))
        different = {key: (found.get(key), value) for key, value in wanted.items() if found.get(key) != value}
    except (OSError, ValueError, AttributeError):
        raise ConfigError(f"{folder}: is there, but not a task that this command has written; {remedy}") from None
    if different:
        faults = "; ".join(f"{key} was {was}, is {now}" for key, (was, now) in different.items())
        raise ConfigError(f"{folder}: holds other clips ({faults}); {remedy}")
    return True


def _write_task(out: Path, name: str, metadata: dict[str, Any], progress: Progress) -> None:
    """Write a task under another name, which becomes its own when all is there."""
    folder, task = out / f"{name}{UNFINISHED}", TASKS[name]
    shutil.rmtree(folder, ignore_errors=True)
    counts = {split: count * len(task.labels) for split, count in metadata["clips_per_class"].items()}
    made_of, done = {}, 0
    for split, count in counts.items():
        (folder / str(RATE) / split).mkdir(parents=True)
        for number in range(count):
            clip, made = make_clip(name, metadata["seed"], split, number)
            file = f"{split}-{number:06d}.wav"
            (folder / str(RATE) / split / file).write_bytes(_wav(clip))
            made_of[file] = made
            done += 1
            progress(f"writing {name}", done, sum(counts.values()))
        own = {file: [made["label"]] for file, made in made_of.items() if file.startswith(f"{split}-")}
        write_atomically(folder / f"{split}.json", _json(own))
    write_atomically(folder / "clips.json", _json(made_of))
    rows = ["idx,label", *(f"{number},{label}" for number, label in enumerate(task.labels))]
    write_atomically(folder / "labelvocabulary.csv", "\n".join([*rows, ""]))
    write_atomically(folder / "task_metadata.json", _json(metadata))
    folder.rename(out / name)


def _event(waveform: np.ndarray, **made_of: Any) -> Event:
    return Event(unit(waveform), made_of)


def _pick(rng: Rng, makers: Any) -> tuple[str, Any]:
    """A name and a sound of that kind with its own parameters."""
    name = str(rng.choice(list(makers)))
    return name, makers[name](rng)


def _steady(rng: Rng, samples: int, unseen: bool) -> tuple[str, np.ndarray]:
    """A tone or a texture that does not change."""
    if rng.random() < 0.5:
        name, tone = _pick(rng, TONES[unseen])
        return name, tone(np.full(samples, log_uniform(rng, 150, 500)), rng)
    name, texture = _pick(rng, TEXTURES[unseen])
    return name, texture(samples, rng)


def _hit(rng: Rng, unseen: bool) -> tuple[str, np.ndarray]:
    """A short decaying sound, over before the next step of a rhythm."""
    samples = _samples(rng.uniform(0.05, 0.085))
    name, sound = _steady(rng, samples, unseen)
    return name, sound * _fade(samples, 0.004) * np.exp(-rng.uniform(1, 4) * np.arange(samples) / samples)


def _swing(rng: Rng, label: int, samples: int) -> tuple[np.ndarray, float]:
    """A sine [samples] at the class' rate, a tenth off at most, and that rate in Hz."""
    rate = list(RATES_HZ.values())[label] * 1.1 ** rng.uniform(-1, 1)
    return np.sin(2 * np.pi * (rate * np.arange(samples) / RATE + rng.random())), rate


def _samples(seconds: float) -> int:
    return int(seconds * RATE)


def _fade(samples: int, seconds: float) -> np.ndarray:
    """Rise and fall over so many seconds."""
    edge = np.minimum(np.arange(samples), np.arange(samples)[::-1])
    return np.sin(np.pi / 2 * np.minimum(1.0, edge / (seconds * RATE))) ** 2


def _wav(clip: np.ndarray) -> bytes:
    encoded = io.BytesIO()
    soundfile.write(encoded, np.rint(clip * 32767).astype(np.int16), RATE, format="WAV", subtype="PCM_16")
    return encoded.getvalue()


def _json(content: Any) -> str:
    return json.dumps(content, indent=1) + "\n"
