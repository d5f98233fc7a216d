"""Three tiny tasks in the layout of the HEAR tasks, easy enough that a predictor that learned nothing is found out.

`tones`: which of three sounds, train/valid/test. `layers`: which of three sounds are there, three folds. `events`: when
two sounds begin and end, train/valid/test.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from tests.hear_tasks import write_task

SOUNDS = ("low", "high", "noise")
# An epoch of so few clips is one update. The kit gives up where no event is predicted yet when it first validates.
SHORT_SEARCH = {"hidden_layers": [1], "max_epochs": [90], "check_val_every_n_epoch": [30], "lr": [3.2e-3, 1e-3]}
DURATIONS = {"tones": 1.0, "layers": 0.8, "events": 8.0}


def write_tasks(folder: Path, sample_rate: int, seed: int = 0) -> Path:
    """All three under `folder`, as wav at `sample_rate`."""
    sounds = Sounds(sample_rate, np.random.default_rng(seed))
    splits = {"train": 30, "valid": 12, "test": 24}
    several = {"prediction_type": "multilabel"}

    clips = {split: dict(sounds.tones(split, count)) for split, count in splits.items()}
    kind = {"evaluation": ["top1_acc", "mAP"]}
    write_task(folder / "tones-v1-tiny", clips, SOUNDS, sample_rate, **about("tones"), **kind)

    clips = {fold: dict(sounds.layers(fold, 20)) for fold in ("fold00", "fold01", "fold02")}
    kind = several | {"split_mode": "new_split_kfold", "evaluation": ["mAP", "aucroc"]}
    write_task(folder / "layers-v1-tiny", clips, SOUNDS, sample_rate, **about("layers"), **kind)

    clips = {split: dict(sounds.events(split, count // 3)) for split, count in splits.items()}
    kind = several | {"embedding_type": "event", "evaluation": ["event_onset_200ms_fms", "segment_1s_er"]}
    write_task(folder / "events-v1-tiny", clips, SOUNDS[:2], sample_rate, **about("events"), **kind)
    return folder


def about(name: str) -> dict[str, Any]:
    """What the metadata of a task says beside its kind."""
    return {
        "task_name": name,
        "version": "v1",
        "mode": "tiny",
        "sample_duration": DURATIONS[name],
        "evaluation_params": {"task_specific_param_grid": SHORT_SEARCH},
    }


class Sounds:
    """Clips of each task, drawn one after the other from a generator."""

    def __init__(self, sample_rate: int, rng: np.random.Generator):
        self.sample_rate = sample_rate
        self.rng = rng

    def tones(self, split: str, count: int) -> Iterator[tuple[str, tuple[np.ndarray, list[str]]]]:
        """One sound a clip; the classes take turns."""
        for number in range(count):
            label = SOUNDS[number % len(SOUNDS)]
            sound = self.sound(label, DURATIONS["tones"])
            yield f"{split}-{number:02d}.wav", (self.quiet(DURATIONS["tones"]) + sound, [label])

    def layers(self, split: str, count: int) -> Iterator[tuple[str, tuple[np.ndarray, list[str]]]]:
        """Any of the sounds at once, none included; every combination as often as the others."""
        for number in range(count):
            labels = [label for bit, label in enumerate(SOUNDS) if number >> bit & 1]
            layers = [self.sound(label, DURATIONS["layers"]) for label in labels]
            yield f"{split}-{number:02d}.wav", (sum(layers, self.quiet(DURATIONS["layers"])), labels)

    def events(self, split: str, count: int) -> Iterator[tuple[str, tuple[np.ndarray, list[dict[str, Any]]]]]:
        """Five sounds of 0.6 to 1 s with pauses of 0.3 s and more, start and end in ms."""
        for number in range(count):
            samples, targets, start = self.quiet(DURATIONS["events"]), [], 0.0
            for label in self.rng.choice(SOUNDS[:2], 5):
                start += self.rng.uniform(0.3, 0.5)
                sound = self.sound(label, self.rng.uniform(0.6, 1.0))
                first = round(start * self.sample_rate)
                samples[first : first + len(sound)] += sound
                end = start + len(sound) / self.sample_rate
                targets.append({"label": str(label), "start": 1000 * start, "end": 1000 * end})
                start = end
            yield f"{split}-{number:02d}.wav", (samples, targets)

    def sound(self, label: str, seconds: float) -> np.ndarray:
        """A tone of one of two octaves, or noise, at a level of its own: [S]."""
        time = np.arange(round(seconds * self.sample_rate)) / self.sample_rate
        level = self.rng.uniform(0.05, 0.25)
        if label == "noise":
            return level * self.rng.standard_normal(time.size) / 2
        pitch = self.rng.uniform(200, 400) if label == "low" else self.rng.uniform(1500, 3000)
        return level * np.sin(2 * np.pi * (pitch * time + self.rng.uniform()))

    def quiet(self, seconds: float) -> np.ndarray:
        """A floor of noise: [S]."""
        return 0.002 * self.rng.standard_normal(round(seconds * self.sample_rate))
