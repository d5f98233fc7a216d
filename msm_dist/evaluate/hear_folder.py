"""A HEAR 2021 task as it lies on disk, in the layout that the HEAR kit reads (Turian et al., 2022).

In: a folder of one scene task: task_metadata.json, labelvocabulary.csv (idx,label), <split>.json ({file: [label, ...]})
and <rate>/<split>/<file>. Out: its files and labels. Fails with DataError; tasks of events are refused.
"""

from pathlib import Path
from typing import Any, NamedTuple

from msm_dist.errors import DataError
from msm_dist.evaluate.recipes import read_csv
from msm_dist.files import read_small
from msm_dist.plain import MAX_JSON, parse_json

METADATA_NAME, VOCABULARY_NAME = "task_metadata.json", "labelvocabulary.csv"
CHOICES = {
    "embedding_type": ("scene",),
    "prediction_type": ("multiclass", "multilabel"),
    "split_mode": ("trainvaltest", "new_split_kfold", "presplit_kfold"),
}


class HearFolder(NamedTuple):
    """What a folder says: {split: {file: numbers of its labels}}, the folder of the audio, and how it is judged."""

    name: str
    labels: tuple[str, ...]
    multilabel: bool
    files: dict[str, dict[str, tuple[int, ...]]]
    audio: Path
    rotated: bool
    """Whether the splits are folds that are tested in turn."""
    scores: tuple[str, ...]


def read_hear_folder(folder: Path, sample_rate: int) -> HearFolder:
    """The task in a folder, its audio at `sample_rate`, else at the next higher rate, else the highest."""
    metadata = _metadata(folder / METADATA_NAME)
    labels = _vocabulary(folder / VOCABULARY_NAME)
    multilabel = metadata["prediction_type"] == "multilabel"
    return HearFolder(
        metadata["task_name"],
        labels,
        multilabel,
        {split: _split(folder / f"{split}.json", labels, multilabel) for split in metadata["splits"]},
        _audio(folder, sample_rate),
        metadata["split_mode"] != "trainvaltest",
        tuple(metadata["evaluation"]),
    )


def _metadata(path: Path) -> dict[str, Any]:
    metadata = _json(path)
    if metadata.get("embedding_type") == "event":
        raise DataError(
            f"{path.parent}: is a task of events in time, which probes of whole clips can't judge; docs/hear.md says "
            "how to run the HEAR kit on it"
        )
    for name, values in CHOICES.items():
        if metadata.get(name) not in values:
            raise DataError(f"{path}: {name} is {metadata.get(name)!r}, must be one of {', '.join(values)}")
    for name in ("splits", "evaluation"):
        entries = metadata.get(name)
        if not isinstance(entries, list) or not entries or not all(isinstance(entry, str) for entry in entries):
            raise DataError(f"{path}: {name} is {entries!r}, must be a list of names")
    if not isinstance(metadata.get("task_name"), str):
        raise DataError(f"{path}: task_name is {metadata.get('task_name')!r}, must be a name")
    return metadata


def _vocabulary(path: Path) -> tuple[str, ...]:
    """The labels in the order of their numbers."""
    rows = [(row["idx"], row["label"]) for _, row in read_csv(path, ("idx", "label"))]
    labels = dict(rows)
    numbers = [str(number) for number in range(len(rows))]
    if labels.keys() != set(numbers) or len(set(labels.values())) < len(rows):
        raise DataError(f"{path}: must number its labels 0, 1, 2 ... without gaps, each label once")
    return tuple(labels[number] for number in numbers)


def _split(path: Path, labels: tuple[str, ...], multilabel: bool) -> dict[str, tuple[int, ...]]:
    place = {label: number for number, label in enumerate(labels)}
    files = {}
    for file, given in _json(path).items():
        names = [str(label) for label in (given if isinstance(given, list) else [given])]
        if unknown := [name for name in names if name not in place]:
            raise DataError(f"{path}: {file} has the label {unknown[0][:80]!r}, which {VOCABULARY_NAME} lacks")
        if len(names) != 1 and not multilabel:
            raise DataError(f"{path}: {file} has {len(names)} labels; of a multiclass task each clip has one")
        files[file] = tuple(sorted({place[name] for name in names}))
    return files


def _audio(folder: Path, sample_rate: int) -> Path:
    rates = sorted(int(path.name) for path in folder.iterdir() if path.is_dir() and path.name.isdecimal())
    if not rates:
        raise DataError(f"{folder}: lacks a folder of audio named by its rate, such as {sample_rate}/")
    return folder / str(next((rate for rate in rates if rate >= sample_rate), rates[-1]))


def _json(path: Path) -> dict[str, Any]:
    try:
        content = parse_json(read_small(path, MAX_JSON))
    except OSError as error:
        raise DataError(f"{path}: can't be read ({error.strerror})") from None
    except ValueError as error:
        raise DataError(f"{path}: is not JSON ({error})") from None
    if not isinstance(content, dict):
        raise DataError(f"{path}: holds no JSON object")
    return content
