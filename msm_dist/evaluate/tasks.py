"""Labelled clips with their splits: what probes and fine-tuning learn from and are judged on.

In: a HEAR task folder, a CSV, a collection with a recipe (recipes.py), or indexed shards with labels in their json.
Out: a `Task`, its clips in a fixed order. Every file named is looked for before anything is computed. Fails with
DataError, which names the file, the value and the rule.
"""

import logging
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from msm_dist.data.audio import BadClip
from msm_dist.data.contents import printable, stored_clips
from msm_dist.data.index import INDEX_NAME, Index, Official, listed, load_index
from msm_dist.data.storage import is_remote
from msm_dist.errors import DataError
from msm_dist.evaluate.hear_folder import METADATA_NAME, read_hear_folder
from msm_dist.evaluate.recipes import RECIPES, Row, read_csv, recipe_rows
from msm_dist.evaluate.recordings import read_audio, read_encoded, unreadable
from msm_dist.files import open_regular

log = logging.getLogger(__name__)

SPLITS = ("train", "valid", "test")
VALID_SHARE = 10
"""Of the training clips of a task without validation clips every tenth is used to choose by."""


@dataclass(frozen=True, slots=True)
class TaskClip:
    """A clip: its audio, the numbers of its labels in `Task.labels` (one, unless multilabel), its split."""

    path: Path
    """The audio file, or the shard that holds the clip."""
    labels: tuple[int, ...]
    split: str
    key: str = ""
    """Its name in messages: the file's as the table says it, or the key in its shard."""
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
    """Names of scores.SCORES; the first is the one that decides."""
    official: Official | None = None
    """How much of a published collection the test shards hold, where their index says so."""

    def targets(self) -> np.ndarray:
        """Labels of all clips as float32 [N, C] of zeros and ones."""
        targets = np.zeros((len(self.clips), len(self.labels)), np.float32)
        for row, clip in zip(targets, self.clips, strict=True):
            row[list(clip.labels)] = 1
        return targets


@dataclass(frozen=True)
class Parts:
    """Places of clips in a task's order, int64 each: to train on, to choose by, to be judged on."""

    train: np.ndarray
    valid: np.ndarray
    test: np.ndarray


def read_task(path: str | Path, audio: Path | None = None, sample_rate: int = 16_000) -> Task:
    """The task in a HEAR task folder, a CSV of file,label,split (or fold), or RECIPE:FOLDER as esc50:ESC-50-master.

    `audio` is the folder that a CSV's files are relative to, else the CSV's own. Of a HEAR folder's rates the given one
    is taken, else the next higher, else the highest. Several labels of a clip are separated by ; or | and make a CSV
    multilabel, as does a column called labels. Raises DataError.
    """
    path = Path(path)
    recipe, colon, folder = str(path).partition(":")
    if colon and recipe in RECIPES:
        rows = recipe_rows(recipe, folder)
        return _from_rows((recipe, str(path)), rows, RECIPES[recipe].kind, Path(folder), multilabel=False)
    if (path / METADATA_NAME).is_file():
        return _from_hear(path, sample_rate)
    if path.is_file() and path.suffix == ".csv":
        rows, kind, multilabel = _csv_rows(path)
        return _from_rows((path.stem, str(path)), rows, kind, audio or path.parent, multilabel)
    if (path / INDEX_NAME).is_file():
        raise DataError(
            f"{path}: shards of training clips need shards to be judged on: add --test SHARDS (to finetune, "
            "data.test=SHARDS)"
        )
    if held := _tasks_in(path):
        raise DataError(f"{path}: is no task but holds {len(held)}; name those wanted: {' '.join(held)}")
    raise DataError(
        f"{path}: is no task: must be a HEAR task folder (with {METADATA_NAME}), a .csv of file,label,split, a folder "
        f"of shards beside those to be judged on, or RECIPE:FOLDER with one of {', '.join(RECIPES)}"
    )


