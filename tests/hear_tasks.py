"""HEAR task folders for tests: of any clips, and small ones of tones."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tests.audio_files import write_audio

RATE = 16000
PITCHES = {"low": 220, "middle": 660, "high": 1980}


def tone(label: str, seed: int, num_samples: int = 4800) -> np.ndarray:
    """int16 [S]: a tone of the class, its level, phase and noise drawn."""
    rng = np.random.default_rng([seed, sorted(PITCHES).index(label)])
    time = np.arange(num_samples) / RATE
    waveform = np.sin(2 * np.pi * PITCHES[label] * rng.uniform(0.9, 1.1) * time + rng.uniform(0, 6))
    waveform = rng.uniform(0.05, 0.5) * (waveform + 0.3 * rng.standard_normal(num_samples))
    return (np.clip(waveform, -1, 1) * 32767).astype(np.int16)


def write_task(
    folder: Path,
    clips: Mapping[str, Mapping[str, tuple[np.ndarray, Sequence[Any]]]],
    /,
    labels: Sequence[str] = tuple(sorted(PITCHES)),
    rate: int = RATE,
    **metadata: object,
) -> Path:
    """A HEAR task folder of `clips` {split: {file: (samples [S], what the split's JSON says of it)}}."""
    folder.mkdir(parents=True, exist_ok=True)
    settings = {
        "task_name": "tones",
        "embedding_type": "scene",
        "prediction_type": "multiclass",
        "split_mode": "trainvaltest",
        "splits": list(clips),
        "sample_duration": 0.3,
        "evaluation": ["top1_acc"],
    }
    (folder / "task_metadata.json").write_text(json.dumps(settings | metadata))
    rows = [f"{number},{label}\n" for number, label in enumerate(labels)]
    (folder / "labelvocabulary.csv").write_text("idx,label\n" + "".join(rows))
    for split, of_split in clips.items():
        (folder / f"{split}.json").write_text(json.dumps({file: said for file, (_, said) in of_split.items()}))
        for file, (samples, _) in of_split.items():
            write_audio(folder / str(rate) / split / file, samples, "wav", rate)
    return folder


def write_hear(folder: Path, splits: Mapping[str, Mapping[str, Sequence[str]]], /, **settings: Any) -> Path:
    """A task with `splits` {split: {file: labels}}; the audio of a file is a tone of its first label."""
    clips = {}
    for split, files in splits.items():
        firsts = [names[0] if names and names[0] in PITCHES else "low" for names in files.values()]
        tones = [tone(label, number) for number, label in enumerate(firsts)]
        clips[split] = {file: (samples, files[file]) for file, samples in zip(files, tones, strict=True)}
    return write_task(folder, clips, **settings)


def tone_files(count: int, prefix: str = "") -> dict[str, list[str]]:
    """{file: [label]}: `count` clips of each class."""
    return {f"{prefix}{label}{number}.wav": [label] for number in range(count) for label in sorted(PITCHES)}


def write_tones(folder: Path, train: int = 8, valid: int = 4, test: int = 6) -> Path:
    """A HEAR task of three pitches, so many clips of each to a split."""
    return write_hear(folder, {"train": tone_files(train), "valid": tone_files(valid), "test": tone_files(test)})
