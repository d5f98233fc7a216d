"""Labelled clips with their splits: what probes and fine-tuning learn from and are judged on.

In: a HEAR task folder, a CSV, or indexed shards with labels in their json. Out: a `Task`. Every file named is looked for
before anything is computed. Fails with DataError, which names the file, the value and the rule.
"""

from dataclasses import dataclass
from pathlib import Path

from msm_dist.data.index import Official


@dataclass(frozen=True, slots=True)
class TaskClip:
    """A clip: its audio, the numbers of its labels in `Task.labels` (one, unless multilabel), its split."""

    path: Path
    """The audio file, or the shard that holds the clip."""
    labels: tuple[int, ...]
    split: str
    key: str = ""
    """Its name in messages and caches: the file's as the table says it, or the key in its shard."""
    member: tuple[int, int] | None = None
    """Offset and bytes in the shard; None for a file of its own."""


@dataclass(frozen=True)
class Fold:
    """One rotation: splits to train on, to choose by (None: a tenth of the training clips), to be judged on."""

    train: tuple[str, ...]
    valid: str | None
    test: str


@dataclass(frozen=True)
class Task:
    """Labelled clips in a fixed order. `folds` holds one rotation for train/valid/test, one per fold for k-fold."""

    name: str
    labels: tuple[str, ...]
    multilabel: bool
    clips: tuple[TaskClip, ...]
    folds: tuple[Fold, ...]
    scores: tuple[str, ...] = ()
    """Names of msm_dist.evaluate.scores, the first is the one that decides."""
    official: Official | None = None
    """How much of a published collection the test clips are, where their index says so."""


def read_task(path: str | Path, audio: Path | None = None, sample_rate: int = 16_000) -> Task:
    """The task in a HEAR task folder or a CSV of file,label,split (or fold). Raises DataError.

    `audio` is the folder that a CSV's files are relative to, else the CSV's own. Of a HEAR folder's rates the given one
    is taken, else the next higher, else the highest.
    """
    raise NotImplementedError