def read_shards(train: str | Path, test: str | Path, valid: str | Path | None = None) -> Task:
    """A task of indexed audio shards on this machine, its labels those in the clips' json. Raises DataError.

    Clips without labels are left out and counted in a warning. Multilabel if a clip has several.
    """
    given = {"train": train, "valid": valid, "test": test}
    indexes = {split: _labelled_index(shards) for split, shards in given.items() if shards is not None}
    _check_apart(indexes)
    found = {split: list(_labelled_clips(index)) for split, index in indexes.items()}
    for split, index in indexes.items():
        if not found[split]:
            raise DataError(
                f"{index.location}: none of its {index.num_clips:,} clips has labels in its json; pack them with a "
                "table of labels (msm-dist data pack --csv)"
            )
        if lacking := index.num_clips - len(found[split]):
            log.warning("%s: %d of %d clips have no labels: left out", index.location, lacking, index.num_clips)
    names = sorted({label for clips in found.values() for _, labels in clips for label in labels})
    place = {name: number for number, name in enumerate(names)}
    clips = [
        TaskClip(clip.path, tuple(sorted(place[label] for label in labels)), split, clip.key, clip.member)
        for split, pairs in found.items()
        for clip, labels in pairs
    ]
    multilabel = any(len(clip.labels) > 1 for clip in clips)
    fold = Fold(("train",), "valid" if valid is not None else None, "test")
    scores = _usual_scores(multilabel)
    name = Path(indexes["test"].location).name
    return Task(name, tuple(names), multilabel, tuple(clips), (fold,), scores, indexes["test"].official)


def clip_waveform(clip: TaskClip, sample_rate: int) -> np.ndarray:
    """The audio of a clip, mono float32 [S] at `sample_rate`. Raises DataError."""
    if clip.member is None:
        return read_audio(clip.path, sample_rate)[0]
    offset, size = clip.member
    try:
        with open_regular(clip.path) as file:
            file.seek(offset)
            return read_encoded(file.read(size), sample_rate)[0]
    except (BadClip, OSError) as error:
        raise unreadable(f"{clip.path}: {printable(clip.key)}", error) from None


def check_classes(task: Task) -> None:
    """Raise DataError where a clip's one label is the only one there is."""
    if len(task.labels) < 2 and not task.multilabel:
        raise DataError(
            f"{task.name}: has one class, {', '.join(task.labels)}: a clip of one label needs two to choose from; for "
            "clips with and without a label call the column labels, and leave its cell empty without"
        )


def untrained_classes(task: Task, parts: Parts) -> tuple[int, int]:
    """How many classes of test clips no training clip has, and of how many."""
    trained, tested = (
        {label for place in places.tolist() for label in task.clips[place].labels}
        for places in (parts.train, parts.test)
    )
    return len(tested - trained), len(tested)


def parts_of(task: Task, fold: Fold, seed: int, labels_per_class: int | None = None, holds_out: bool = True) -> Parts:
    """The clips of a rotation. What is drawn, is drawn by `seed`.

    `labels_per_class`: the training clips are cut to so many of each class (multilabel: clips are taken until each
    class has so many or has no more). Without validation clips a tenth of the training clips, spread over the classes,
    becomes them, unless nothing is held out; it is drawn beside so many of each class. Raises DataError where a part is
    left without clips.
    """
    splits = np.array([clip.split for clip in task.clips])
    train = np.flatnonzero(np.isin(splits, fold.train))
    test = np.flatnonzero(splits == fold.test)
    order = np.random.default_rng([seed, 0x7A5C]).permutation(train)
    if labels_per_class is not None:
        # Of so many that they are left when a tenth is gone.
        beside = math.ceil(labels_per_class / (VALID_SHARE - 1)) if fold.valid is None and holds_out else 0
        order = _of_each_class(task, order, labels_per_class + beside)
    if fold.valid is not None:
        valid = np.flatnonzero(splits == fold.valid)
    else:
        valid = _spread_tenth(task, order) if holds_out else order[:0]
    train = np.sort(np.setdiff1d(order, valid))
    for name, part in (("training", train), ("validation", valid), ("test", test)):
        if not len(part) and (name != "validation" or holds_out):
            there = ", ".join(sorted(set(splits.tolist())))
            raise DataError(
                f"{task.name}: has no {name} clips ({len(task.clips)} in all, splits {there}); give "
                + ("validation clips, or several training clips of a class" if name == "validation" else "some")
            )
    return Parts(train, valid, test)


def _of_each_class(task: Task, order: np.ndarray, count: int) -> np.ndarray:
    """The clips of `order` that some class still needed when its turn came."""
    needed = Counter(dict.fromkeys(range(len(task.labels)), count))
    chosen = []
    for place in order:
        labels = task.clips[place].labels
        if any(needed[label] > 0 for label in labels):
            chosen.append(place)
            needed.subtract(labels)
    return np.array(chosen, np.int64)


def _spread_tenth(task: Task, order: np.ndarray) -> np.ndarray:
    """Every tenth clip of each class, the first among them; a clip of several labels counts for the rarest."""
    uses = Counter(label for place in order for label in task.clips[place].labels)
    turns: Counter[int] = Counter()
    chosen = []
    for place in order:
        stratum = min(task.clips[place].labels, key=lambda label: (uses[label], label), default=-1)
        # A class with a single clip keeps it for training.
        if turns[stratum] % VALID_SHARE == 0 and uses[stratum] != 1:
            chosen.append(place)
        turns[stratum] += 1
    return np.sort(np.array(chosen, np.int64))


def _usual_scores(multilabel: bool) -> tuple[str, ...]:
    return ("mAP", "aucroc") if multilabel else ("top1_acc", "mAP")


def _from_rows(names: tuple[str, str], rows: Sequence[Row], kind: str, root: Path, multilabel: bool) -> Task:
    """The task of rows; `names` are its own and that of its table."""
    name, source = names
    labels = sorted({label for row in rows for label in row.labels}, key=_natural)
    place = {label: number for number, label in enumerate(labels)}
    clips = []
    for row in rows:
        clips.append(
            TaskClip(root / row.file, tuple(sorted(place[label] for label in row.labels)), row.split, row.file)
        )
    _check_files(
        clips, f"{root}: {name}", "give the folder of the audio with --audio FOLDER (finetune: data.audio=FOLDER)"
    )
    splits = sorted({row.split for row in rows}, key=_natural)
    folds = _rotations(splits, source) if kind == "fold" else _one_fold(splits, source)
    return Task(name, tuple(labels), multilabel, tuple(clips), folds, _usual_scores(multilabel))


def _from_hear(folder: Path, sample_rate: int) -> Task:
    hear = read_hear_folder(folder, sample_rate)
    clips = [
        TaskClip(hear.audio / split / file, labels, split, f"{split}/{file}")
        for split, files in hear.files.items()
        for file, labels in files.items()
    ]
    _check_files(clips, str(folder), "fetch or make the task again")
    splits = list(hear.files)
    folds = _rotations(splits, str(folder)) if hear.rotated else _one_fold(splits, str(folder))
    scores = hear.scores or _usual_scores(hear.multilabel)
    return Task(hear.name, hear.labels, hear.multilabel, tuple(clips), folds, scores)


def _csv_rows(path: Path) -> tuple[list[Row], str, bool]:
    """Rows, what their last column is (split or fold), whether clips may have several labels."""
    rows, lines = [], {}
    kind, label = "", ""
    for line, cells in read_csv(path, ("file",)):
        if not kind:
            kinds, names = ([c for c in wanted if c in cells] for wanted in (("split", "fold"), ("label", "labels")))
            if len(kinds) != 1 or len(names) != 1:
                raise DataError(
                    f"{path}: its columns are {', '.join(cells)}: must be file, one of label and labels, one of split "
                    "and fold"
                )
            kind, label = kinds[0], names[0]
        if cells["file"] in lines:
            raise DataError(
                f"{path}, line {line}: {cells['file']} is on line {lines[cells['file']]} already; several labels go "
                "into one cell, separated by ;"
            )
        lines[cells["file"]] = line
        if kind == "split" and cells[kind] not in SPLITS:
            raise DataError(f"{path}, line {line}: split is {cells[kind]!r}, must be one of {', '.join(SPLITS)}")
        given = [part.strip() for part in cells[label].replace(";", "|").split("|")]
        labels = tuple(dict.fromkeys(part for part in given if part))
        if not cells[kind] or not cells["file"] or (not labels and label == "label"):
            raise DataError(f"{path}, line {line}: has an empty cell; every clip needs file, {label} and {kind}")
        rows.append(Row(cells["file"], labels, cells[kind]))
    if not rows:
        raise DataError(f"{path}: has no clips; a row is file,label,split")
    return rows, kind, label == "labels" or any(len(row.labels) > 1 for row in rows)


def _natural(text: str) -> tuple[int, int, str]:
    """Numbers by their value, before other text."""
    return (0, int(text), text) if text.isdecimal() and len(text) < 1000 else (1, 0, text)


def _one_fold(splits: Sequence[str], source: str) -> tuple[Fold, ...]:
    if lacking := {"train", "test"} - set(splits):
        raise DataError(f"{source}: has no clips in the split {', '.join(sorted(lacking))}; it has {', '.join(splits)}")
    return (Fold(("train",), "valid" if "valid" in splits else None, "test"),)


def _rotations(names: Sequence[str], source: str) -> tuple[Fold, ...]:
    """Test on fold k, choose by fold k + 1, train on the rest; of two folds, train on the other."""
    if len(names) < 2:
        raise DataError(
            f"{source}: all clips are in the fold {', '.join(names)}; folds are rotated, so there must be at least 2"
        )
    folds = []
    for number, test in enumerate(names):
        valid = names[(number + 1) % len(names)] if len(names) > 2 else None
        folds.append(Fold(tuple(name for name in names if name not in (test, valid)), valid, test))
    return tuple(folds)


def _check_files(clips: Sequence[TaskClip], source: str, remedy: str) -> None:
    if absent := [str(clip.path) for clip in clips if not _is_file(clip.path)]:
        raise DataError(
            f"{source}: {len(absent)} of {len(clips)} audio files are not there; {remedy}:\n{listed(absent)}"
        )


def _is_file(path: Path) -> bool:
    """Whether a file is there; a name that no file can have is none."""
    try:
        return path.is_file()
    except OSError:
        return False


def _tasks_in(folder: Path) -> list[str]:
    """The HEAR task folders and CSVs right below a folder."""
    if not folder.is_dir():
        return []
    return [str(path) for path in sorted(folder.iterdir()) if path.suffix == ".csv" or (path / METADATA_NAME).is_file()]


def _labelled_index(shards: str | Path) -> Index:
    index = load_index(str(shards))
    if is_remote(index.location):
        raise DataError(f"{index.location}: labels are read from shards on this machine only; copy them here")
    if index.kind != "audio":
        raise DataError(f"{index.location}: holds stored log-mels; probes need shards of audio")
    return index


def _check_apart(indexes: Mapping[str, Index]) -> None:
    """No shard may be in two parts, also under another name."""
    part_of: dict[str, str] = {}
    for split, index in indexes.items():
        for shard in index.shards:
            for one in (str(shard.path.resolve()), shard.sha256):
                if (other := part_of.setdefault(one, split)) != split:
                    raise DataError(
                        f"{shard.path}: is among the shards of {other} and of {split}; clips to be judged must not be "
                        "trained on: give each part shards of its own"
                    )


def _labelled_clips(index: Index) -> Iterator[tuple[TaskClip, tuple[str, ...]]]:
    """Each clip that has labels, still without their numbers, and their names."""
    for shard in index.shards:
        for stored in stored_clips(shard):
            labels = stored.description.get("labels")
            if isinstance(labels, list) and labels and all(isinstance(label, str) for label in labels):
                member = int(stored.row["offset"]), int(stored.row["size"])
                yield TaskClip(shard.path, (), "", stored.key, member), tuple(dict.fromkeys(labels))
